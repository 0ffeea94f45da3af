"""Places that are few, shared fairly: who gives way when all are taken, and one thread that tenants use by turns.

Knows tenants by name and counts; knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dvi.serving.request import Draining, QueueFull

T = TypeVar("T")

RETRY_AFTER_S = 1.0  # a turn is short


def who_gives_way(held: Mapping[str, int], newcomer: str, num_new: int = 1) -> str:
    """The tenant that gives places up where num_new more are wanted and none is free.

    It is the one that holds the most, so nobody can keep others out by asking for much; the newcomer himself where he
    would hold as many as anybody.
    """
    holder, most = max(held.items(), key=lambda item: item[1], default=(newcomer, 0))
    return holder if most > held.get(newcomer, 0) + num_new else newcomer


@dataclass(eq=False)
class _Turn:
    """Work that waits, and the future of the event loop that waits for it."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]

    def settle(self, *, result: Any = None, error: BaseException | None = None) -> None:
        """From any thread."""

        def tell() -> None:
            if not self.future.done():
                self.future.set_result(result) if error is None else self.future.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self.future.get_loop().call_soon_threadsafe(tell)


class Turns:
    """A thread that works for several tenants, one piece of each in turn; first come, first served within one.

    max_waiting: pieces; where more come, the newest of whoever has most here gives way. Nobody waits for the thread at
    the process's end.
    """

    def __init__(self, name: str, *, max_waiting: int) -> None:
        self._max_waiting, self._is_closed = max_waiting, False
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[_Turn]] = {}  # whose turn is next comes first; none is empty
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises, in the thread, unless this is cancelled while it waits.

        Raises QueueFull where it gives way, and Draining after `close`.
        """
        turn = _Turn(work, asyncio.get_running_loop().create_future())
        with self._changed:
            if self._is_closed:
                raise Draining("the server is stopping and takes no more requests")
            self._make_room(tenant)
            self._waiting.setdefault(tenant, deque()).append(turn)
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify()
        try:
            return await turn.future
        finally:
            with self._changed:
                self._drop(tenant, turn)

    def close(self) -> None:
        """Nothing more is begun; what waits is told so."""
        with self._changed:
            self._is_closed = True
            left, self._waiting = self._waiting, {}
            self._changed.notify()
        for turn in (turn for turns in left.values() for turn in turns):
            turn.settle(error=Draining("the server is stopping and takes no more requests"))

    def join(self, timeout_s: float) -> None:
        """Waits for the piece in progress, up to so long."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _make_room(self, tenant: str) -> None:
        held = Counter({name: len(turns) for name, turns in self._waiting.items()})
        if held.total() < self._max_waiting:
            return
        holder = who_gives_way(held, tenant)
        if holder == tenant:
            raise QueueFull(RETRY_AFTER_S)
        displaced = self._waiting[holder][-1]
        self._drop(holder, displaced)
        displaced.settle(error=QueueFull(RETRY_AFTER_S))

    def _drop(self, tenant: str, turn: _Turn) -> None:
        """Takes a turn out of the queue, where it is still there."""
        turns = self._waiting.get(tenant)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[tenant]

    def _next(self) -> _Turn | None:
        """The next turn, once there is one; None at the end. Its tenant comes last from now on."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            tenant = next(iter(self._waiting))
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns
            return turn

    def _run(self) -> None:
        while (turn := self._next()) is not None:
            try:
                result = turn.work()
            except BaseException as error:
                turn.settle(error=error)
            else:
                turn.settle(result=result)
