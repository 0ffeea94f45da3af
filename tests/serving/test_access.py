"""Keys and names: who gets in, who may administer, and which names may become folders."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import logging
import os
import re

import pytest

from dvi.serving.access import Access, ApiKey, adapter_folder, check_name, load_access
from tests.support.serving_doubles import FakeLoop, bare_engine, client_of, stories_config, stories_loop

ALICE, ADMIN = "alice-key-0123456789", "admin-key-0123456789"


def key(name, secret, **rights):
    return ApiKey(name, hashlib.sha256(secret.encode()).digest(), **rights)


ACTIONS = {
    "versions", "rollback", "pin", "unpin", "plan", "adapters", "adapters/x", "save", "forget", "checkpoint",
}  # fmt: skip
ACCESS = Access((key("alice", ALICE), key("root", ADMIN, is_admin=True)))


@pytest.fixture(scope="module")
def engine():
    with stories_loop(stories_config()) as loop:
        yield bare_engine(loop)


@pytest.fixture
def fake(engine):
    return FakeLoop(engine)


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def keys_file(folder, text, mode=0o600):
    path = folder / "keys.yaml"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


# Keys


def test_keys_come_from_a_file_with_their_rights(tmp_path):
    """Catches rights that are mixed up, and a digest that is hashed again."""
    digest = hashlib.sha256(ADMIN.encode()).hexdigest()
    text = f"- {{name: alice, key: {ALICE}, train: false}}\n- {{name: root, key_sha256: {digest}, admin: true}}\n"
    access = load_access(keys_file(tmp_path, text), environment={"DVI_API_KEY": "x" * 20})
    assert access.keys == (key("alice", ALICE, may_train=False), key("root", ADMIN, is_admin=True))
    text = f"- {{name: alice, key: {ALICE}, adapters: [maths, code]}}\n- {{name: root, key: {ADMIN}, adapters: []}}\n"
    alice, root = load_access(keys_file(tmp_path, text)).keys
    assert alice.may_use("maths") and not alice.may_use("other") and not root.may_use("maths")
    json_text = f'[{{"name": "alice", "key": "{ALICE}"}}]'
    assert load_access(keys_file(tmp_path, json_text)).keys == (key("alice", ALICE),)


def test_keys_come_from_the_environment_where_there_is_no_file():
    """Catches an admin variable that gives no admin rights, and an API key that does."""
    access = load_access(None, {"DVI_API_KEY": ALICE, "DVI_ADMIN_KEY": ADMIN})
    assert access.keys == (key("default", ALICE), key("admin", ADMIN, is_admin=True))
    assert load_access(None, {}).is_open


def test_a_file_that_others_can_read_is_warned_about(tmp_path, caplog):
    """Catches keys that every user of the machine can read, unnoticed."""
    text = f"- {{name: alice, key: {ALICE}}}"
    with caplog.at_level(logging.WARNING):
        load_access(keys_file(tmp_path, text))
        assert not caplog.records
        load_access(keys_file(tmp_path, text, mode=0o640))
    assert "chmod 600" in caplog.text and ALICE not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "alice", "- alice", "- {name: alice}", f"- {{key: {ALICE}}}", "- {name: alice, key: short}",
        f"- {{name: alice, key: {ALICE}, key_sha256: {'0' * 64}}}", "- {name: alice, key_sha256: abc}",
        f"- {{name: alice, key: {ALICE}, admin: 1}}", f"- {{name: alice, key: {ALICE}, train: 'no'}}",
        f"- {{name: ../alice, key: {ALICE}}}", f"- {{name: 7, key: {ALICE}}}",
        "- {name: alice, key: 12345678901234567890}", f"- {{name: alice, key: {ALICE}, rights: all}}",
        f"- {{name: a, key: {ALICE}}}\n- {{name: b, key: {ALICE}}}",
        f"- {{name: a, key: {ALICE}}}\n- {{name: a, key: {ADMIN}}}", f"- {{name: a, key: {ALICE}",
        "- {name: a, key: ''}", f"- {{name: alice, key: {ALICE}, adapters: all}}",
        f"- {{name: alice, key: {ALICE}, adapters: [../x]}}", f"- {{name: alice, key: {ALICE}, adapters: [1]}}",
 "- !!python/object/apply:os.getcwd []",
    ],
)  # fmt: skip
def test_a_keys_file_that_is_not_understood_is_refused_without_quoting_it(tmp_path, text):
    """Catches a server that starts open, or with other rights than meant, and keys in error messages."""
    with pytest.raises(ValueError) as caught:
        load_access(keys_file(tmp_path, text))
    assert ALICE not in str(caught.value) and "keys.yaml" in str(caught.value)


@pytest.mark.parametrize("environment", [{"DVI_API_KEY": ""}, {"DVI_ADMIN_KEY": "short"}])
def test_an_empty_or_short_key_in_the_environment_is_refused(environment):
    """Catches a server that is open because a variable was empty."""
    with pytest.raises(ValueError, match="at least 16"):
        load_access(None, environment)
    with pytest.raises(ValueError, match=r"readable file, got .*absent"):
        load_access("absent.yaml")


def test_a_key_is_known_by_bearer_and_by_basic_and_by_nothing_else():
    """Catches a header that is nearly right and lets in, or that is right and does not."""
    basic = base64.b64encode(f"anyone:{ALICE}".encode()).decode()
    for header in (f"Bearer {ALICE}", f"bearer  {ALICE} ", f"Basic {basic}"):
        assert ACCESS.identify(header).name == "alice", header
    wrong = base64.b64encode(f"{ALICE}:x".encode()).decode()
    for header in (
        None, "", "Bearer", "Bearer ", ALICE, f"Token {ALICE}", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x", "Basic !!!",
        f"Basic {wrong}", "Basic ", f"Bearer {ALICE.upper()}", f"Bearer {ACCESS.keys[0].digest.hex()}", "Bearer \udcff",
    ):  # fmt: skip
        assert ACCESS.identify(header) is None, header


def test_every_key_is_compared_in_constant_time(monkeypatch):
    """Catches ==, which tells by its time how much of a key is right, and a loop that stops at the first match."""
    compared = []

    def compare(left, right):
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for secret in (ALICE, ADMIN, "neither"):
        compared.clear()
        ACCESS.identify(f"Bearer {secret}")
        assert compared == [(known.digest, hashlib.sha256(secret.encode()).digest()) for known in ACCESS.keys]


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "", "128.0.0.1", "localhost.example.org"]
)
def test_without_keys_only_this_machine_is_served(host):
    """Catches a model, and an administration, open to the whole network."""
    with pytest.raises(ValueError, match="no API key"):
        Access().check_host(host)
    ACCESS.check_host(host)
    for own in ("127.0.0.1", "127.8.9.1", "localhost", "::1"):
        Access().check_host(own)


# Routes


def routes_of(app):
    """(method, path) of every route, with a value for each parameter."""
    routes = [(method, re.sub(r"\{[^}]*\}", "x", r.path)) for r in all_routes(app.routes) for method in r.methods]
    return [*routes, *(("HEAD", path) for method, path in routes if method == "GET")]


def all_routes(routes):
    for route in routes:
        if hasattr(route, "methods"):
            yield route
        else:
            yield from all_routes(route.routes if hasattr(route, "routes") else route.original_router.routes)


def test_every_route_but_health_needs_a_key(fake):
    """Catches a new route that nobody thought of locking: it fails here until it answers 401."""
    client = client_of(fake, access=ACCESS)
    routes = routes_of(client.app)
    assert {path for _, path in routes} == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/x", "/version", "/health", "/metrics",
        "/dashboard", "/dashboard/data", *(f"/admin/{action}" for action in ACTIONS),
    }, "a new route takes a place in this list, and in docs/serving.md"  # fmt: skip
    for (method, path), headers in itertools.product(
        [*routes, ("GET", "/nowhere"), ("GET", "//health"), ("GET", "/health/"), ("POST", "/HEALTH"), ("GET", "/")],
        ({}, bearer("wrong-key-0123456789"), {"Authorization": "Basic Og=="}),
    ):
        response = client.request(method, path, headers=headers, json={})
        if path == "/health":
            assert response.status_code == 200
        else:
            assert response.status_code == 401, (method, path)
            if method == "HEAD":
                assert response.content == b""
                continue
            assert response.json()["error"]["type"] == "authentication_error" and "www-authenticate" in response.headers
    assert fake.calls == fake.requests == []


def test_a_browser_is_asked_for_a_password_at_the_dashboard_alone(fake):
    """Catches a dashboard that no browser can open, and pages that make browsers ask elsewhere."""
    client = client_of(fake, access=ACCESS)
    assert client.get("/dashboard").headers["www-authenticate"].startswith("Basic")
    assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
    assert client.get("/dashboard", auth=("", ALICE)).status_code == 200


def test_admin_routes_need_an_admin_key(fake):
    """Catches an API key that can roll back, and an admin key that cannot ask the model."""
    client = client_of(fake, access=ACCESS)
    for method, path in routes_of(client.app):
        if path.startswith("/admin"):
            response = client.request(method, path, headers=bearer(ALICE), json={"name": "x"})
            assert response.status_code == 403, path
            assert method == "HEAD" or "admin key" in response.json()["error"]["message"], path
    assert fake.calls == []
    assert client.post("/admin/unpin", headers=bearer(ADMIN), json={}).status_code == 200
    assert client.get("/v1/models", headers=bearer(ADMIN)).status_code == 200


def test_without_an_admin_key_nobody_administers_and_the_answer_says_how_to(fake):
    """Catches administration that falls to every API key because no admin key was set."""
    client = client_of(fake, access=Access((key("alice", ALICE),)))
    response = client.get("/admin/versions", headers=bearer(ALICE))
    assert response.status_code == 403 and "DVI_ADMIN_KEY" in response.json()["error"]["message"]


def test_an_open_server_answers_to_this_machines_names_alone(fake):
    """Catches a web page whose name is made to resolve to this machine, and that reads and administers as its user."""
    client = client_of(fake)
    for host, status in (
        ("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:8000", 200), ("evil.example", 403), ("", 403),
        ("127.0.0.1.evil.example:8000", 403), ("localhost.evil.example", 403), ("0.0.0.0", 403), ("[::1]", 200),
        ("[::1]evil", 403), ("[::1]evil:80", 403), ("localhost:evil", 403), ("localhost:80:80", 403), ("[::1", 403),
        ("::1", 403), ("]localhost[", 403), ("[localhost]", 403), ("localhost:", 200),
    ):  # fmt: skip
        assert client.get("/health", headers={"Host": host}).status_code == status, host
    assert client_of(fake, access=ACCESS).get("/health", headers={"Host": "dvi.example"}).status_code == 200


def test_no_key_is_shown_anywhere(fake, caplog):
    """Catches keys in replies, metrics, figures and logs."""
    caplog.set_level(logging.DEBUG)
    client = client_of(fake, access=ACCESS)
    shown = [
        client.request(method, path, headers=bearer(secret), json={"prompt": "x", "name": "x"}).text
        for method, path in routes_of(client.app)
        for secret in (ALICE, ADMIN, "wrong-key-0123456789")
    ]
    for text in (*shown, caplog.text):
        assert not any(secret in text for secret in (ALICE, ADMIN, "wrong-key-0123456789"))
        assert ACCESS.keys[0].digest.hex() not in text


# Names


def hostile_names():
    dots, slashes = ["..", ".", "%2e%2e", "\u2024", "\uff0e\uff0e"], ["/", "\\", "%2f", "\u2215"]
    parts = [*dots, *slashes, "\0", "\n", "\r", " ", "~", "$HOME"]
    yield from parts
    yield from ("", "a" * 65, "a" * 300, "-a", "_a", ".hidden", "é", "a\0b", "a\n", "a/", "a/b", "/etc/passwd", "a..b")
    for first, second in itertools.product(parts, repeat=2):
        yield f"{first}{second}"
        yield f"a{first}{second}a" if f"{first}{second}" != ".." else ".."
    for depth in range(1, 20):
        yield "../" * depth + "etc/passwd"
        yield "..\\" * depth + "windows"


def test_names_that_could_leave_their_folder_are_refused(tmp_path):
    """Catches the many spellings of ..; some 500 of them."""
    names = set(hostile_names()) - {"a.a"}
    assert len(names) > 400
    for name in names:
        with pytest.raises(ValueError, match="must be 1 to 64"):
            check_name(name)
        with pytest.raises(ValueError):
            adapter_folder(tmp_path, name)
    for name in ("a", "A1", "my-adapter_v1.2", "0", "a" * 64):
        assert adapter_folder(tmp_path, name) == tmp_path.resolve() / name


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    """Catches an adapter that is read from, or written to, where a link leads."""
    root, outside = tmp_path / "adapters", tmp_path / "outside"
    for folder in (root, outside, root / "real"):
        folder.mkdir()
    (root / "away").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "other").symlink_to(root / "real")
    for name in ("away", "dangling", "other"):
        with pytest.raises(ValueError, match="is a link"):
            adapter_folder(root, name)
    (tmp_path / "alias").symlink_to(root)  # the operator's own choice
    assert adapter_folder(tmp_path / "alias", "real") == root / "real"


def test_no_route_opens_anything_for_a_hostile_name(fake, tmp_path):
    """Catches a route that forgets to check; the loop is never asked and nothing is made on disk."""
    client = client_of(fake, stories_config(f"serve.adapters_folder={tmp_path / 'adapters'}"))
    for name in itertools.islice(hostile_names(), 0, None, 7):
        for path in ("/admin/adapters", "/admin/save"):
            assert client.post(path, json={"name": name}).status_code == 400, name
        if name:
            assert client.post("/admin/forget", json={"key": name}).status_code == 400, name
    for name in ("..", "%2e%2e", "..%2f..%2fetc", "a%00b", "%2e%2e%2fadapters"):
        assert client.delete(f"/admin/adapters/{name}").status_code in (400, 404, 405), name
    assert fake.calls == [] and os.listdir(tmp_path) == []
    assert client.post("/admin/adapters", json={"name": "absent"}).status_code == 404
