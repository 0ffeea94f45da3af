"""Servers for tests: the real loop on a tiny real model, and an honest fake for what needs control."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from concurrent.futures import Future
from types import SimpleNamespace

from starlette.testclient import TestClient

from dvi.config import load_config
from dvi.decode.construction import build_speculator
from dvi.planning.controller import build_controller
from dvi.records import DrafterVersion, RoundStats
from dvi.serving.access import Access
from dvi.serving.http_api import build_app
from dvi.serving.loop import EngineLoop
from dvi.serving.metrics.monitor import Monitor
from dvi.serving.request import Draining, Request, RequestOutput
from dvi.serving.server import Server, build_loop
from dvi.serving.sockets import open_socket, url_of
from dvi.settings import ServeConfig
from tests.support import paths

STORIES = str(paths.STORIES)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VERSION = DrafterVersion(
    version=3, created_s=0.0, source="rollback", step=9, canary_score=None, is_live=True, is_kept=True
)


def stories_config(*overrides: str) -> ServeConfig:
    """A frozen server of the tiny model; a fixed draft length, because measuring costs takes seconds."""
    return load_config(
        None,
        [f"model.path={STORIES}", "drafter.draft_vocab_size=0", "drafter.anchor_hidden=16", "train.enabled=false",
         "draft.policy=fixed", "serve.port=0", *overrides],
        schema=ServeConfig,
    )  # fmt: skip


@contextlib.contextmanager
def stories_loop(config: ServeConfig):
    """A started loop; its tokenizer has a chat template, which the model comes without."""
    speculator = build_speculator(config)
    speculator.tokenizer.chat_template = CHAT_TEMPLATE
    loop = build_loop(config, speculator, None)
    if config.serve.has_bound:
        loop.planner = build_controller(config, loop)
    loop.start()
    try:
        yield loop
    finally:
        loop.stop(drain_s=0.0)


@contextlib.contextmanager
def listening(loop, config: ServeConfig, access: Access | None = None):
    """The server's URL, behind a real socket. The loop's life is its owner's."""
    with open_socket("127.0.0.1", 0) as listener:
        server = Server(config, loop, access or Access())
        is_listening = threading.Event()
        server.on_listening = is_listening.set
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            assert is_listening.wait(10)
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join(10)


def client_of(loop, config: ServeConfig | None = None, access: Access | None = None, **options) -> TestClient:
    """An in-process client with this machine's name in its Host header."""
    app = build_app(loop, config or stories_config(), access or Access())
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False, **options)


class FakeLoop:
    """The face of EngineLoop over no model: keeps what it is given, and answers as `script` says.

    script(request) yields the news to deliver; what it raises is raised by submit. Requests without an end wait for
    `cancel`. Administration succeeds, unless `refusal` holds an exception for it.
    """

    def __init__(self, engine, script=None) -> None:
        self.engine, self.learner, self.learner_error = engine, None, None
        self.monitor = Monitor()
        self.is_alive, self.is_draining, self.is_pinned = True, False, False
        self.admin = self  # its Administration too
        self.refusal: Exception | None = None
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.calls: list[tuple] = []
        self._script = script or echo
        self._open = {}
        self._ids = itertools.count(1)

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, requests, on_output) -> None:
        if self.is_draining:
            raise Draining("the server is stopping and takes no more requests")
        news = [output for request in requests for output in self._script(request)]
        self.requests += requests
        self._open |= {request.request_id: on_output for request in requests}
        # From a thread of its own, as the real loop's news come.
        threading.Thread(target=lambda: [self._deliver(output) for output in news]).start()

    def cancel(self, request_ids) -> None:
        self.cancelled += request_ids
        for request_id in request_ids:
            self._deliver(RequestOutput(request_id, finish_reason="cancelled"))

    def _deliver(self, output: RequestOutput) -> None:
        on_output = self._open.get(output.request_id)
        if output.finish_reason is not None:
            self._open.pop(output.request_id, None)
        if on_output is not None:
            on_output(output)

    def stop(self, *, drain_s: float) -> None:
        self.is_draining = True

    def call(self, action) -> Future:
        return self._done("call", action())

    def versions(self) -> Future:
        return self._done("versions", [VERSION])

    def rollback(self, version) -> Future:
        return self._done("rollback", VERSION, version)

    def pin(self, version) -> Future:
        return self._done("pin", VERSION, version)

    def unpin(self) -> Future:
        return self._done("unpin", None)

    def forget(self, tenant) -> Future:
        return self._done("forget", 7, tenant)

    def load_adapter(self, name, folder) -> Future:
        return self._done("load", None, name, folder)

    def unload_adapter(self, name) -> Future:
        return self._done("unload", None, name)

    def save_adapter(self, folder) -> Future:
        return self._done("save", None, folder)

    def _done(self, kind, result, *arguments) -> Future:
        self.calls.append((kind, *arguments))
        future = Future()
        if self.refusal is None:
            future.set_result(result)
        else:
            future.set_exception(self.refusal)
        return future


def echo(request: Request):
    """One token, and the end."""
    yield RequestOutput(request.request_id, text="yes", token_ids=[5])
    stats = RoundStats(num_rounds=1, new_tokens=1, committed_tokens=1)
    yield RequestOutput(request.request_id, finish_reason="length", stats=stats)


def bare_engine(loop: EngineLoop) -> SimpleNamespace:
    """What the door looks at of an engine, without the engine."""
    engine = loop.engine
    return SimpleNamespace(
        speculator=engine.speculator, drafters=dict(engine.drafters),
        scheduler=SimpleNamespace(limits=engine.scheduler.limits, retry_after_s=3.0),
    )
