"""The server process: its socket, its signals and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

from dvi.serving.access import Access
from dvi.serving.server import Server, run_server
from dvi.serving.sockets import open_socket, url_of
from tests.support.serving_doubles import FakeLoop, bare_engine, stories_config, stories_loop


@pytest.fixture(scope="module")
def config():
    return stories_config()


@pytest.fixture(scope="module")
def loop(config):
    with stories_loop(config) as loop:
        yield loop


def test_a_port_in_use_is_refused_before_anything_else():
    """Catches a server that loads its model and then finds out, or that shares a port in silence."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 is in use; try serve.port={port + 1}"):
            open_socket("127.0.0.1", port)
    with pytest.raises(ValueError, match="must be a name or address of this machine, got 'no host'"):
        open_socket("no host", 0)


def test_a_first_signal_drains_and_a_second_ends_the_process(loop, config, monkeypatch):
    """Catches a drain that cannot be cut short, and a first signal that cuts answers short."""
    double, may_stop, exits = FakeLoop(bare_engine(loop)), threading.Event(), []
    monkeypatch.setattr(double, "stop", lambda *, drain_s: may_stop.wait(10))
    monkeypatch.setattr(os, "_exit", exits.append)
    server = Server(config, double, Access())
    server.handle_exit(signal.SIGTERM, None)
    assert not server.should_exit and exits == []
    server.handle_exit(signal.SIGINT, None)
    assert exits == [128 + signal.SIGINT]
    may_stop.set()
    server._draining.join(10)
    assert server.should_exit


def test_running_answers_are_finished_before_the_server_ends(config):
    """Catches a stream that the server's end cuts off, and a learner that is not closed, or closed too soon."""
    with stories_loop(config) as loop, open_socket("127.0.0.1", 0) as listener:
        server, is_listening, closed = Server(config, loop, Access()), threading.Event(), []
        server.on_listening = is_listening.set
        loop.learner_error = "not asked to learn"  # the loop then leaves the learner below alone
        loop.learner = SimpleNamespace(close=lambda: closed.append(loop.is_alive))
        loop.start = lambda: None  # it runs already
        url = url_of(listener)
        thread = threading.Thread(target=run_server, args=(server, loop, listener))
        thread.start()
        assert is_listening.wait(10)
        body = json.dumps({"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as connection:
            connection.sendall(head.encode() + body)
            received = connection.recv(1000)
            server.begin_end()
            while piece := connection.recv(65536):
                received += piece
        thread.join(20)
    assert not thread.is_alive() and closed == [False]
    assert b'"finish_reason":"length"' in received and b"data: [DONE]" in received


def test_one_line_of_header_after_another_does_not_fill_the_memory(loop, config):
    """Catches a server that reads headers without end."""
    with open_socket("127.0.0.1", 0) as listener:
        server, is_listening = Server(config, FakeLoop(bare_engine(loop)), Access()), threading.Event()
        server.on_listening = is_listening.set
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        assert is_listening.wait(10)
        with socket.create_connection(listener.getsockname(), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-A: b\r\n" * 8000)
            answer = connection.recv(1000)
        server.should_exit = True
        thread.join(10)
    assert answer.startswith(b"HTTP/1.1 4")
