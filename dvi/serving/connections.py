"""Connections to a server: how many, how long each may take to ask, and which one goes when there is no room.

Knows uvicorn's protocol, timers and counts; knows nothing of what is asked. A connection waits until the header of a
request is complete, and again after its answer. Who waits holds no place that somebody else needs: a newcomer that
finds all taken gets that of the one that has waited longest, and only where all others are busy it is told to come
back. So an address stays answerable however many connect to it and say nothing.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 10.0  # from the connection, or from a further header's first byte, to the header's end
STALL_TIMEOUT_S = 120.0  # of a client that reads nothing while there is something to read
SPARE = 16  # places beyond the limit, for newcomers who are told so, and for /health
CROWDED = "is_crowded"  # in scope["state"]: this connection is one of those beyond the limit
# At most so many are accepted before the first of them is looked at; asyncio takes as many as its backlog.
ACCEPTED_AT_ONCE = 16
LISTEN_QUEUE = 1024  # the kernel's: those wait to be accepted, and cost no descriptor
# Descriptors that are no connection of the limit: model, logs, checkpoints, sockets accepted and about to be closed.
RESERVED = 256
REPEAT_S = 60.0  # a warning of the same kind is written once in so long

log = logging.getLogger(__name__)


class Lobby:
    """The connections of one server that wait for a header, longest first. most: connections at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.waiting: dict[Connection, None] = {}


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with a place in a lobby, and with an end to every wait for its client."""

    def __init__(self, lobby: Lobby, **options: Any) -> None:
        super().__init__(**options)
        self._lobby = lobby
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        lobby = self._lobby
        if len(self.connections) > lobby.most and lobby.waiting:
            next(iter(lobby.waiting)).drop()
        num_over = len(self.connections) - lobby.most
        if num_over > SPARE:
            return self.drop()
        self.app_state = self.app_state | {CROWDED: num_over > 0}
        self._wait()
        self._await_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_busy and self._header_timer is None and not self.transport.is_closing():
            self._await_header()

    def handle_events(self) -> None:
        super().handle_events()
        if self._is_busy:
            self._leave_lobby()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_busy:  # else the next request had come already
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall_timer = _stop(self._stall_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_lobby()
        self._stall_timer = _stop(self._stall_timer)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Ends it at once, whatever it has still to say."""
        self.connections.discard(self)  # now: the next one is counted before the loop has told us that this one is lost
        self._leave_lobby()
        self.transport.abort()

    def _wait(self) -> None:
        if not self.transport.is_closing():
            self._lobby.waiting[self] = None

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.drop)

    def _leave_lobby(self) -> None:
        self._lobby.waiting.pop(self, None)
        self._header_timer = _stop(self._header_timer)


def affordable_connections(wanted: int, *, descriptors_each: int = 1) -> int:
    """How many connections this process can hold, at most `wanted`; raises its soft limit of open files as needed.

    Warns where the hard limit allows fewer.
    """
    needed = wanted * descriptors_each + RESERVED
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    affordable = max((soft - RESERVED) // descriptors_each, 1)
    log.warning(
        "max_connections %d needs %d open files and this process may have %d; it takes %d connections (ulimit -Hn)",
        wanted, needed, soft, affordable,
    )  # fmt: skip
    return affordable


class SeldomTwice(logging.Filter):
    """Lets a message pass once in REPEAT_S: what strangers can provoke must not fill a log."""

    def __init__(self) -> None:
        super().__init__()
        self._passed_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now_s = str(record.msg), time.monotonic()
        if now_s - self._passed_s.get(kind, -REPEAT_S) < REPEAT_S:
            return False
        self._passed_s = {k: s for k, s in self._passed_s.items() if now_s - s < REPEAT_S} | {kind: now_s}
        return True


def quieten_logs() -> None:
    """Has uvicorn and asyncio warn of the same thing seldom: of bad requests, and of descriptors that ran out."""
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, SeldomTwice) for known in logger.filters):
            logger.addFilter(SeldomTwice())


def http_options(max_connections: int, *, descriptors_each: int = 1) -> dict[str, Any]:
    """Settings of `uvicorn.Config` for a server of at most so many connections, or of those it has descriptors for."""
    lobby = Lobby(affordable_connections(max_connections, descriptors_each=descriptors_each))

    def connect(**options: Any) -> Connection:
        return Connection(lobby, **options)

    return {"http": connect, "backlog": ACCEPTED_AT_ONCE}


class BoundedServer(uvicorn.Server):
    """uvicorn over `http_options`."""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        quieten_logs()
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(LISTEN_QUEUE)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
