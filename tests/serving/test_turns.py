"""One thread for several tenants: turns, bounds, and work that nobody waits for any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading

import pytest

from dvi.serving.api_schema import ChatBody, CompletionBody
from dvi.serving.prompts import PromptEncoder
from dvi.serving.request import Draining, QueueFull, RequestOutput
from dvi.serving.turns import Turns, who_gives_way
from tests.support.serving_doubles import FakeLoop, bare_engine, client_of, listening, stories_config, stories_loop


@pytest.fixture(scope="module")
def engine():
    with stories_loop(stories_config()) as loop:
        yield bare_engine(loop)


@contextlib.asynccontextmanager
async def held_turns(*, max_waiting=100):
    """Turns whose thread is at work until `release` is set, and what it has done since then."""
    turns, release, begun, done = Turns("work", max_waiting=max_waiting), threading.Event(), threading.Event(), []
    first = asyncio.create_task(turns.run("first", lambda: (begun.set(), release.wait(10))))
    while not begun.is_set():
        await asyncio.sleep(0)
    yield turns, release, done
    release.set()
    await first


def test_whoever_holds_most_gives_way_and_the_newcomer_where_nobody_holds_more():
    """Catches a rule by which many small requests push out one, or two tenants displace each other for ever."""
    assert who_gives_way({"a": 5, "b": 1}, "b") == "a"
    assert who_gives_way({"a": 5, "b": 1}, "a") == "a"
    assert who_gives_way({"a": 3, "b": 2}, "b") == "b" and who_gives_way({"a": 3, "b": 2}, "c") == "a"
    assert who_gives_way({"a": 3}, "b", num_new=3) == "b" and who_gives_way({}, "a") == "a"


def test_each_tenant_gets_its_turn_whatever_another_has_queued():
    """Catches one client's long prompts that all others wait for."""

    async def scenario():
        async with held_turns() as (turns, release, done):
            work = [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5), ("c", 6)]
            tasks = [asyncio.create_task(turns.run(who, lambda n=number: done.append(n))) for who, number in work]
            await asyncio.sleep(0)
            release.set()
            await asyncio.gather(*tasks)
            assert done == [1, 4, 6, 2, 5, 3]

    asyncio.run(scenario())


def test_a_full_queue_refuses_the_newest_of_whoever_has_most_in_it():
    """Catches a queue without end, and one that a single tenant fills for all."""

    async def scenario():
        async with held_turns(max_waiting=3) as (turns, release, done):
            greedy = [asyncio.create_task(turns.run("a", lambda n=n: done.append(n))) for n in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await turns.run("a", lambda: done.append("too many"))
            modest = asyncio.create_task(turns.run("b", lambda: done.append("b")))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await greedy[2]
            release.set()
            await asyncio.gather(*greedy[:2], modest)
            assert done == [0, "b", 1]

    asyncio.run(scenario())


def test_work_that_nobody_waits_for_is_not_done():
    """Catches jobs that outlive their clients, and a stop that waits for them."""

    async def scenario():
        async with held_turns() as (turns, release, done):
            left, stays = (asyncio.create_task(turns.run("a", lambda n=n: done.append(n))) for n in ("left", "stays"))
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.sleep(0)
            turns.close()
            with pytest.raises(Draining):
                await stays
            with pytest.raises(Draining):
                await turns.run("a", lambda: done.append("late"))
            release.set()
            turns.join(10)
            assert done == []

    asyncio.run(scenario())


def test_what_the_work_raises_is_raised_and_the_thread_goes_on():
    """Catches a prompt that cannot be read and ends the reading of all others."""

    async def scenario():
        turns = Turns("work", max_waiting=1)
        with pytest.raises(ZeroDivisionError):
            await turns.run("a", lambda: 1 // 0)
        assert await turns.run("a", lambda: 7) == 7
        turns.close()

    asyncio.run(scenario())


# In the server


class Gate:
    """Holds the tokenising thread up until it is opened, and notes what it is asked to encode."""

    def __init__(self, monkeypatch) -> None:
        self.is_open, self.has_begun, self.seen = threading.Event(), threading.Event(), []
        encode = PromptEncoder.encode

        def held(encoder, prompt):
            self.seen.append(prompt)
            self.has_begun.set()
            assert self.is_open.wait(10)
            return encode(encoder, prompt)

        monkeypatch.setattr(PromptEncoder, "encode", held)


def test_prompts_of_a_client_who_has_left_are_not_tokenised(engine, monkeypatch):
    """Catches a queue of work for clients that have hung up, for which those that are there wait."""
    gate, double = Gate(monkeypatch), FakeLoop(engine)
    with listening(double, stories_config()) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        body = json.dumps({"prompt": ["one", "two", "three"], "max_tokens": 1}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(request)
            assert gate.has_begun.wait(10)
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(request.replace(b"one", b"ONE"))
            gate.is_open.set()
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert gate.seen == ["one", "ONE", "two", "three"] and len(double.requests) == 3


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "chat/completions"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]}, "chat/completions"),
        ({"prompt": [1] * 5000}, "completions"), ({"prompt": [[1] * 5000]}, "completions"),
        ({"prompt": "x", "metadata": [[[[]] * 90] * 90]}, "completions"),
    ],
)  # fmt: skip
def test_a_body_of_too_many_items_is_refused_before_anything_is_made_of_them(engine, monkeypatch, field, path):
    """Catches a body within every limit of bytes and characters that takes seconds to check or to render."""
    client = client_of(FakeLoop(engine), stories_config("serve.max_prompt_tokens=100"))
    for schema in (ChatBody, CompletionBody):
        monkeypatch.setattr(schema, "model_validate", lambda _: pytest.fail("it was looked at"))
    error = client.post(f"/v1/{path}", json=field).json()["error"]
    assert error["param"] == list(field)[-1], error
    assert "at most 200 items here, got 5000" in error["message"] or "too many objects and lists" in error["message"]


def test_a_chat_of_more_messages_than_tokens_is_refused_before_it_is_rendered(engine, monkeypatch):
    """Catches empty messages, which pass every limit of characters and are rendered one by one."""
    client = client_of(FakeLoop(engine), stories_config("serve.max_prompt_tokens=100"))
    tokenizer = engine.speculator.tokenizer
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: pytest.fail("it was rendered"))
    error = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": ""}] * 101}).json()
    assert "at most 100 messages here, got 101" in error["error"]["message"]


def test_a_requests_clock_starts_at_its_arrival(engine, monkeypatch):
    """Catches time limits that begin only when the tokeniser has come to a request, and waits that no figure shows."""
    gate, double = Gate(monkeypatch), FakeLoop(engine)
    client = client_of(double, stories_config("serve.queue_timeout_s=0.05"))
    response = client.post("/v1/completions", json={"prompt": "one"})
    assert response.status_code == 504 and "still queued after 0.05 s" in response.json()["error"]["message"]
    gate.is_open.set()
    patient = client_of(double, stories_config("serve.queue_timeout_s=1000"))
    assert patient.post("/v1/completions", json={"prompt": "one", "max_tokens": 1}).status_code == 200
    assert double.requests[-1].arrived_s > 0 and double.requests[-1].timeouts.queue_s == 1000


def test_a_place_given_up_in_the_queue_is_429_with_the_time_to_come_back(engine):
    """Catches a refusal that looks like the server's fault, which clients do not try again."""
    def displaced(request):
        yield RequestOutput(request.request_id, finish_reason="displaced")

    for stream in (False, True):
        client = client_of(FakeLoop(engine, displaced))
        response = client.post("/v1/completions", json={"prompt": "one", "stream": stream})
        assert response.status_code == 429 and response.headers["retry-after"] == "3"
        assert response.json()["error"]["code"] == "queue_full"
