"""Who runs, who waits, who makes room: admission, chunked prefill, fairness between tenants, preemption, timeouts.

Knows requests, counts of positions and the seconds it is told; knows nothing of tensors, token ids or the cache. One
thread calls it; `num_waiting`, `num_running`, `num_positions` and `retry_after_s` may be read from any.

Order. Within a tenant first come, first served, always: its running requests are older than its waiting ones. Between
tenants the next place goes to the one that was served the fewest positions lately (start-time fair queueing, Goyal et
al. 1996). Nobody overtakes whoever is next and does not fit yet, or a long request would never find room.

Progress. The oldest running request is never preempted, so it ends. Whoever is oldest of all gets its turn, as its
tenant is served nothing while it waits, and is then the oldest running. So every request ends.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dvi.serving.request import QueueFull, Request
from dvi.serving.turns import who_gives_way
from dvi.settings import ServeSettings

# A newcomer must leave every row room for so many full rounds, or it would be preempted as soon as it is prefilled.
ROUNDS_OF_ROOM = 4
FINISH_MEMORY = 0.9  # per finished request: the pace of about the last ten counts
FIRST_GUESS_S = 1.0  # between two finishes, until some were seen
RETRY_AFTER_RANGE_S = (1.0, 60.0)


@dataclass(frozen=True)
class SchedulerLimits:
    """What may run and wait.

    max_rows                 requests that run at once.
    max_positions            cached positions of all running requests together, each with its headroom.
    max_waiting              requests that may be here beyond max_rows: what waits when all rows are taken.
    prefill_tokens_per_step  positions prefilled in a step, all requests together: what a decoding row waits at most.
    rounds_per_prefill       rounds from one step that prefills to the next, as long as any row decodes; 1 prefills
                             before every round, more lets prefilling and decoding take turns.
    headroom                 most positions that a round writes beyond a row's committed ones: the deepest draft + 1.
    """

    max_rows: int = ServeSettings.max_rows
    max_positions: int = ServeSettings.max_positions
    max_waiting: int = ServeSettings.max_waiting
    prefill_tokens_per_step: int = ServeSettings.prefill_tokens_per_step
    rounds_per_prefill: int = ServeSettings.rounds_per_prefill
    headroom: int = 17

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that would not fit even alone."""
        num_prompt, num_new = len(request.prompt_ids), request.params.max_new_tokens
        bound = self.max_positions - self.headroom
        if num_prompt < 1:
            raise ValueError("the prompt must have at least 1 token, got 0; begin it with the model's first token")
        if num_prompt + num_new > bound:
            remedy = f"ask for at most {bound - num_prompt}" if num_prompt < bound else "shorten the prompt"
            raise ValueError(f"prompt + new tokens must be at most {bound}, got {num_prompt} + {num_new}; {remedy}")


@dataclass(frozen=True)
class Plan:
    """What the engine does in one step, in this order; rows that are prefilled already decode besides.

    expired  requests out of time, running or waiting, and what to tell the client.
    preempt  ids of running requests that lose their rows. Their prompt and new tokens are prefilled anew, all but the
             last token, once they are admitted again.
    admit    requests that get a row, preempted ones among them.
    prefill  (request id, most positions to prefill now), first come first; for an admitted request counted as if the
             prefix cache knew nothing of it.
    """

    expired: list[tuple[Request, str]]
    preempt: list[int]
    admit: list[Request]
    prefill: list[tuple[int, int]]


@dataclass(eq=False)
class _Entry:
    """A request that waits or runs. order: of arrival. num_cached: positions in its row, 0 while it waits."""

    request: Request
    order: int
    was_admitted: bool = False
    num_generated: int = 0
    num_cached: int = 0

    @property
    def num_positions(self) -> int:
        """Positions it holds once prefilled: all tokens but the last, which opens the next round."""
        return len(self.request.prompt_ids) + self.num_generated - 1

    @property
    def num_missing(self) -> int:
        """Positions yet to prefill."""
        return self.num_positions - self.num_cached

    def next_timeout(self) -> tuple[float, str]:
        """Seconds since arrival after which it is given up as things stand, and what it is by then."""
        timeouts = self.request.timeouts
        limits = [(timeouts.total_s, "not finished")]
        if self.num_generated == 0:
            limits.append((timeouts.first_token_s, "no token yet"))
        if not self.was_admitted:
            limits.append((timeouts.queue_s, "still queued"))
        return min(limits)

    @property
    def deadline_s(self) -> float:
        return self.request.arrived_s + self.next_timeout()[0]


class Scheduler:
    """Plans each step from what the engine reports of the last; see the module for the order it keeps.

    limits: others may take their place between two steps, as long as no request that is here outgrows them.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self._entries: dict[int, _Entry] = {}
        self._running: dict[int, _Entry] = {}
        self._waiting: dict[str, OrderedDict[int, _Entry]] = {}  # by tenant; none is empty
        self._num_added = 0
        # Positions served to each tenant since the server last stood idle, and to the one admitted last.
        self._served: dict[str, int] = {}
        self._virtual_time = 0
        self._rounds_since_prefill = 0
        # (deadline, request id): one per entry that can expire, no later than it will; some are of requests gone.
        self._deadlines: list[tuple[float, int]] = []
        self._now_s = 0.0
        self._last_finish_s = 0.0
        self._finish_interval_s = FIRST_GUESS_S

    @property
    def num_waiting(self) -> int:
        """Requests without a row, preempted ones included."""
        return max(len(self._entries) - len(self._running), 0)  # another thread may look between two changes

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_places(self) -> int:
        """Requests that may still be added."""
        return self.limits.max_rows + self.limits.max_waiting - len(self._entries)

    @property
    def num_positions(self) -> int:
        """Positions that the running requests hold once prefilled, without headroom."""
        return sum(entry.num_positions for entry in list(self._running.values()))  # a copy: see above

    @property
    def retry_after_s(self) -> float:
        """A guess of when those that wait now will have left the queue, in 1..60 s, from the pace of late finishes."""
        low, high = RETRY_AFTER_RANGE_S
        return min(max(self.num_waiting * self._finish_interval_s, low), high)

    def add(self, request: Request) -> list[Request]:
        """Queues a request. Raises ValueError if it can never fit, QueueFull if too many wait. See `add_all`."""
        return self.add_all([request])

    def add_all(self, requests: Sequence[Request]) -> list[Request]:
        """Queues all of them, or raises as `add` does and queues none. They are one tenant's.

        Where too few places are free, the newest that wait of whoever holds the most give theirs up: those are
        forgotten and returned, with what belongs to the same calls. A call that has had a row keeps its places.
        """
        for request in requests:
            self.limits.check(request)
        displaced = [] if len(requests) <= self.num_places else self._displace(requests)
        for request in requests:
            self._enqueue(request)
        return displaced

    def _displace(self, requests: Sequence[Request]) -> list[Request]:
        """Makes room for these, or raises QueueFull and changes nothing."""
        newcomer, num_new = requests[0].tenant, len(requests)
        held = Counter(entry.request.tenant for entry in self._entries.values())
        begun = {entry.request.call_id for entry in self._entries.values() if entry.was_admitted}
        chosen: dict[int, _Entry] = {}
        while num_new - len(chosen) > self.num_places:
            holder = who_gives_way(held, newcomer, num_new)
            waiting = [
                entry for request_id, entry in self._waiting.get(holder, {}).items()
                if entry.request.call_id not in begun and request_id not in chosen
            ]  # fmt: skip
            if holder == newcomer or not waiting:
                raise QueueFull(self.retry_after_s)
            call_id = max(waiting, key=lambda entry: entry.order).request.call_id
            call = {entry.request.request_id: entry for entry in waiting if entry.request.call_id == call_id}
            chosen |= call
            held[holder] -= len(call)
        for entry in chosen.values():
            self._forget(entry)
        return [entry.request for entry in chosen.values()]

    def _enqueue(self, request: Request) -> None:
        assert request.request_id not in self._entries, f"request {request.request_id} is known already"
        if not self._entries:
            self._served.clear()  # nobody is left to owe anything
            self._virtual_time, self._last_finish_s = 0, request.arrived_s
        entry = _Entry(request, order=self._num_added)
        self._num_added += 1
        self._entries[request.request_id] = entry
        if request.tenant not in self._waiting:
            # It did not ask for what others got meanwhile, so that gives it no claim.
            self._served[request.tenant] = max(self._served.get(request.tenant, 0), self._virtual_time)
        self._waiting.setdefault(request.tenant, OrderedDict())[request.request_id] = entry
        self._set_deadline(entry)

    def cancel(self, request_id: int) -> bool:
        """Forgets a waiting or running request; False if there is none of this id."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._forget(entry)
        return entry is not None

    def finished(self, request_id: int) -> None:
        """A running request has ended by itself."""
        interval_s = self._now_s - self._last_finish_s
        self._finish_interval_s += (1 - FINISH_MEMORY) * (interval_s - self._finish_interval_s)
        self._last_finish_s = self._now_s
        self._forget(self._running[request_id])

    def reused(self, request_id: int, num_positions: int) -> None:
        """The prefix cache had this many of a just admitted request's first positions."""
        entry = self._running[request_id]
        assert entry.num_cached == 0, "positions are reused before any is prefilled"
        self.prefilled(request_id, num_positions)

    def prefilled(self, request_id: int, num_positions: int) -> None:
        """So many more positions of a running request are cached."""
        entry = self._running[request_id]
        assert num_positions <= entry.num_missing, f"{num_positions} positions of {entry.num_missing} to prefill"
        entry.num_cached += num_positions

    def grew(self, request_id: int, num_tokens: int) -> None:
        """A round committed so many tokens, and as many positions, to a prefilled request."""
        entry = self._running[request_id]
        assert entry.num_missing == 0, f"request {request_id} decoded before it was prefilled"
        entry.num_generated += num_tokens
        entry.num_cached += num_tokens
        self._served[entry.request.tenant] += num_tokens

    def schedule(self, now_s: float) -> Plan:
        """The next step's plan, as of now_s on the clock of `Request.arrived_s`.

        Takes time for the running, the admitted and the expired requests and for the tenants, not for the waiting.
        """
        self._now_s = now_s
        expired = self._expire()
        preempt = self._preempt()
        # Whoever was preempted just now must not come back into the gap that the next victim left.
        admit = [] if preempt else self._admit()
        return Plan(expired, preempt, admit, self._share_prefill())

    def _expire(self) -> list[tuple[Request, str]]:
        # Most requests end long before their time: sweep what they left before it outgrows what lives.
        if len(self._deadlines) > 2 * len(self._entries) + self.limits.max_waiting:
            self._deadlines.clear()
            for entry in self._entries.values():
                self._set_deadline(entry)
        expired = []
        while self._deadlines and self._deadlines[0][0] < self._now_s:
            entry = self._entries.get(heapq.heappop(self._deadlines)[1])
            if entry is None:
                continue
            if entry.deadline_s < self._now_s:
                limit_s, complaint = entry.next_timeout()
                waited_s = self._now_s - entry.request.arrived_s
                expired.append((entry.request, f"{complaint} after {waited_s:.1f} s; the limit is {limit_s:g} s"))
                self._forget(entry)
            else:
                self._set_deadline(entry)  # admitted, or given its first token, since
        return expired

    def _set_deadline(self, entry: _Entry) -> None:
        if entry.deadline_s < math.inf:
            heapq.heappush(self._deadlines, (entry.deadline_s, entry.request.request_id))

    def _preempt(self) -> list[int]:
        """Takes rows, until the rest can go a round, from the tenant that holds the most, its newest request first."""
        preempted = []
        while len(self._running) > 1 and not self._has_room(self._running.values(), num_rounds=1):
            held = Counter()
            for entry in self._running.values():
                held[entry.request.tenant] += entry.num_positions
            oldest = min(self._running.values(), key=lambda entry: entry.order)
            victim = max(
                (entry for entry in self._running.values() if entry is not oldest),
                key=lambda entry: (held[entry.request.tenant], entry.order),
            )
            request_id, tenant = victim.request.request_id, victim.request.tenant
            del self._running[request_id]
            victim.num_cached = 0
            queue = self._waiting.setdefault(tenant, OrderedDict())
            queue[request_id] = victim
            queue.move_to_end(request_id, last=False)
            preempted.append(request_id)
        return preempted

    def _has_room(self, entries: Collection[_Entry], *, num_rounds: int) -> bool:
        """Whether so many rounds of these requests are sure to fit."""
        num_held = sum(entry.num_positions for entry in entries)
        return num_held + len(entries) * num_rounds * self.limits.headroom <= self.limits.max_positions

    def _admit(self) -> list[Request]:
        admitted = []
        while self._waiting and len(self._running) < self.limits.max_rows:
            entry = self._next_waiting()
            request = entry.request
            if self._running and not self._has_room([*self._running.values(), entry], num_rounds=ROUNDS_OF_ROOM):
                break
            self._virtual_time = max(self._virtual_time, self._served[request.tenant])
            if not entry.was_admitted:
                # At once, or a tenant would get every free row while its prompts are unread. Positions that the
                # prefix cache has take room too; those read again after a preemption are not its fault.
                self._served[request.tenant] += len(request.prompt_ids)
                entry.was_admitted = True
            self._leave_queue(entry)
            self._running[request.request_id] = entry
            admitted.append(request)
        return admitted

    def _next_waiting(self) -> _Entry:
        """The first in the queue of the tenant served least; the older one where tenants are even."""
        heads = [next(iter(queue.values())) for queue in self._waiting.values()]
        return min(heads, key=lambda entry: (self._served[entry.request.tenant], entry.order))

    def _share_prefill(self) -> list[tuple[int, int]]:
        if any(entry.num_missing == 0 for entry in self._running.values()):  # else there is no round to wait for
            self._rounds_since_prefill += 1
            if self._rounds_since_prefill < self.limits.rounds_per_prefill:
                return []
        allotted, num_left = [], self.limits.prefill_tokens_per_step
        for request_id, entry in self._running.items():
            num_positions = min(entry.num_missing, num_left)
            if num_positions:
                allotted.append((request_id, num_positions))
                num_left -= num_positions
        if allotted:
            self._rounds_since_prefill = 0
        return allotted

    def _leave_queue(self, entry: _Entry) -> None:
        queue = self._waiting[entry.request.tenant]
        del queue[entry.request.request_id]
        if not queue:
            del self._waiting[entry.request.tenant]

    def _forget(self, entry: _Entry) -> None:
        request_id = entry.request.request_id
        del self._entries[request_id]
        if self._running.pop(request_id, None) is None:
            self._leave_queue(entry)
