"""The engine's thread: many clients, swaps, disconnects, a learner that dies, and an end in good order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dvi.learner import Learner
from dvi.records import DrafterVersion, Transitions, UpdateReport
from dvi.serving.engine import Engine
from dvi.serving.loop import EngineLoop
from dvi.serving.metrics.prometheus import exposition
from dvi.serving.request import DEFAULT_DRAFTER, DraftChoice, Draining, QueueFull, Request, RequestOutput
from tests.serving.test_engine import FIXED, alone, engine_of, greedy, random_prompts, request_of
from tests.support.drafter_doubles import randomise

PATIENCE_S = 60.0  # a deadline, not a wait: nothing here takes a second


class Client:
    """Gathers the news of its requests."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.last: dict[int, RequestOutput] = {}
        self._news = threading.Condition()

    def __call__(self, output: RequestOutput) -> None:
        with self._news:
            self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                assert output.request_id not in self.last
                self.last[output.request_id] = output
            self._news.notify_all()

    def wait(self, is_enough: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(is_enough, PATIENCE_S), "the news never came"

    def wait_for_all(self, requests: list[Request]) -> None:
        self.wait(lambda: all(request.request_id in self.last for request in requests))


class Scripted(Learner):
    """A learner that publishes random weights at every step, and dies where it is told to."""

    def __init__(self, engine: Engine, *, dies_in: str = "", after: int = 0) -> None:
        self._engine, self._dies_in, self._left = engine, dies_in, after
        self.num_observed = self.num_steps = self.num_idle_steps = self.num_owed = 0
        self.forgotten: list[str] = []

    def _maybe_die(self, where: str) -> None:
        if where == self._dies_in:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("killed")

    def observe(self, transitions: list[Transitions]) -> None:
        self._maybe_die("observe")
        self.num_observed += len(transitions)

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        self._maybe_die("step")
        self.num_steps += 1
        if is_idle:
            self.num_idle_steps += 1
            self.num_owed -= 1
        randomise(self._engine.drafters[DEFAULT_DRAFTER], seed=self.num_steps, scale=0.02)
        return None

    @property
    def is_busy(self) -> bool:
        return self.num_owed > 0

    def versions(self) -> list[DrafterVersion]:
        version = self._engine.drafters[DEFAULT_DRAFTER].version
        return [DrafterVersion(version, 0.0, "learner", self.num_steps, None, is_live=True, is_kept=True)]

    def rollback(self, version: int | None = None) -> DrafterVersion:
        raise ValueError(f"version {version} is not kept")

    def forget(self, tenant: str) -> int:
        self.forgotten.append(tenant)
        return 5

    def stats(self) -> dict[str, float]:
        self._maybe_die("stats")
        return {"steps": float(self.num_steps)}


@contextmanager
def running(engine: Engine | None = None, learner: object = None) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine or engine_of(), learner=learner)
    loop.start()
    try:
        yield loop
    finally:
        loop.stop(drain_s=0.0)
        assert not loop.is_alive


def some_requests(loop: EngineLoop, count: int, *, seed: int, max_new_tokens: int = 12) -> list[Request]:
    prompts = random_prompts(count, seed=seed, longest=20)
    return [request_of(loop.next_request_id(), prompt, greedy(max_new_tokens)) for prompt in prompts]


def test_200_swaps_under_load_leave_every_output_as_the_frozen_servers():
    """Catches a draft that begins with one version's weights and ends with another's, and swaps that stall requests."""
    engine = engine_of(max_waiting=200)
    learner, client = Scripted(engine), Client()
    with running(engine, learner) as loop:
        requests = some_requests(loop, 60, seed=1)
        for request in requests:
            loop.submit([request], client)
        client.wait_for_all(requests)
        while learner.num_steps < 200:
            more = some_requests(loop, 8, seed=2 + learner.num_steps)
            loop.submit(more, client)
            client.wait_for_all(more)
            requests += more
    assert learner.num_steps >= 200 and learner.num_observed > 0
    assert {client.last[r.request_id].finish_reason for r in requests} == {"length"}
    assert len({client.last[r.request_id].drafter_version for r in requests}) > 10
    for request in requests[::4]:
        assert client.token_ids[request.request_id] == alone(request)
    stats = [client.last[r.request_id].stats for r in requests]
    assert 0 < sum(s.num_accepted for s in stats) < sum(s.num_drafted for s in stats)


def test_100_random_disconnects_leak_nothing_and_disturb_nobody():
    """Catches rows, positions, callbacks or threads that stay behind when a client goes away."""
    engine, client, generator = engine_of(max_waiting=200, prefix_positions=600), Client(), random.Random(0)
    num_threads = threading.active_count()
    with running(engine) as loop:
        leaving, staying = some_requests(loop, 100, seed=3, max_new_tokens=60), some_requests(loop, 20, seed=4)
        both = leaving + staying
        generator.shuffle(both)
        for request in both:
            loop.submit([request], client)
            if generator.random() < 0.5:
                loop.cancel([generator.choice(leaving).request_id, 10**6])
        for request in leaving:  # at whatever token it happens to be
            if generator.random() < 0.3:
                client.wait(lambda r=request: r.request_id in client.last or client.token_ids.get(r.request_id))
            loop.cancel([request.request_id])
        client.wait_for_all(both)
        assert loop.call(lambda: engine.has_work).result(PATIENCE_S) is False
        assert engine.scheduler.num_running == engine.scheduler.num_waiting == engine.scheduler.num_positions == 0
        assert not loop._on_output and not engine._active and not engine._requests
        assert not any(lane.batch.sequences or lane.batch.prefilling for lane in engine._lanes.values())
    for request in staying:
        assert client.token_ids[request.request_id] == alone(request)
    assert sum(client.last[r.request_id].finish_reason == "cancelled" for r in leaving) > 50
    assert threading.active_count() == num_threads


def test_gauges_follow_cancelled_and_waiting_requests_without_another_step():
    """Catches an idle server that reports for ever what ran when its last step ended."""
    engine, client = engine_of(max_rows=2), Client()
    with running(engine) as loop:
        requests = some_requests(loop, 5, seed=3, max_new_tokens=60)
        loop.submit(requests, client)
        client.wait(lambda: bool(client.token_ids))  # of five, for two rows, most are still to come
        assert loop.load().num_running > 0
        loop.cancel([request.request_id for request in requests])
        client.wait_for_all(requests)
        loop.call(lambda: None).result(PATIENCE_S)
        load = loop.monitor.load()
        assert (load.num_running, load.num_waiting, load.num_cached_positions) == (0, 0, 0)
        assert "dvi:num_requests_running 0.0" in exposition(loop.monitor).decode()


@pytest.mark.parametrize("where", ["observe", "step", "stats"])
def test_a_learner_that_dies_costs_no_request(where: str):
    """Catches training that takes serving with it, and a death that nobody is told of."""
    engine, client = engine_of(max_waiting=200), Client()
    with running(engine, Scripted(engine, dies_in=where, after=0 if where == "stats" else 5)) as loop:
        requests = some_requests(loop, 12, seed=5)
        for request in requests:
            loop.submit([request], client)
        client.wait_for_all(requests)
        assert "killed" in loop.learner_error and loop.is_alive
        assert "learner_died" in str(loop.monitor.snapshot())
    assert {client.last[r.request_id].finish_reason for r in requests} == {"length"}


def test_a_pinned_version_stays_while_experience_is_still_gathered():
    """Catches a pin that the learner overrides at its next publish."""
    engine, client = engine_of(max_waiting=200), Client()
    learner = Scripted(engine)
    with running(engine, learner) as loop:
        first = some_requests(loop, 4, seed=6)
        loop.submit(first, client)
        client.wait_for_all(first)
        pinned = loop.admin.pin(None).result(PATIENCE_S)
        num_steps, num_observed = learner.num_steps, learner.num_observed
        second = some_requests(loop, 4, seed=7)
        loop.submit(second, client)
        client.wait_for_all(second)
        assert loop.is_pinned and learner.num_steps == num_steps and learner.num_observed > num_observed
        assert {client.last[r.request_id].drafter_version for r in second} == {pinned.version}
        loop.admin.unpin().result(PATIENCE_S)
        with pytest.raises(ValueError, match="pinned"):
            loop.admin.unpin().result(PATIENCE_S)
        with pytest.raises(ValueError, match="not kept"):
            loop.admin.rollback(3).result(PATIENCE_S)


def test_idle_time_goes_to_the_learner_until_nothing_is_owed():
    """Catches a learner that starves in the gaps it was promised, and one that never lets the machine rest."""
    engine = engine_of()
    learner = Scripted(engine)
    learner.num_owed = 7
    with running(engine, learner) as loop:
        deadline_s = time.monotonic() + PATIENCE_S
        while learner.num_owed and time.monotonic() < deadline_s:
            loop.call(lambda: None).result(PATIENCE_S)
    assert learner.num_idle_steps == 7


def test_a_full_queue_refuses_at_once_and_takes_all_or_none():
    """Catches a queue that grows without end, and n choices of which some are never answered."""
    engine, client = engine_of(max_rows=1, max_waiting=2), Client()
    with running(engine) as loop:
        release = threading.Event()
        blocked = loop.call(lambda: release.wait(PATIENCE_S))  # nothing is admitted meanwhile
        requests = some_requests(loop, 5, seed=8)
        loop.submit(requests[:2], client)
        with pytest.raises(QueueFull) as refusal:
            loop.submit(requests[2:4], client)
        assert refusal.value.retry_after_s >= 1
        loop.submit(requests[4:], client)
        release.set()
        blocked.result(PATIENCE_S)
        client.wait_for_all([*requests[:2], requests[4]])
        assert not {requests[2].request_id, requests[3].request_id} & set(client.token_ids)


def test_a_newcomer_finds_a_place_where_another_holds_them_all():
    """Catches a key that fills the queue and whose every answer is followed by its own next request."""
    engine, client = engine_of(max_rows=1, max_waiting=2), Client()
    with running(engine) as loop:
        release, is_blocked = threading.Event(), threading.Event()
        blocked = loop.call(lambda: (is_blocked.set(), release.wait(PATIENCE_S)))  # nothing is taken in meanwhile
        assert is_blocked.wait(PATIENCE_S)
        requests = some_requests(loop, 5, seed=8)
        for request, tenant in zip(requests, ("greedy", "greedy", "greedy", "modest", "greedy"), strict=True):
            request.tenant = tenant
            if request is requests[-1]:
                with pytest.raises(QueueFull):
                    loop.submit([request], client)
            else:
                loop.submit([request], client)
        release.set()
        blocked.result(PATIENCE_S)
        client.wait_for_all(requests[:4])
    reasons = [client.last[request.request_id].finish_reason for request in requests[:4]]
    assert reasons == ["length", "length", "displaced", "length"]


def test_an_adapter_is_read_beside_the_rounds(monkeypatch):
    """Catches a gigabyte that is hashed on the engine's thread while everybody waits."""
    engine, client, may_end, threads = engine_of(), Client(), threading.Event(), []

    def slow(folder, split):
        threads.append(threading.current_thread().name)
        assert may_end.wait(PATIENCE_S)
        return engine.drafters[DEFAULT_DRAFTER]

    monkeypatch.setattr("dvi.serving.administration.load_drafter", slow)
    with running(engine) as loop:
        loaded = loop.admin.load_adapter("large", Path("large"))
        requests = some_requests(loop, 2, seed=3)
        loop.submit(requests, client)
        client.wait_for_all(requests)
        assert not loaded.done() and "large" not in engine.drafters
        may_end.set()
        loaded.result(PATIENCE_S)
        assert "large" in engine.drafters and threads == ["load large"]
        del engine.drafters["large"]


def test_stopping_lets_running_requests_end_and_gives_the_rest_up():
    """Catches a shutdown that cuts answers it had time for, or that waits for ever."""
    client, loop = Client(), EngineLoop(engine_of())
    loop.start()
    short = some_requests(loop, 3, seed=9)
    loop.submit(short, client)
    loop.stop(drain_s=PATIENCE_S)
    assert {client.last[r.request_id].finish_reason for r in short} == {"length"}
    assert not loop.is_alive
    with pytest.raises(Draining):
        loop.submit(some_requests(loop, 1, seed=9), client)
    with pytest.raises(Draining):
        loop.call(lambda: None).result(PATIENCE_S)

    loop = EngineLoop(engine_of(max_rows=1))
    loop.start()
    long = some_requests(loop, 3, seed=10, max_new_tokens=400)
    client = Client()
    loop.submit(long, client)
    client.wait(lambda: bool(client.token_ids))
    loop.stop(drain_s=0.0)
    client.wait_for_all(long)
    assert "cancelled" in {last.finish_reason for last in client.last.values()}


def test_a_step_that_fails_ends_its_requests_and_a_broken_engine_ends_the_thread(monkeypatch, caplog):
    """Catches clients that wait for ever for an engine that is gone."""
    engine, client = engine_of(), Client()
    whole, failures = engine.step, iter([True, False, True, True, True])

    def step() -> object:
        if next(failures, False):
            raise RuntimeError("broken")
        return whole()

    monkeypatch.setattr(engine, "step", step)
    with running(engine) as loop:
        first, second = some_requests(loop, 2, seed=11, max_new_tokens=1)
        loop.submit([first], client)
        client.wait_for_all([first])
        assert client.last[first.request_id].finish_reason == "error"
        assert "broken" not in client.last[first.request_id].error
        for attempt in (second, *some_requests(loop, 3, seed=12)):
            try:
                loop.submit([attempt], client)
            except Draining:
                break
            client.wait_for_all([attempt])
        loop._thread.join(PATIENCE_S)
        assert not loop.is_alive and loop.is_draining


def test_forgetting_reaches_prefixes_and_learner_alike():
    """Catches one of the two places where a tenant's text is kept."""
    engine = engine_of(prefix_positions=600)
    learner, client = Scripted(engine), Client()
    with running(engine, learner) as loop:
        request = request_of(loop.next_request_id(), [5] * 130, tenant="one")
        loop.submit([request], client)
        client.wait_for_all([request])
        assert loop.admin.forget("one").result(PATIENCE_S) == 120 + 5
        assert learner.forgotten == ["one"] and engine.prefixes.num_positions == 0


def test_adapters_come_and_go_by_name(tmp_path):
    """Catches a name that is overwritten in silence, and an adapter that drafts on after it was unloaded."""
    engine, client = engine_of(), Client()
    with running(engine) as loop:
        loop.admin.save_adapter(tmp_path / "saved").result(PATIENCE_S)
        loop.admin.load_adapter("saved", tmp_path / "saved").result(PATIENCE_S)
        with pytest.raises(ValueError, match="already"):
            loop.admin.load_adapter("saved", tmp_path / "saved").result(PATIENCE_S)
        with pytest.raises(ValueError):
            loop.admin.load_adapter("missing", tmp_path / "missing").result(PATIENCE_S)
        choice = DraftChoice("saved", FIXED.policy, FIXED.num_draft_tokens)
        request = request_of(loop.next_request_id(), [5, 9, 33], draft=choice)
        loop.submit([request], client)
        client.wait_for_all([request])
        loop.admin.unload_adapter("saved").result(PATIENCE_S)
        for name in ("saved", DEFAULT_DRAFTER):
            with pytest.raises(ValueError, match="no adapter"):
                loop.admin.unload_adapter(name).result(PATIENCE_S)
        with pytest.raises(ValueError, match="no drafter"):
            loop.submit([request_of(loop.next_request_id(), [5], draft=choice)], client)
