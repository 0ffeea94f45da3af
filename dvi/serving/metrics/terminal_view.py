"""The dashboard's figures at a terminal: `dvi top`, `dvi serve --live`.

Knows the snapshot that `dvi.serving.metrics.dashboard.status` gives; measures nothing itself.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

SECONDS_PER_LINE = 10.0
TIMEOUT_S = 5.0
PATIENCE_S = 30.0  # for a server that has answered before: it may be restarting
SPARKS = "▁▂▃▄▅▆▇█"
NUM_SPARKS = 60
NUM_VERSIONS, NUM_SPLITS, NUM_EVENTS = 6, 8, 5
NONE = "-"
STYLES = {"good": "green", "warn": "yellow", "bad": "bold red"}


def fetch_from(url: str, key: str | None = None) -> Callable[[], dict]:
    """A function that asks the server at `url`, such as http://127.0.0.1:8000, for its snapshot.

    Raises ValueError for another scheme than http or https. The function raises ValueError when the server answers,
    but not with figures (a wrong key, another server), and OSError when it does not answer.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"the server's URL must begin with http:// or https://, got {url!r}; try http://127.0.0.1:8000")
    request = urllib.request.Request(url.rstrip("/") + "/dashboard/data")
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # a redirect may lead to somebody else

    def fetch() -> dict:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            text = f"the server at {url} answered {error.code} {error.reason}"
            if error.code >= 500:
                raise OSError(text) from None  # it, or a proxy before it, may come round
            raise ValueError(text + ("; set DVI_API_KEY to one of its keys" if error.code == 401 else "")) from None
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error

    return fetch


def show(
    fetch: Callable[[], dict],
    *,
    console: Console,
    refresh_s: float = 1.0,
    until: Callable[[], bool] = lambda: False,
    patience_s: float = PATIENCE_S,
) -> None:
    """Shows the newest snapshot until `until` is true: a live view on a terminal, elsewhere a line every ten seconds.

    fetch       whatever it raises ends the view and is passed on, but for an OSError after it has answered: that is
                shown, and it is asked again ...
    patience_s  ... for so long; then it is passed on too.
    """
    ask = _Asking(fetch, patience_s)
    if not console.is_terminal:
        next_line_s = -math.inf
        while not until():
            if time.monotonic() >= next_line_s:
                next_line_s = time.monotonic() + SECONDS_PER_LINE
                console.print(_line(*ask()), soft_wrap=True)
            time.sleep(refresh_s)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not until():
            live.update(_view(*ask()), refresh=True)
            time.sleep(refresh_s)


class _Asking:
    """A call gives the snapshot, or why there is none; raises where there never was one, or not for too long."""

    def __init__(self, fetch: Callable[[], dict], patience_s: float) -> None:
        self._fetch, self._patience_s = fetch, patience_s
        self._answered_s: float | None = None

    def __call__(self) -> tuple[dict | None, str]:
        try:
            snapshot = self._fetch()
        except OSError as error:
            if self._answered_s is None:
                raise
            silent_s = time.monotonic() - self._answered_s
            if silent_s >= self._patience_s:
                raise OSError(f"lost the server, its last answer is {silent_s:.0f} s old: {error}") from error
            return None, str(error)
        self._answered_s = time.monotonic()
        return snapshot, ""


def _line(snapshot: dict | None, error: str) -> Text:
    if snapshot is None:
        return Text(f"server unreachable, asking again: {error}")
    parts = [snapshot.get("headline", "").rstrip(".")] if snapshot.get("headline") else []
    parts += [f"{name} {value}" for name, value, _ in _numbers(snapshot)]
    parts += [f"{snapshot['running']} running", f"{snapshot['waiting']} waiting"]
    parts += [f"drafter v{snapshot['drafter_version']}", snapshot["state"]["text"]]
    if snapshot["level"] == "lossy":
        parts.append(f"LOSSY ({snapshot['verify_rule']}): {_waived(snapshot)}")
    return Text(", ".join(parts))  # Text, not a string: brackets in it are no markup


def _view(snapshot: dict | None, error: str) -> RenderableType:
    if snapshot is None:
        return Text(f"server unreachable, asking again: {error}", style="bold red")
    heading = Text.assemble(
        ("dvi ", "bold"), (snapshot["state"]["text"], STYLES[snapshot["state"]["level"]]),
        f"  drafter v{snapshot['drafter_version']}, up {snapshot['uptime_s']:.0f} s",
    )  # fmt: skip
    numbers = Columns(
        [Panel(Text.assemble((now, "bold"), "\n", (f"{start} since start", "dim")), title=name)
         for name, now, start in _numbers(snapshot)],
        equal=True, expand=True,
    )  # fmt: skip
    opening = Text(snapshot.get("headline", ""), style="bold")
    blocks = [opening, heading, numbers, _sparkline(snapshot), _facts(snapshot)]
    if snapshot["level"] == "lossy":
        text = f"LOSSY: verify rule {snapshot['verify_rule']}, {_waived(snapshot)}"
        blocks.insert(2, Text(text, style=STYLES["warn"]))
    for name in ("domains", "tenants"):
        if any(split["name"] for split in snapshot[name]):
            blocks.append(_splits(name, snapshot[name]))
    blocks.append(_versions(snapshot["versions"]))
    for event in reversed(snapshot["events"][-NUM_EVENTS:]):
        version = "" if event["version"] is None else f" v{event['version']}"
        blocks.append(Text(f"{_clock(event['time_s'])} {event['kind']}{version} {event['text']}", style="dim"))
    return Group(*blocks)


def _numbers(snapshot: dict) -> list[tuple[str, str, str]]:
    """(name, now, since the start) of the four figures that matter most."""
    newest, total = snapshot["newest"], snapshot["total"]
    forms = {
        "acceptance": ("acceptance", _percent), "mean_accepted_tokens": ("MAT", "{:.2f}".format),
        "speed_up": ("x plain (estimate)", "{:.2f}".format), "tokens_per_s": ("tokens/s", "{:.0f}".format),
    }  # fmt: skip
    return [(name, _or_none(newest[key], form), _or_none(total[key], form)) for key, (name, form) in forms.items()]


def _waived(snapshot: dict) -> str:
    """How much of what was accepted is not the verifier's own choice."""
    total = snapshot["total"]
    return f"{total['num_waived']} of {total['num_accepted']} accepted tokens waived"


def _sparkline(snapshot: dict) -> Text:
    """Acceptance over the newest minutes, from 0 to 1; a blank where nothing was drafted."""
    shares = snapshot["recent"].get("acceptance", [])[-NUM_SPARKS:]
    sparks = (" " if share is None else SPARKS[min(int(share * len(SPARKS)), len(SPARKS) - 1)] for share in shares)
    return Text.assemble(("acceptance ", "dim"), "".join(sparks))


def _facts(snapshot: dict) -> Table:
    table = Table.grid(padding=(0, 2))
    newest, total, update = snapshot["newest"], snapshot["total"], snapshot["update"]
    learner = snapshot["learner"]
    table.add_row("queue", f"{snapshot['running']} running, {snapshot['waiting']} waiting")
    table.add_row(
        "latency", f"first token {_milliseconds(newest['first_token_p50_s'])} / "
        f"{_milliseconds(newest['first_token_p99_s'])}, per token {_milliseconds(newest['per_token_p50_s'])} / "
        f"{_milliseconds(newest['per_token_p99_s'])} (median / 99 %)",
    )  # fmt: skip
    table.add_row("refused", Text(", ".join(f"{k} {n}" for k, n in snapshot["rejected"].items()) or "none"))
    if update:
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in newest["losses"].items()) or NONE
        table.add_row("learning", Text(
            f"{update['phase']} step {update['step']}, {total['num_skipped']} skipped, {total['num_rollbacks']} "
            f"rollbacks, {_or_none(newest['train_share'], _percent)} of time"
        ))  # fmt: skip
        table.add_row("losses", Text(losses))
    if "replay_positions" in learner:
        table.add_row("buffer", f"{learner['replay_positions']:.0f} of {learner['replay_capacity']:.0f} positions")
    return table


def _splits(title: str, splits: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("", "tokens", "MAT", "newest", "since start"):
        table.add_column(heading, justify="right" if heading else "left")
    for split in sorted(splits, key=lambda split: -split["num_tokens"])[:NUM_SPLITS]:
        table.add_row(
            Text(split["name"] or "(none)"), str(split["num_tokens"]),
            _or_none(split["mean_accepted_tokens"], "{:.2f}".format), _or_none(split["newest_acceptance"], _percent),
            _or_none(split["acceptance"], _percent),
        )  # fmt: skip
    return table


def _versions(versions: list[dict]) -> Table:
    table = Table(title="drafter versions", title_justify="left", box=None)
    for heading in ("", "since", "came by", "drafted", "acceptance"):
        table.add_column(heading, justify="right" if heading in ("drafted", "acceptance") else "left")
    for one in reversed(versions[-NUM_VERSIONS:]):
        table.add_row(
            f"v{one['version']}", _clock(one["time_s"]), one["source"] or "start", str(one["num_drafted"]),
            _or_none(one["acceptance"], _percent),
        )  # fmt: skip
    return table


def _or_none(value: float | None, form: Callable[[float], str]) -> str:
    return NONE if value is None else form(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _milliseconds(seconds: float | None) -> str:
    return _or_none(seconds, lambda s: f"{1000 * s:.0f} ms" if s >= 0.01 else f"{1000 * s:.1f} ms")


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))
