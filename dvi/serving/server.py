"""The server process: a socket, an engine loop behind it, signals, and an orderly end.

Knows settings, uvicorn and the parts that it starts and stops; knows nothing of what they do. Training is whatever
learner it is given.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn

from dvi.decode.speculator import SelfSpeculator
from dvi.learner import Learner
from dvi.serving.access import Access
from dvi.serving.connections import BoundedServer, http_options
from dvi.serving.engine import Engine
from dvi.serving.http_api import build_app
from dvi.serving.loop import EngineLoop
from dvi.serving.scheduler import SchedulerLimits
from dvi.serving.sockets import KEEP_ALIVE_S, MAX_HEADER_BYTES
from dvi.serving.turns import Turns
from dvi.settings import ServeConfig
from dvi.signals import SIGNAL_BASE

FLUSH_S = 5  # for clients to read the end of what the engine has finished

log = logging.getLogger(__name__)


def leave_a_core(config: ServeConfig) -> None:
    """Keeps one core out of torch's hands, unless the settings say how many threads it may have.

    HTTP needs it. Threads of a matrix product wait for each other spinning: where they want every core, each reply
    written makes a whole round wait. Measured on two cores, four streams: one thread 202 tokens/s, two 148.
    """
    if not config.model.num_threads:
        torch.set_num_threads(max(torch.get_num_threads() - 1, 1))


def build_loop(config: ServeConfig, speculator: SelfSpeculator, learner: Learner | None) -> EngineLoop:
    """The engine loop of these settings, not started yet."""
    serve = config.serve
    limits = SchedulerLimits(
        max_rows=serve.max_rows, max_positions=serve.max_positions, max_waiting=serve.max_waiting,
        prefill_tokens_per_step=serve.prefill_tokens_per_step, rounds_per_prefill=serve.rounds_per_prefill,
    )
    engine = Engine(
        speculator, limits, prefix_positions=serve.prefix_cache_positions, wants_transitions=learner is not None
    )
    loop = EngineLoop(engine, learner=learner)
    if learner is not None:
        learner.on_event = loop.monitor.on_event
    return loop


class Server(BoundedServer):
    """uvicorn over an app and its loop. A first SIGTERM or SIGINT drains, a second one ends the process at once.

    While it drains it still listens: running answers are finished, new requests and /health get 503.

    on_listening, on_end   called once each: when clients are answered, and when it begins to drain.
    """

    def __init__(self, config: ServeConfig, loop: EngineLoop, access: Access) -> None:
        serve = config.serve
        app = build_app(loop, config, access)
        super().__init__(uvicorn.Config(
            app, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=KEEP_ALIVE_S, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=FLUSH_S, **http_options(serve.max_connections),
        ))  # fmt: skip
        self._loop, self._drain_s = loop, serve.drain_s
        self._tokenising: Turns = app.state.tokenising
        self._draining: threading.Thread | None = None
        self._has_signal = False
        self.on_listening: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        if loop.learner is not None:  # ranks end together
            loop.learner.on_end, self.on_end = self.begin_end, loop.learner.begin_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._tokenising.close()  # whoever waits there is told so, and nobody waits for work that nobody wants
        await super().shutdown(sockets)
        self._tokenising.join(FLUSH_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._has_signal:
            os._exit(SIGNAL_BASE + sig)
        self._has_signal = True
        self.begin_end()

    def begin_end(self) -> None:
        """Drains beside the event loop, which has answers to deliver meanwhile, and then ends `serve`."""
        if self._draining is not None:
            return
        self._draining = threading.Thread(target=self._drain, name="drain", daemon=True)
        self._draining.start()
        self.on_end()

    def _drain(self) -> None:
        self._loop.stop(drain_s=self._drain_s)
        self.should_exit = True


def run_server(server: Server, loop: EngineLoop, listener: socket.socket) -> None:
    """Serves until a signal has ended it, then lets the learner save. Blocks; signals need the main thread."""
    loop.start()
    try:
        server.run(sockets=[listener])
    finally:
        loop.stop(drain_s=0.0)
        if loop.learner is not None:
            loop.learner.close()
