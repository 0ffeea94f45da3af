"""The dashboard's page in a real browser, its data, and the same figures at a terminal."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fastapi
import pytest
import uvicorn
from rich.console import Console

from dvi.records import LossWeights, RoundStats, SamplingParams, UpdateReport
from dvi.serving.metrics import dashboard
from dvi.serving.metrics.monitor import Monitor
from dvi.serving.metrics.terminal_view import fetch_from, show
from dvi.serving.request import Load, Request, RequestOutput, StepReport
from tests.support.paths import ROOT

DEADLINE_S = 20.0
HOSTILE = "<img src=x onerror=alert(1)>"


def load_script():
    spec = importlib.util.spec_from_file_location("screenshot", ROOT / "scripts/screenshot_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshot = load_script()
has_browser = Path(screenshot.CHROMIUM).exists() and Path(screenshot.CHROMEDRIVER).exists()
needs_browser = pytest.mark.skipif(
    not has_browser, reason=f"needs {screenshot.CHROMIUM} and {screenshot.CHROMEDRIVER}"
)


class Clock:
    """Seconds that pass when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def serve(monitor: Monitor, *, steps: int, num_accepted: int, version: int = 1, domain: str = "code") -> None:
    """Two minutes of traffic and learning, of which each round drafts four."""
    for number in range(steps):
        monitor._clock.now_s += 120 / steps
        stats = RoundStats(decode_s=0.02)
        stats.count_round(num_drafted=4, num_accepted=num_accepted)
        stats.new_tokens = num_accepted + 1
        by_domain = {domain: stats}
        monitor.on_step(StepReport(0.03, rounds=stats, num_running=2, num_waiting=1, plain_s=0.03,
                                   drafter_version=version, rounds_by_domain=by_domain))  # fmt: skip
        monitor.load = lambda version=version: Load(num_running=2, num_waiting=1, drafter_version=version)
        losses, weights = {"forward_kl": 2.0, "policy_gradient": -0.1}, LossWeights(forward_kl=0.5)
        monitor.on_update(UpdateReport(number, version, "kl", losses, weights, 1.0, 64, 0.1, False))
        request = Request(number, [1, 2], SamplingParams(), tenant="alice", domain=domain, arrived_s=monitor._clock())
        monitor.on_finish(request, RequestOutput(number, finish_reason="stop", stats=stats, queue_s=0.1,
                                                 first_token_s=0.2))  # fmt: skip
    monitor.on_learner_stats({"train_s": 1.0, "replay_positions": 512.0, "replay_capacity": 1024.0})
    monitor._clock.now_s += 5.0  # charts leave out what has just begun


def engine_loop(**differences: object) -> SimpleNamespace:
    """What the dashboard asks of an EngineLoop, with a monitor whose time stands still."""
    fine = {"learner": object(), "learner_error": None, "is_alive": True, "is_draining": False, "is_pinned": False}
    return SimpleNamespace(monitor=Monitor(Clock()), **(fine | differences))


@contextmanager
def running(app: fastapi.FastAPI) -> Iterator[str]:
    """The URL of an application that a server of its own runs."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served(loop: SimpleNamespace, *, prefix: str = "", authorizations: set[str] | None = None) -> Iterator[str]:
    """The URL of nothing but a dashboard; authorizations: the headers that it asks for, if any."""

    def check(request: fastapi.Request) -> None:
        if authorizations and request.headers.get("authorization") not in authorizations:
            raise fastapi.HTTPException(401, headers={"WWW-Authenticate": "Basic"})

    app = fastapi.FastAPI(dependencies=[fastapi.Depends(check)])
    app.include_router(dashboard.routes(loop), prefix=prefix)
    with running(app) as url:
        yield url + prefix


def wait_until(is_so) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline_s, "did not come about in time"
        time.sleep(0.02)


# Data


@pytest.mark.parametrize(
    ("differences", "level", "text"),
    [
        ({}, "good", "waiting for traffic"),
        ({"learner": None}, "good", "learning is off"),
        ({"is_pinned": True}, "warn", "pinned"),
        ({"is_draining": True}, "warn", "draining"),
        ({"learner_error": "RuntimeError: CUDA\nerror"}, "bad", "learning has stopped: RuntimeError: CUDA"),
        ({"is_alive": False, "is_draining": True, "learner_error": "x"}, "bad", "engine has stopped"),
    ],
)
def test_the_state_names_the_gravest_thing(differences, level, text):
    """Catches a dead learner or engine that looks well."""
    state = dashboard.status(engine_loop(**differences))["state"]
    assert state["level"] == level and text in state["text"]
    assert state["text"].isprintable()


def test_the_page_needs_nothing_from_elsewhere_and_its_policy_fits_it():
    """Catches a font or script from a CDN, and an edited page whose hashes no longer let its own script run."""
    policy = dashboard.PAGE_HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", dashboard.PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    addresses = set(re.findall(r"https?://[^\"' ]+", dashboard.PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in dashboard.PAGE


# The page


@pytest.fixture(scope="module")
def chromium():
    with screenshot.browser(width=1280) as driver:
        yield driver


@pytest.fixture
def driver(chromium):
    """The browser, as if no test had used it before."""
    chromium.get("about:blank")
    look(chromium)
    chromium.get_log("browser")
    return chromium


def look(driver, *, width: int = 1280, scheme: str = "light") -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def text_of(driver, selector: str) -> str:
    # Not element.text, for which an element that is being redrawn is gone.
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)


@needs_browser
def test_the_page_draws_every_chart_without_a_complaint(driver):
    """Catches script errors, what the policy forbids, and a chart whose column was renamed in the data."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=2)
    loop.monitor.on_event("rollback", "to the best", version=1)
    loop.monitor._clock.now_s += 5.0
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        assert driver.get_log("browser") == []
        labels = driver.execute_script("return [...document.querySelectorAll('.chart')].map(c => c.ariaLabel)")
        assert len(labels) >= 8 and not [label for label in labels if label.endswith("nothing yet")]
        assert "acceptance now 50.0 %" in labels[0] and "1 rollback" in labels[0]
        paths = driver.execute_script("return document.querySelectorAll('.chart path.curve').length")
        assert paths >= len(labels)
        assert text_of(driver, "#state") == "● serving and learning: kl, step 59"
        for phrase in ("512 of 1,024 positions", "stop 60", "loss = 0.50 forward KL", "code", "alice", "v1"):
            assert phrase in text_of(driver, "main")


@needs_browser
def test_figures_follow_the_monitor_while_the_page_stays_open(driver):
    """Catches a page that draws once, or a snapshot that is cached."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=1)
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        wait_until(lambda: text_of(driver, ".big") == "25.0 %")
        serve(loop.monitor, steps=60, num_accepted=4, version=2)
        wait_until(lambda: text_of(driver, ".big") == "100.0 %")
        assert "drafter v2" in text_of(driver, "#about")


@needs_browser
def test_the_axes_can_be_chosen_and_a_pointer_reads_a_chart(driver):
    """Catches choices that change nothing, and errors on the way that only a click takes."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=2)
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        assert "ago" in text_of(driver, ".chart")
        for choice in ("tokens", "since_start"):
            driver.find_element("css selector", f"input[value={choice}] + span").click()
        assert "180 tokens" in text_of(driver, ".chart")
        driver.execute_script(
            "document.querySelector('.chart').dispatchEvent(new PointerEvent('pointermove', {clientX: 200}))"
        )
        assert ", v1" in text_of(driver, ".legend")
        assert driver.get_log("browser") == []


@needs_browser
def test_names_in_the_data_are_shown_as_text(driver):
    """Catches data taken for markup: a domain is named by clients."""
    loop = engine_loop(learner_error=HOSTILE)
    serve(loop.monitor, steps=10, num_accepted=2, domain=HOSTILE)
    loop.monitor.on_event("load", HOSTILE)
    loop.monitor.on_rejected(HOSTILE)
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        for place in ("#domains", "#events", "#requests", "#state"):
            assert HOSTILE in text_of(driver, place)
        assert driver.execute_script("return document.images.length") == 0
        assert driver.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 820])
def test_a_narrow_window_needs_no_sideways_scrolling(driver, width):
    """Catches a table or chart wider than a phone."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=2, domain="a-domain-with-a-rather-long-name")
    look(driver, width=width)
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        assert driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]


@needs_browser
def test_a_phone_sees_what_matters_and_unfolds_the_rest(driver):
    """Catches a phone's page of ten screens, and charts without a width because they were drawn while folded away."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=2)
    look(driver, width=390)
    seen = "return [...document.querySelectorAll('.chart')].map(c => c.checkVisibility() && c.clientWidth > 200)"
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        assert "as fast as plain decoding" in text_of(driver, "#headline")
        assert driver.execute_script(seen) == [True] * 3 + [False] * 6
        driver.find_element("css selector", "summary").click()
        wait_until(lambda: driver.execute_script(seen) == [True] * 9)
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390


@needs_browser
def test_the_page_follows_the_preferred_colours_and_can_be_read_in_both(driver):
    """Catches dark text on a dark card: every text differs from its card by WCAG's 4.5 to 1 at least."""
    loop = engine_loop(is_pinned=True)
    serve(loop.monitor, steps=10, num_accepted=2)
    seen = set()
    with served(loop) as url:
        for scheme in ("light", "dark"):
            look(driver, scheme=scheme)
            screenshot.open_dashboard(driver, url + "/dashboard")
            colours = driver.execute_script("""
                const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
                return [[of("body", "backgroundColor"), of("#state", "color"), of("#about", "color")],
                        [of(".card", "backgroundColor"), of(".big", "color"), of(".note", "color"),
                         of(".chart text", "fill")],
                        [of(".bar i", "backgroundColor"), of(".bar span", "color")]]""")
            for background, *texts in colours:
                assert all(contrast(background, text) >= 4.5 for text in texts), (scheme, background, texts)
            seen.add(colours[0][0])
    assert len(seen) == 2


def contrast(*colours: str) -> float:
    """WCAG 2's contrast ratio of two colours written as rgb(r, g, b)."""
    luminances = []
    for colour in colours:
        channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


@needs_browser
def test_a_server_that_is_gone_is_said_to_be_gone_until_it_is_back(driver):
    """Catches old figures that pass for new ones, and a page that gives up asking."""
    loop = engine_loop()
    serve(loop.monitor, steps=10, num_accepted=2)
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    with served(loop) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
        wait_until(lambda: "unreachable" in text_of(driver, "#state"))
        assert "figures of" in text_of(driver, "#state")
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})
        wait_until(lambda: text_of(driver, "#state").startswith("● serving"))
    driver.get_log("browser")  # the failed requests are logged, rightly


@needs_browser
def test_the_page_works_below_a_proxys_prefix(driver):
    """Catches an absolute path to the data."""
    loop = engine_loop()
    serve(loop.monitor, steps=10, num_accepted=2)
    with served(loop, prefix="/behind/a/proxy") as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        assert text_of(driver, ".big") == "50.0 %"


@needs_browser
def test_the_page_works_where_its_address_holds_a_password(driver):
    """Catches a request relative to such an address, which browsers refuse to make."""
    loop = engine_loop()
    serve(loop.monitor, steps=10, num_accepted=2)
    basic = "Basic " + base64.b64encode(b"any:secret").decode()
    with served(loop, authorizations={basic}) as url:
        screenshot.open_dashboard(driver, url.replace("http://", "http://any:secret@") + "/dashboard")
        assert text_of(driver, ".big") == "50.0 %"


@needs_browser
def test_a_picture_is_taken_of_the_whole_page_with_a_key(tmp_path):
    """Catches a picture of the first screen only, and a key that reaches the page but not its data."""
    loop = engine_loop()
    serve(loop.monitor, steps=10, num_accepted=2)
    path = tmp_path / "new" / "picture.png"
    with served(loop, authorizations={"Bearer secret"}) as url, screenshot.browser(width=800, is_dark=True) as driver:
        screenshot.open_dashboard(driver, url + "/dashboard", key="secret")
        screenshot.take(driver, path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width == 800 and height > 1500


@needs_browser
def test_a_fresh_server_shows_dashes_and_no_error(driver):
    """Catches charts that fail without a single value."""
    with served(engine_loop()) as url:
        screenshot.open_dashboard(driver, url + "/dashboard")
        assert text_of(driver, "#state") == "● waiting for traffic"
        assert text_of(driver, ".big") == "–" and "nothing yet" in text_of(driver, ".chart")
        assert driver.get_log("browser") == []


# At a terminal


def shown(fetch, *, num_views: int = 1, **console_settings: object) -> str:
    """What `show` leaves on a console after so many views."""
    views = iter(range(num_views + 1))
    console = Console(width=100, record=True, **console_settings)
    with console.capture() as capture:
        show(fetch, console=console, refresh_s=0.0, until=lambda: next(views) == num_views)
    return capture.get()


def test_a_terminal_shows_the_same_figures():
    """Catches a renamed key of the snapshot, and figures left out of the live view."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=2)
    text = shown(lambda: dashboard.status(loop), force_terminal=True)
    for phrase in ("50.0 %", "3.00", "1.50", "2 running, 1 waiting", "forward_kl 2.000", "512 of 1024", "alice", "v1"):
        assert phrase in text


def test_elsewhere_a_line_is_printed_every_ten_seconds_only():
    """Catches a log that fills with one line a second, or with a terminal's control codes."""
    loop = engine_loop()
    serve(loop.monitor, steps=60, num_accepted=2)
    text = shown(lambda: dashboard.status(loop), num_views=5, force_terminal=False)
    assert text.count("acceptance 50.0 %") == len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_names_are_no_markup_at_a_terminal_either():
    """Catches rich's markup in a domain's name, which would fail or recolour the view."""
    loop = engine_loop(learner_error="[bold]no")
    serve(loop.monitor, steps=10, num_accepted=2, domain="[/red]code\x1b[2J")
    text = shown(lambda: dashboard.status(loop), force_terminal=True)
    assert "[/red]code" in text and "[bold]no" in text and "\x1b[2J" not in text


def test_the_view_goes_on_while_the_server_is_away():
    """Catches a view that ends with the first refused connection, and one that hides it."""
    loop = engine_loop()
    answers = iter([dashboard.status(loop), ConnectionRefusedError("refused"), dashboard.status(loop)])

    def fetch() -> dict:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    text = shown(fetch, num_views=3, force_terminal=True)
    assert "server unreachable, asking again: refused" in text
    assert text.rindex("waiting for traffic") > text.index("refused")


def test_the_view_ends_when_no_server_was_ever_there():
    """Catches `dvi top` on a mistyped address that asks for ever."""
    with pytest.raises(OSError, match=r"^no server answers at http://127\.0\.0\.1:1: .*refused"):
        shown(fetch_from("http://127.0.0.1:1"), force_terminal=True)


def test_the_view_ends_when_a_server_stays_away():
    """Catches a view of a server that was stopped hours ago, and an end that does not say for how long."""
    answers = iter([dashboard.status(engine_loop())])

    def fetch() -> dict:
        for answer in answers:
            return answer
        raise ConnectionResetError("reset")

    with pytest.raises(OSError, match=r"^lost the server, its last answer is \d+ s old: reset$"):
        show(fetch, console=Console(file=io.StringIO(), force_terminal=True), refresh_s=0.0, patience_s=0.0)


def test_top_sends_its_key_and_says_what_is_wrong_without_one():
    """Catches a key that is not sent, and a refusal that looks like a dead server."""
    loop = engine_loop()
    with served(loop, authorizations={"Bearer secret"}) as url:
        assert fetch_from(url + "/", "secret")()["state"]["text"] == "waiting for traffic"
        with pytest.raises(ValueError, match="DVI_API_KEY"):
            fetch_from(url)()
    with pytest.raises(OSError):
        fetch_from(url, "secret")()


def test_top_keeps_its_key_to_itself_when_it_is_sent_elsewhere():
    """Catches a key that follows a redirect to another server."""
    app, seen = fastapi.FastAPI(), []

    @app.get("/dashboard/data")
    def redirect() -> fastapi.Response:
        return fastapi.responses.RedirectResponse("/elsewhere")

    @app.get("/elsewhere")
    def elsewhere(request: fastapi.Request) -> dict:
        seen.append(request.headers.get("authorization"))
        return {}

    with running(app) as url:
        fetch_from(url, "secret")()
    assert seen == [None]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8000", "ftp://host"])
def test_top_takes_only_web_addresses(url):
    """Catches urllib's readiness to open files."""
    with pytest.raises(ValueError, match="http://"):
        fetch_from(url)
