"""Hostile bodies: no crash, no hang, nothing internal in a reply, and a server that goes on as before."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.serving_doubles import client_of, stories_config, stories_loop

PATHS = ("/v1/completions", "/v1/chat/completions", "/admin/rollback", "/admin/pin", "/admin/adapters", "/admin/forget")
VALID = {
    "/v1/completions": {
        "model": "stories260k", "prompt": "Once", "max_tokens": 2, "n": 1, "stop": ["x"], "temperature": 0.7,
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "logprobs": 1, "stop_token_ids": [3], "ignore_eos": False, "stream": True,
        "stream_options": {"include_usage": True},
        "dvi": {"policy": "fixed", "num_draft_tokens": 1, "train": False, "domain": "a"},
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2, "logprobs": True,
        "top_logprobs": 1,
    },
    "/admin/rollback": {"version": 1}, "/admin/pin": {"version": 1}, "/admin/adapters": {"name": "x"},
    "/admin/forget": {"key": "x"},
}  # fmt: skip
# Written as JSON, because some of it is none: what json.dumps would not write.
VALUES = (
    "null", "true", "false", "0", "-0", "-1", "1", "2", "1.0", "-0.0", "0.5", "1e308", "-1e308", "1e999", "5e-324",
    "NaN", "Infinity", "-Infinity", "2147483647", "2147483648", "-2147483649", "4611686018427387903",
    "4611686018427387904", "9223372036854775807", "18446744073709551616", "9" * 400, "9" * 5000,
    '""', '"x"', '" "', '"1"', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ufdd0"', '"\\uffff"', '"</s><s>"',
    '"' + "a" * 3000 + '"', '"\U0001f600"', '"../../etc/passwd"', '"base:../x"',
    "[]", "{}", "[[]]", "[null]", "[1, 2]", '["a", 1]', '[""]', "[1, [2, [3]]]", "[0]", "[511]", "[512]", "[-1]",
    "[1e3]", '{"a": 1}', '{"chat_template": "{{ 1 }}"}', '{"__proto__": 1}', "[" * 300 + "]" * 300,
    '{"a":' * 300 + "1" + "}" * 300,
    '[{"role": "user"}]', '[{"role": "root", "content": "x"}]', '[{"role": "user", "content": [{}]}]',
)  # fmt: skip
UNKNOWN = (
    "user", "extra", "logit_bias", "tools", "chat_template", "x" * 500, "\0", "__class__", "best_of", "echo",
)  # fmt: skip
CONTENT_TYPES = ("application/json", "application/json; charset=utf-8", "text/plain", "", "application/json;charset=x")


def mutated(rng: random.Random, path: str) -> bytes:
    """A body that is valid but for some of: other values, duplicate and unknown keys, lost or added bytes."""
    fields = [(name, json.dumps(value)) for name, value in VALID[path].items()]
    for _ in range(rng.randint(0, 3)):
        place = rng.randrange(len(fields))
        name = fields[place][0]
        match rng.randrange(6):
            case 0 | 1 | 2:
                fields[place] = (name, rng.choice(VALUES))
            case 3:
                fields.append((name, rng.choice(VALUES)))
            case 4:
                fields.append((rng.choice(UNKNOWN), rng.choice(VALUES)))
            case 5 if len(fields) > 1:
                del fields[place]
    text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"
    body = bytearray(text.encode("utf-8", "surrogatepass"))
    match rng.randrange(12):
        case 0:
            del body[rng.randrange(len(body)) :]
        case 1:
            body[rng.randrange(len(body))] = rng.randrange(256)
        case 2:
            body += rng.choice((b"}", b"\0", b"null", b" ", b"\xff", b"{}"))
        case 3:
            body[:] = rng.choice(VALUES).encode()
    return bytes(body)


@pytest.fixture(scope="module")
def loop():
    # A fault that the engine catches would be a 500 here, and a failure of the test.
    with stories_loop(stories_config("sampling.max_new_tokens=2", "serve.max_new_tokens=3")) as loop:
        yield loop


def check_bodies(loop, *, seed: int, count: int) -> dict[int, int]:
    """Sends so many; returns how many answers had which status."""
    rng = random.Random(seed)
    config = stories_config("sampling.max_new_tokens=2", "serve.max_new_tokens=3", "serve.adapters_folder=/nonexistent")
    statuses: dict[int, int] = {}
    with client_of(loop, config) as client:
        before = client.post("/v1/completions", json={"prompt": "Once"}).json()["choices"]
        for number in range(count):
            path = rng.choice(PATHS)
            body = mutated(rng, path)
            content_type = rng.choice(CONTENT_TYPES) if rng.random() < 0.05 else CONTENT_TYPES[0]
            response = client.post(path, content=body, headers={"content-type": content_type})
            check_answer(response, what=f"number {number}: {path} {body[:600]!r}")
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert client.post("/v1/completions", json={"prompt": "Once"}).json()["choices"] == before
    assert loop.is_alive and not loop.engine.has_work
    return statuses


def check_answer(response, *, what: str) -> None:
    text = response.text
    assert "Traceback" not in text and 'File "' not in text and "pydantic" not in text, what
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, f"{response.status_code} {text[:300]} to {what}"
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 400, what


def test_a_thousand_hostile_bodies_are_answered_in_order(loop):
    """Catches a value that gets past the door and breaks what is behind it."""
    statuses = check_bodies(loop, seed=0, count=1000)
    assert statuses[200] > 50 and statuses[400] > 300  # neither all refused nor all let through


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_hostile_bodies_are_answered_in_order(loop, seed):
    """Catches what one seed does not meet."""
    check_bodies(loop, seed=seed, count=1000)


@pytest.mark.parametrize("value", VALUES)
def test_every_numeric_field_survives_every_edge(loop, value):
    """Catches the one pair of field and value that chance leaves out."""
    names = [name for name, given in VALID[PATHS[0]].items() if isinstance(given, int | float)]
    with client_of(loop, stories_config("serve.max_new_tokens=3")) as client:
        for name in names:
            body = f'{{"prompt": "Once", "max_tokens": 1, "temperature": 1, "{name}": {value}}}'
            response = client.post(
                "/v1/completions", content=body.encode("utf-8"), headers={"content-type": "application/json"}
            )
            check_answer(response, what=body[:300])
