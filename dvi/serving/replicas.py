"""The replicas behind a front door: which of them are well, how much each has to do, and who gets the next request.

Knows states, loads and names of conversations; knows nothing of HTTP. Only the door's event loop comes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import math
from collections.abc import AsyncIterator, Collection
from typing import Literal

from dvi.serving.aggregation import LOAD, ServerCounts, numbers

State = Literal["unknown", "healthy", "draining", "down"]  # unknown: until somebody has looked for the first time
MAX_MISSES = 3  # looks that time out in a row: a busy replica may answer late, a hanging one never does
# A conversation stays with its replica while that one has at most this share of the mean load, and so many more.
MAX_SHARE, SPARE_REQUESTS = 1.25, 1

log = logging.getLogger(__name__)


class Replica:
    """One server. name: its address, as figures show it."""

    def __init__(self, number: int, url: str) -> None:
        self.number, self.url = number, url.rstrip("/")
        self.name = self.url.partition("://")[2]
        self.state: State = "unknown"
        self.health: dict[str, object] = {}
        self.counts = ServerCounts()
        self.in_flight = 0
        self.from_elsewhere = 0
        self.last_turn = 0
        self._misses = 0
        self._flights: set[asyncio.Timeout] = set()

    @property
    def load(self) -> int:
        """Requests from here that are under way, and those that it reported to have from elsewhere."""
        return self.in_flight + self.from_elsewhere

    @contextlib.asynccontextmanager
    async def flight(self) -> AsyncIterator[None]:
        """A request's time at this replica. Raises TimeoutError inside once the replica is given up."""
        self.in_flight += 1
        try:
            async with asyncio.timeout(None) as flight:
                self._flights.add(flight)
                try:
                    yield
                finally:
                    self._flights.discard(flight)
        finally:
            self.in_flight -= 1

    def answered(self, state: State, health: dict[str, object]) -> None:
        """It has said how it is."""
        self._misses = 0
        self.health = health
        self._become(state)

    def refused_connection(self) -> None:
        """Nobody listens there. What it is answering still goes on: a server's last answers outlive its socket."""
        self._become("down")

    def missed(self) -> None:
        """It has not said in time how it is; after MAX_MISSES in a row all that waits for it is given up."""
        self._misses += 1
        if self._misses >= MAX_MISSES:
            self._become("down")
            while self._flights:
                self._flights.pop().reschedule(-math.inf)

    def take_metrics(self, text: str, *, asked_s: float, answered_s: float) -> None:
        self.counts.take(text, asked_s=asked_s, answered_s=answered_s)
        # A request with many answers is one here and many there; while it runs the difference is load all the same.
        self.from_elsewhere = max(0, int(sum(numbers(text, LOAD))) - self.in_flight)

    def _become(self, state: State) -> None:
        if state != self.state and (self.state, state) != ("unknown", "healthy"):
            log.warning("replica %s is %s, and was %s", self.name, state, self.state)
        self.state = state
        if state == "down":
            self.from_elsewhere = 0


class Fleet:
    """All replicas."""

    def __init__(self, urls: Collection[str]) -> None:
        self.replicas = [Replica(number, url) for number, url in enumerate(urls)]
        self._turns = itertools.count(1)

    def num_in(self, state: State) -> int:
        return sum(replica.state == state for replica in self.replicas)

    def choose(self, conversation: str | None, *, without: Collection[Replica] = ()) -> Replica | None:
        """The replica for a request, counted as its turn; None where none is healthy.

        Without a conversation it is the one with the least to do, and of equals the one whose turn was longest ago.
        A conversation has an order of all replicas, by hash (rendezvous hashing), and goes to the first that is not
        overloaded: one that vanishes moves its own conversations only, and they come back with it.
        """
        healthy = [r for r in self.replicas if r.state == "healthy" and r not in without]
        if not healthy:
            return None
        if conversation is None:
            chosen = min(healthy, key=lambda replica: (replica.load, replica.last_turn))
        else:
            mean = (sum(replica.load for replica in healthy) + 1) / len(healthy)
            most = MAX_SHARE * mean + SPARE_REQUESTS
            in_order = sorted(healthy, key=lambda replica: _score(conversation, replica.url))
            # The least loaded is below the mean, so there is one.
            chosen = next(replica for replica in in_order if replica.load + 1 <= most)
        chosen.last_turn = next(self._turns)
        return chosen


def _score(conversation: str, url: str) -> bytes:
    return hashlib.sha256(f"{conversation}\n{url}".encode()).digest()
