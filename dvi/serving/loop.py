"""EngineLoop: the thread that owns the model, and the only way to it from other threads.

Between two steps it takes in requests, cancellations and administration, and lets the learner work: a bounded piece
after a round, as much as is owed while nobody waits. A learner that raises is put aside for good; serving goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from dvi.learner import Learner
from dvi.records import ServingPlan, Transitions
from dvi.serving.administration import Administration
from dvi.serving.engine import Engine
from dvi.serving.metrics.monitor import Monitor
from dvi.serving.request import Draining, Load, QueueFull, Request, RequestOutput
from dvi.serving.turns import who_gives_way

T = TypeVar("T")
OnOutput = Callable[[RequestOutput], None]

MAX_FAILED_STEPS = 3  # in a row: an engine that fails so often is broken, not unlucky
LEARNER_STATS_S = 1.0
POLL_S = 1.0  # while idle: how late a request in the queue can notice its timeout

log = logging.getLogger(__name__)


class Planner(Protocol):
    """Who changes the serving plan as traffic changes: shown each request that has ended, on the engine's thread."""

    def observe(self, output: RequestOutput) -> None: ...


class EngineLoop:
    """Runs an engine, and a learner beside it, on a thread of their own.

    learner_error   why learning stopped; None while it is well, or where there is no learner.
    admin           what an operator may do between rounds.
    planner         sees the requests that end, on the engine's thread; None where nobody plans.
    """

    def __init__(self, engine: Engine, *, learner: Learner | None = None, monitor: Monitor | None = None) -> None:
        self.engine, self.learner, self.monitor = engine, learner, monitor or Monitor()
        self.monitor.load = self.load
        self.learner_error: str | None = None
        self.planner: Planner | None = None
        self.is_draining = False
        self._ids = itertools.count(1)
        self._wake = threading.Condition()
        self._inbox: deque[list[Request]] = deque()
        self._cancelled: deque[int] = deque()
        self._actions: deque[tuple[Callable[[], object], Future]] = deque()
        self._on_output: dict[int, tuple[Request, OnOutput]] = {}
        self._is_stopping = False
        self._stats_due_s = 0.0
        self.admin = Administration(engine, learner, self.monitor, call=self.call)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        """Measures the machine, if nobody has yet, and begins to serve."""
        self.engine.costs()
        self._thread.start()

    def stop(self, *, drain_s: float) -> None:
        """Takes no more requests, lets those that run end for up to drain_s seconds, gives up the rest, and joins."""
        with self._wake:
            self.is_draining = True
            self._wake.notify()
        deadline_s = time.monotonic() + drain_s
        while self.is_alive and self._on_output and time.monotonic() < deadline_s:
            self._thread.join(0.05)
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self.is_alive:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_pinned(self) -> bool:
        return self.admin.is_pinned

    def load(self) -> Load:
        """What the engine holds now, with the requests that it has not taken in yet among the waiting."""
        load = self.engine.load()
        return dataclasses.replace(load, num_waiting=load.num_waiting + sum(map(len, list(self._inbox))))

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, requests: list[Request], on_output: OnOutput) -> None:
        """Queues all of the requests, which are one tenant's, or none. on_output is called on the engine's thread: it
        must be quick.

        Raises ValueError for a request that could never run, QueueFull, and Draining (also when the engine is dead).
        Where all places are taken by others, who hold more, those give some up; see `Scheduler.add_all`.
        """
        for request in requests:
            self.engine.check(request)
        with self._wake:
            if self.is_draining or not self.is_alive:
                raise Draining("the server is stopping and takes no more requests")
            self._check_place(requests)
            for request in requests:
                self._on_output[request.request_id] = (request, on_output)
            self._inbox.append(requests)
            self._wake.notify()

    def _check_place(self, requests: list[Request]) -> None:
        """Raises QueueFull where no place is free and this tenant is the one to give some up.

        Another's requests are the engine's to choose, when it takes these in.
        """
        scheduler, tenant = self.engine.scheduler, requests[0].tenant
        if sum(map(len, self._inbox)) + len(requests) > scheduler.num_places:
            held = Counter(request.tenant for request, _ in list(self._on_output.values()))
            if who_gives_way(held, tenant, len(requests)) == tenant:
                raise QueueFull(scheduler.retry_after_s)

    def cancel(self, request_ids: list[int]) -> None:
        """Gives requests up before the next round; unknown ones are ignored."""
        with self._wake:
            self._cancelled.extend(request_ids)
            self._wake.notify()

    def call(self, action: Callable[[], T]) -> Future[T]:
        """Runs an action between rounds on the engine's thread."""
        future: Future[T] = Future()
        with self._wake:
            if not self.is_alive or self._is_stopping:
                future.set_exception(Draining("the server is stopping"))
                return future
            self._actions.append((action, future))
            self._wake.notify()
        return future

    def apply(self, plan: ServingPlan) -> Future[None]:
        """Runs by this plan from the next round on."""
        return self.call(lambda: self.engine.apply(plan))

    # The engine's thread

    def _run(self) -> None:
        self.admin.started_s = time.time()
        num_failed = 0
        while not self._is_stopping:
            try:
                has_stepped = self._turn()
                num_failed = 0 if has_stepped else num_failed
            except Exception:
                num_failed += 1
                log.exception("a step failed; its requests are given up")
                for output in self.engine.give_up_all("error", "the server failed; try again"):
                    self._deliver(output)
                if num_failed >= MAX_FAILED_STEPS:
                    break
        with self._wake:
            self.is_draining = True
            actions, self._actions = self._actions, deque()
        for _, future in actions:
            future.set_exception(Draining("the server is stopping"))
        self._take_in()
        for output in self.engine.give_up_all("cancelled", None):
            self._deliver(output)

    def _turn(self) -> bool:
        """Takes in what has come, then a step, or else some learning or sleep; whether it was a step."""
        self._take_in()
        if not self.engine.has_work:
            self._idle()
            return False
        result = self.engine.step()
        for output in result.outputs:
            self._deliver(output)
        self.monitor.on_step(result.report)
        self._teach(result.transitions)
        return True

    def _take_in(self) -> None:
        with self._wake:
            arrived, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            actions, self._actions = self._actions, deque()
        for requests in arrived:
            try:
                outputs = self.engine.add_all(requests)
            except QueueFull:
                outputs = [RequestOutput(request.request_id, finish_reason="displaced") for request in requests]
            except ValueError as error:  # an adapter unloaded meanwhile
                outputs = [RequestOutput(r.request_id, finish_reason="error", error=str(error)) for r in requests]
            except Exception:
                log.exception("requests %s could not be queued", [request.request_id for request in requests])
                words = "the server could not take this request; try again"
                outputs = [RequestOutput(r.request_id, finish_reason="error", error=words) for r in requests]
            for output in outputs:
                self._deliver(output)
        for request_id in cancelled:
            output = self.engine.cancel(request_id)
            if output is not None:
                self._deliver(output)
        for action, future in actions:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

    def _idle(self) -> None:
        """A piece of learning if one is owed; else sleeps until something comes."""
        self._report_learner()
        if self._may_learn and self.learner.is_busy:
            self._guarded(lambda: self._step_learner(is_idle=True))
            return
        with self._wake:
            if not (self._inbox or self._cancelled or self._actions or self._is_stopping):
                self._wake.wait(POLL_S)

    @property
    def _may_learn(self) -> bool:
        if self.learner is None or self.learner_error is not None:
            return False
        return not self.is_pinned or self.learner.has_peers

    def _teach(self, transitions: list[Transitions]) -> None:
        if self.learner is None or self.learner_error is not None:
            return
        self._guarded(lambda: self.learner.observe(transitions))
        if self._may_learn:
            self._guarded(lambda: self._step_learner(is_idle=False))
        self._report_learner()

    def _step_learner(self, *, is_idle: bool) -> None:
        report = self.learner.step_if_due(is_idle=is_idle)
        if report is not None:
            self.monitor.on_update(report)
        self.admin.tell_of_publish()

    def _report_learner(self) -> None:
        if self.learner is not None and time.monotonic() >= self._stats_due_s and self.learner_error is None:
            self._stats_due_s = time.monotonic() + LEARNER_STATS_S
            self._guarded(lambda: self.monitor.on_learner_stats(self.learner.stats()))

    def _guarded(self, action: Callable[[], None]) -> None:
        """Whatever the learner raises ends learning, never serving."""
        try:
            action()
        except Exception as error:
            self.learner_error = f"{type(error).__name__}: {error}"
            log.exception("the learner died; serving goes on with the drafter as it is")
            self.monitor.on_event("learner_died", self.learner_error)

    def _observe(self, output: RequestOutput) -> None:
        if self.planner is None:
            return
        try:
            self.planner.observe(output)
        except Exception:
            log.exception("the planner died; the server runs on by the plan it has")
            self.planner = None

    def _deliver(self, output: RequestOutput) -> None:
        known = self._on_output.get(output.request_id)
        if known is None:
            return
        request, on_output = known
        if output.finish_reason is not None:
            del self._on_output[output.request_id]
            try:
                self.monitor.on_finish(request, output)
            except Exception:
                log.exception("the figures lack request %d", output.request_id)
            self._observe(output)
        try:
            on_output(output)
        except Exception:
            log.exception("the receiver of request %d failed", output.request_id)
            self.cancel([output.request_id])
