"""Channels: messages between two ranks of a job, which neither of them ever waits for.

Knows bytes, threads and the process group's CPU side (gloo); knows nothing of what a message says. Nothing is pickled.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from dvi.distributed import PeerLostError

MAGIC = 0x4456_4931  # a header begins with it: a rank of another program, or of another version, is noticed
MAX_BODY_BYTES = 1 << 31  # beyond it a length is garbage, not a drafter
BEATS_PER_TIMEOUT = 4
FAREWELL_S = 1.0  # to a rank that is lost, and whose connection may not know it yet


class Kind(IntEnum):
    """What a message is. BEAT and CLOSE stay within the channel; see `trainers.ranks.shipping` for the others."""

    BEAT = 0
    CLOSE = 1
    EXPERIENCE = 2
    TAKEN = 3
    DRAFTER = 4
    ROLLBACK = 5
    FORGET = 6
    FORGOTTEN = 7
    SAVE = 8
    DONE = 9
    END = 10


KINDS = frozenset(int(kind) for kind in Kind)


class Message(NamedTuple):
    kind: Kind
    body: bytes = b""


class Channel(Protocol):
    """The way to one other rank and back. Messages arrive in the order in which they were sent."""

    def send(self, message: Message) -> None:
        """Takes the message to be sent; one to a rank that is lost is dropped, for `receive` to say so."""

    def receive(self) -> Message | None:
        """The next message that has arrived; None while there is none.

        Raises PeerLostError when the other rank is lost or has closed, and all that it had sent has been read.
        """

    @property
    def has_arrived(self) -> bool:
        """Whether `receive` would give a message, or raise."""

    def close(self) -> None:
        """Sends what is not sent yet and takes leave of the other rank. Waits for that, not longer than the timeout."""


class GlooChannel:
    """A Channel to `peer` through the default process group, which must have a gloo part.

    Two threads wait in its place: gloo's sends and receives cannot be polled, `is_completed` of one that is only begun
    stays False however long it has been complete (seen in torch 2.13). A rank with nothing to send beats, so that one
    that hangs or was cut off is lost after timeout_s of silence; one that died is at once.

    It must be closed before the process group is.
    """

    def __init__(self, peer: int, *, timeout_s: float) -> None:
        self._rank, self._peer, self._timeout_s = dist.get_rank(), peer, timeout_s
        self._outgoing: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._incoming: deque[Message] = deque()
        self._heard_s = time.monotonic()
        self._lost: PeerLostError | None = None
        self._is_leaving = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"{work.__name__} {peer}", daemon=True)
            for work in (self._send_all, self._receive_all)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        assert len(message.body) <= MAX_BODY_BYTES
        if self._lost is None:
            self._outgoing.put(message)

    def receive(self) -> Message | None:
        if self._is_silent:
            self._lose(f"it has been silent for {self._timeout_s:g} s")
        lost = self._lost  # before the look at what has arrived: it is set after the last message
        if self._incoming:
            return self._incoming.popleft()
        if lost is not None:
            raise lost
        return None

    @property
    def has_arrived(self) -> bool:
        return bool(self._incoming) or self._lost is not None or self._is_silent

    def close(self) -> None:
        self._leave()
        deadline_s = time.monotonic() + (self._timeout_s if self._lost is None else min(self._timeout_s, FAREWELL_S))
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0))

    @property
    def _is_silent(self) -> bool:
        return time.monotonic() - self._heard_s > self._timeout_s

    def _leave(self) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            self._outgoing.put(Message(Kind.CLOSE))

    # On the threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except RuntimeError as error:
            self._lose(str(error).strip().splitlines()[0].split(". ")[0])  # gloo's advice comes behind it
            self._leave()  # the other thread is not to wait for what cannot come

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = PeerLostError(
                f"rank {self._rank} lost rank {self._peer}: {reason}; "
                "its own log says why, and output.resume=true goes on from the last checkpoint"
            )

    def _send_all(self) -> None:
        while True:
            try:
                message = self._outgoing.get(timeout=self._timeout_s / BEATS_PER_TIMEOUT)
            except queue.Empty:
                message = Message(Kind.BEAT)
            _wait(dist.isend(torch.tensor([MAGIC, message.kind, len(message.body)]), self._peer))
            if message.body:
                _wait(dist.isend(torch.frombuffer(bytearray(message.body), dtype=torch.uint8), self._peer))
            if message.kind == Kind.CLOSE:
                return

    def _receive_all(self) -> None:
        while True:
            header = torch.zeros(3, dtype=torch.int64)
            _wait(dist.irecv(header, self._peer))
            self._heard_s = time.monotonic()
            magic, kind, size = header.tolist()
            if magic != MAGIC or kind not in KINDS or not 0 <= size <= MAX_BODY_BYTES:
                raise RuntimeError(f"it sent {header.tolist()}, which heads no message of this version")
            body = torch.zeros(size, dtype=torch.uint8)
            if size:
                _wait(dist.irecv(body, self._peer))
            if kind == Kind.CLOSE:
                self._lose("it has left")
                self._leave()  # so that its threads, too, come to their end
                return
            if kind != Kind.BEAT:
                self._incoming.append(Message(Kind(kind), body.numpy().tobytes()))


def _wait(work: dist.Work) -> None:
    """Waits for as long as it takes: a wait that runs out would close gloo's connections to all ranks."""
    work.wait(timedelta(days=365))
