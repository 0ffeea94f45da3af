"""The names of models: which are accepted, which listed, and which keys see which adapters."""

from __future__ import annotations

import hashlib

import pytest

from dvi import __version__
from dvi.config import load_config
from dvi.serving.access import Access, ApiKey
from dvi.serving.model_names import MAX_LISTED, ModelNames, last_part
from dvi.settings import ServeConfig
from tests.support.serving_doubles import STORIES, FakeLoop, bare_engine, client_of, stories_config, stories_loop

ALICE, BOB = "alice-key-0123456789", "bob-key-01234567890"


@pytest.fixture(scope="module")
def engine():
    with stories_loop(stories_config()) as loop:
        engine = bare_engine(loop)
        engine.drafters |= {"maths": engine.drafters["default"], "code": engine.drafters["default"]}
        yield engine


def asked(client, model, **headers):
    return client.post("/v1/completions", json={"prompt": "Once", "model": model, "max_tokens": 1}, headers=headers)


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_the_served_name_the_path_and_every_listed_id_are_accepted(engine):
    """Catches clients that must know which part of a path a server goes by."""
    double = FakeLoop(engine)
    client = client_of(double, stories_config("serve.model_name=our/model:1"))
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["our/model:1", "our/model:1:code", "our/model:1:maths"]
    for name in (*listed, STORIES, f"{STORIES}:maths", None):
        response = asked(client, name)
        assert response.status_code == 200, name
        assert response.json()["model"] == (name or "our/model:1")
    assert [request.draft.drafter for request in double.requests] == [
        "default", "code", "maths", "default", "maths", "default",
    ]  # fmt: skip


def test_each_listed_id_has_an_address_of_its_own(engine):
    """Catches ids with slashes or colons that cannot be asked for."""
    client = client_of(FakeLoop(engine), stories_config("serve.model_name=our/model"))
    for model in client.get("/v1/models").json()["data"]:
        assert client.get(f"/v1/models/{model['id']}").json() == model
    assert client.get("/v1/models/our%2Fmodel").json()["root"] == STORIES
    assert client.get("/v1/models/our/model:maths").json()["parent"] == "our/model"
    error = client.get("/v1/models/gpt-4").json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "name", ["gpt-4", "stories260k:", "stories260k:none", "stories260k:default", ":maths", "stories"]
)
def test_an_unknown_name_is_told_the_names_there_are(engine, name):
    """Catches a 404 that leaves its reader to guess."""
    error = asked(client_of(FakeLoop(engine)), name).json()["error"]
    assert error["code"] == "model_not_found" and error["type"] == "not_found_error"
    assert "there are stories260k, stories260k:code, stories260k:maths" in error["message"]


def test_a_long_list_of_names_does_not_fill_the_message():
    """Catches an error message of a thousand adapters."""
    adapters = {f"adapter-{number:04}" for number in range(1000)}
    with pytest.raises(ValueError, match=f"and {1001 - MAX_LISTED} more, see GET /v1/models") as caught:
        ModelNames("m", "folder/m").find("x" * 10_000, adapters)
    assert len(str(caught.value)) < 1000


def test_a_model_without_a_name_goes_by_the_last_part_of_its_path(tmp_path, monkeypatch):
    """Catches an empty name for `model.path=.`."""
    monkeypatch.chdir(tmp_path)
    assert last_part("org/model") == last_part("model/") == "model" and last_part(".") == tmp_path.name
    with pytest.raises(ValueError, match=r"serve\.model_name"):
        load_config(None, ["serve.model_name=''"], schema=ServeConfig)


def test_a_key_sees_and_uses_its_own_adapters_alone(engine):
    """Catches an adapter of one customer that drafts for another, or whose name is shown to him."""
    access = Access((
        ApiKey("alice", hashlib.sha256(ALICE.encode()).digest(), adapters=frozenset({"maths", "absent"})),
        ApiKey("bob", hashlib.sha256(BOB.encode()).digest()),
    ))  # fmt: skip
    client = client_of(FakeLoop(engine), access=access)
    listed = {
        secret: [m["id"] for m in client.get("/v1/models", headers=bearer(secret)).json()["data"]]
        for secret in (ALICE, BOB)
    }
    assert listed[ALICE] == ["stories260k", "stories260k:maths"] and len(listed[BOB]) == 3
    assert asked(client, "stories260k:maths", **bearer(ALICE)).status_code == 200
    assert asked(client, "stories260k:code", **bearer(BOB)).status_code == 200
    refused = asked(client, "stories260k:code", **bearer(ALICE))
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].endswith("there are stories260k, stories260k:maths")
    assert client.get("/v1/models/stories260k:code", headers=bearer(ALICE)).status_code == 404
    # What a front door says of a key can only take away.
    named = bearer(ALICE) | {"X-DVI-Adapters": "maths, code"}
    assert asked(client, "stories260k:code", **named).status_code == 404
    assert asked(client, "stories260k:code", **bearer(BOB), **{"X-DVI-Adapters": "maths"}).status_code == 404


def test_head_answers_as_get_does_and_without_a_body(engine):
    """Catches load balancers that probe with HEAD and take a well server for a broken one."""
    client = client_of(FakeLoop(engine))
    for path in ("/health", "/v1/models", "/metrics", "/dashboard", "/version", "/v1/models/stories260k"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/v1/completions").status_code == 405 and client.head("/nowhere").status_code == 404


def test_the_version_is_told(engine):
    """Catches a server that nobody can tell the version of."""
    assert client_of(FakeLoop(engine)).get("/version").json() == {"version": __version__}
