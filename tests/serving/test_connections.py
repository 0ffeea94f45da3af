"""Many connections: whoever says nothing holds no place that others need, and nobody fills descriptors or logs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import socket
import threading

import pytest

from dvi.records import RoundStats
from dvi.serving import connections
from dvi.serving.connections import RESERVED, SPARE, SeldomTwice, affordable_connections
from dvi.serving.request import RequestOutput
from tests.support.serving_doubles import FakeLoop, bare_engine, listening, stories_config, stories_loop

GET = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def engine():
    with stories_loop(stories_config()) as loop:
        yield bare_engine(loop)


@contextlib.contextmanager
def served(engine, *overrides, script=None):
    """(the loop's double, a function that connects) of a server behind a real socket."""
    with contextlib.ExitStack() as opened:
        double = FakeLoop(engine, script)
        url = opened.enter_context(listening(double, stories_config(*overrides)))
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        yield double, lambda: opened.enter_context(socket.create_connection(address, timeout=10))


def answer(connection, request=GET % b"/health"):
    """Header and body; of a stream the header alone, and what came with it."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    if length := re.search(rb"content-length: (\d+)", head):
        while len(body) < int(length[1]):
            body += connection.recv(65536)
    return head + body


def post(body):
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def test_silent_connections_give_way_to_one_that_asks(engine):
    """Catches a server that anybody can close to all others by connecting and saying nothing."""
    with served(engine, "serve.max_connections=4") as (double, connect):
        silent = [connect() for _ in range(12)]
        assert answer(connect(), post({"prompt": "Once", "max_tokens": 1})).startswith(b"HTTP/1.1 200")
        assert answer(connect()).startswith(b"HTTP/1.1 200") and len(double.requests) == 1
        assert silent[0].recv(1) == b""  # the first to come was the first to go
        assert answer(silent[-1]).startswith(b"HTTP/1.1 200")


def test_where_all_places_are_busy_others_are_told_and_health_is_answered(engine):
    """Catches a full server that looks dead, and one that lets in more than its limit."""

    def one_token(request):
        yield RequestOutput(request.request_id, text="a", token_ids=[5])

    with served(engine, "serve.max_connections=2", script=one_token) as (double, connect):
        streams = [connect() for _ in range(2)]
        for stream in streams:
            assert b"200 OK" in answer(stream, post({"prompt": "Once", "stream": True}))
        refused = answer(connect(), GET % b"/v1/models")
        assert refused.startswith(b"HTTP/1.1 503") and b"too_many_connections" in refused
        assert b"retry-after: 1" in refused.lower()
        assert answer(connect()).startswith(b"HTTP/1.1 200")
        for request in double.requests:
            double._deliver(RequestOutput(request.request_id, finish_reason="stop", stats=RoundStats()))


def test_busy_connections_stay_and_the_number_beyond_the_limit_is_bounded(engine):
    """Catches newcomers that push out answers, and descriptors without end while all places are busy."""

    def one_token(request):
        yield RequestOutput(request.request_id, text="a", token_ids=[5])

    with served(engine, "serve.max_connections=1", script=one_token) as (double, connect):
        stream = connect()
        assert b"200 OK" in answer(stream, post({"prompt": "Once", "stream": True}))
        others = [connect() for _ in range(SPARE + 5)]
        assert answer(others[-1]).startswith(b"HTTP/1.1 200")
        assert others[0].recv(1) == b""
        double._deliver(
            RequestOutput(double.requests[0].request_id, text="end", finish_reason="stop", stats=RoundStats())
        )
        received = b""
        while b"[DONE]" not in received:
            received += stream.recv(65536)


def test_a_header_that_does_not_come_or_does_not_end_closes_its_connection(engine, monkeypatch):
    """Catches clients that hold a place for ever: at first, and after an answer, byte by byte."""
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.05)
    with served(engine) as (_, connect):
        assert connect().recv(1) == b""
        monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 60)
        slow = connect()
        assert answer(slow).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.05)
        slow.sendall(b"GET /health HT")
        assert slow.recv(65536) == b""


def test_a_client_that_reads_nothing_is_left(engine, monkeypatch):
    """Catches a connection that is held for as long as a client likes, by asking and not reading."""
    monkeypatch.setattr(connections, "STALL_TIMEOUT_S", 0.05)
    drop, is_dropped = connections.Connection.drop, threading.Event()
    monkeypatch.setattr(connections.Connection, "drop", lambda self: (drop(self), is_dropped.set()))

    def much(request):
        for _ in range(200):
            yield RequestOutput(request.request_id, text="x" * 100_000, token_ids=[5])

    with served(engine, script=much) as (_, connect):
        connection = connect()
        connection.sendall(post({"prompt": "Once", "stream": True}))
        assert is_dropped.wait(10)
        received = b""
        while piece := connection.recv(1 << 20):  # what the kernel has of it
            received += piece
        assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be_and_the_rest_is_said(monkeypatch, caplog):
    """Catches a server that takes more connections than it has descriptors for, and then cannot accept, log or save."""
    asked = []
    limits = {"soft": 1024, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    assert affordable_connections(1024) == 1024 and asked == [(1024 + RESERVED, 4096)]
    assert affordable_connections(100) == 100 and len(asked) == 1
    assert not caplog.records
    limits["hard"] = 1024
    assert affordable_connections(1024) == 1024 - RESERVED
    assert "max_connections 1024" in caplog.text and "takes 768 connections" in caplog.text
    assert affordable_connections(1024, descriptors_each=2) == (1024 - RESERVED) // 2
    limits |= {"soft": resource.RLIM_INFINITY, "hard": resource.RLIM_INFINITY}
    assert affordable_connections(5000) == 5000


def test_what_strangers_provoke_is_logged_once_in_a_while():
    """Catches a log that grows by megabytes a second of one and the same line."""
    seldom = SeldomTwice()
    records = [logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, text, (), None) for text in "aab"]
    assert [seldom.filter(record) for record in records] == [True, False, True]
