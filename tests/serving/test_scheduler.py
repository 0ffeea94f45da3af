"""The scheduler against an engine of lists: nothing outgrows its bound, nobody is overtaken, everything ends."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dvi.records import SamplingParams
from dvi.serving.request import QueueFull, Request, Timeouts
from dvi.serving.scheduler import ROUNDS_OF_ROOM, Plan, Scheduler, SchedulerLimits

ROOMY = SchedulerLimits(max_rows=2, max_positions=10_000, max_waiting=1000, prefill_tokens_per_step=100, headroom=5)


def make_request(
    request_id: int, *, tenant: str = "", prompt: int = 10, new: int = 10, timeouts: Timeouts | None = None,
    arrived_s: float = 0.0, call_id: int = -1,
) -> Request:
    """prompt, new: numbers of tokens. Every token id says whose it is."""
    return Request(
        request_id, [1000 * request_id + i for i in range(prompt)], SamplingParams(max_new_tokens=new), tenant=tenant,
        timeouts=timeouts or Timeouts(), arrived_s=arrived_s, call_id=call_id,
    )


class FakeEngine:
    """Does what plans say, with a list of cached tokens for each row, and holds the scheduler to its promises."""

    def __init__(self, limits: SchedulerLimits, *, seed: int = 0, growth: int | None = None) -> None:
        """growth: tokens that a row commits in a round; None draws 1..headroom, and prefixes to reuse."""
        self.scheduler, self.limits = Scheduler(limits), limits
        self.chance, self.growth = random.Random(seed), growth
        self.requests: dict[int, Request] = {}  # all that have not ended, in order of arrival
        self.texts: dict[int, list[int]] = {}
        self.rows: dict[int, list[int]] = {}
        self.admitted: list[int] = []
        self.finished: list[int] = []
        self.served: Counter[str] = Counter()
        self.num_preempted, self.num_steps_since_admission, self.num_rounds_since_prefill = 0, 0, 0

    def add(self, *requests: Request) -> list[Request]:
        held = Counter(request.tenant for request in self.requests.values())
        displaced = self.scheduler.add_all(requests)
        for _, call in itertools.groupby(displaced, key=lambda request: request.call_id):
            ids = [request.request_id for request in call]
            tenant = self.requests[ids[0]].tenant
            assert held[tenant] > held[requests[0].tenant] + len(requests), "fairness is not turned round"
            assert not set(ids) & set(self.admitted), "whoever has begun stays"
            held[tenant] -= len(ids)
            for request_id in ids:
                self.drop(request_id)
        for request in requests:
            self.requests[request.request_id] = request
            self.texts[request.request_id] = list(request.prompt_ids)
        return displaced

    def change(self, **limits: int) -> None:
        """Other limits from the next step on, with as many places as before."""
        num_places = self.limits.max_rows + self.limits.max_waiting
        limits = {"max_rows": self.limits.max_rows} | limits
        self.limits = dataclasses.replace(self.limits, max_waiting=num_places - limits["max_rows"], **limits)
        self.scheduler.limits = self.limits

    def drop(self, request_id: int) -> None:
        del self.requests[request_id], self.texts[request_id]
        self.rows.pop(request_id, None)

    def step(self, now_s: float = 0.0) -> Plan:
        plan = self.scheduler.schedule(now_s)
        for request, _ in plan.expired:
            self.drop(request.request_id)
        assert not plan.preempt or not self._has_room(), "rows are taken for room alone"
        for request_id in plan.preempt:
            assert request_id != min(self.rows), "the oldest running request is safe"
            del self.rows[request_id]
        self._check_preemption(plan)
        self._check_turns(plan)
        for request in plan.admit:
            self._admit(request)
        assert not plan.admit or len(self.rows) <= self.limits.max_rows
        assert sum(num for _, num in plan.prefill) <= self.limits.prefill_tokens_per_step
        for request_id, num_positions in plan.prefill:
            text, row = self.texts[request_id], self.rows[request_id]
            num_positions = min(num_positions, len(text) - 1 - len(row))
            row += text[len(row) : len(row) + num_positions]
            self.scheduler.prefilled(request_id, num_positions)
        self._check_bounds()
        self._round()
        return plan

    def _check_preemption(self, plan: Plan) -> None:
        self.num_steps_since_admission = 0 if plan.admit else self.num_steps_since_admission + 1
        self.num_preempted += len(plan.preempt)
        if plan.preempt:
            assert not plan.admit
            assert self.num_steps_since_admission >= ROUNDS_OF_ROOM, "a newcomer is not sent away at once"

    def _check_turns(self, plan: Plan) -> None:
        """Prompts are read when that many rounds have passed, or when there is no round to come."""
        missing = [len(self.texts[i]) - 1 - len(row) for i, row in self.rows.items()]
        missing += [len(self.texts[request.request_id]) - 1 for request in plan.admit]
        has_round = 0 in missing
        self.num_rounds_since_prefill += has_round
        is_turn = not has_round or self.num_rounds_since_prefill >= self.limits.rounds_per_prefill
        assert bool(plan.prefill) == (is_turn and any(missing))
        if plan.prefill:
            self.num_rounds_since_prefill = 0

    def _has_room(self) -> bool:
        held = sum(len(self.texts[request_id]) - 1 for request_id in self.rows)
        return held + len(self.rows) * self.limits.headroom <= self.limits.max_positions

    def _admit(self, request: Request) -> None:
        request_id, row = request.request_id, []
        if self.growth is None and self.chance.random() < 0.5:
            row = self.texts[request_id][: self.chance.randrange(len(self.texts[request_id]))]
            self.scheduler.reused(request_id, len(row))
        if request_id not in self.admitted:
            self.served[request.tenant] += len(request.prompt_ids)
        self.rows[request_id] = row
        self.admitted.append(request_id)

    def _check_bounds(self) -> None:
        """At the moment a round starts."""
        held = sum(len(self.texts[request_id]) - 1 for request_id in self.rows)
        assert (held, len(self.rows)) == (self.scheduler.num_positions, self.scheduler.num_running)
        assert self._has_room()
        for tenant in {request.tenant for request in self.requests.values()}:
            is_running = [i in self.rows for i, request in self.requests.items() if request.tenant == tenant]
            assert is_running == sorted(is_running, reverse=True), "first come, first served"

    def _round(self) -> None:
        for request_id, row in list(self.rows.items()):
            request, text = self.requests[request_id], self.texts[request_id]
            if len(row) < len(text) - 1:
                continue
            assert row == text[:-1], "a row holds its own tokens, all of them"
            num_left = len(request.prompt_ids) + request.params.max_new_tokens - len(text)
            num_new = min(self.growth or self.chance.randint(1, self.limits.headroom), num_left)
            text += [1000 * request_id + len(text) + i for i in range(num_new)]
            row[:] = text[:-1]
            self.served[request.tenant] += num_new
            self.scheduler.grew(request_id, num_new)
            if num_new == num_left:
                self.scheduler.finished(request_id)
                self.drop(request_id)
                self.finished.append(request_id)

    def step_until(self, is_enough: Callable[[Plan], bool], *, max_steps: int = 5000) -> Plan:
        """The first plan, carried out, after which is_enough."""
        for _ in range(max_steps):
            if is_enough(plan := self.step()):
                return plan
        raise AssertionError(f"not reached in {max_steps} steps with {len(self.requests)} requests")

    def run(self) -> None:
        """Until all have ended."""
        self.step_until(lambda _: not self.requests)


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_when_all_outgrow_the_room(seed):
    """Catches a livelock: requests that preempt one another and never end."""
    chance = random.Random(seed)
    limits = SchedulerLimits(max_rows=5, max_positions=120, max_waiting=40, prefill_tokens_per_step=16, headroom=4)
    engine = FakeEngine(limits, seed=seed)
    engine.add(*(
        make_request(i, tenant=chance.choice("abc"), prompt=chance.randint(1, 50), new=chance.randint(20, 66))
        for i in range(40)
    ))
    engine.run()
    assert sorted(engine.finished) == list(range(40))
    assert engine.num_preempted > 0, "the test is about preemption"


@pytest.mark.parametrize(("prompt", "new"), [(60, 60), (100, 20)])
def test_a_long_request_ends_under_an_endless_stream_of_short_ones(prompt, new):
    """Catches preemption that always hits the same one, and short requests of others that slip into every gap."""
    limits = SchedulerLimits(max_rows=4, max_positions=130, max_waiting=40, prefill_tokens_per_step=16, headroom=4)
    engine = FakeEngine(limits, growth=2)
    engine.add(*(make_request(i, tenant="short", prompt=20, new=30) for i in range(8)))
    engine.add(make_request(8, tenant="long", prompt=prompt, new=new))
    for next_id in range(9, 500):
        engine.add(make_request(next_id, tenant="short", prompt=20, new=30))
        engine.step_until(lambda _: engine.scheduler.num_waiting <= 8)
        if 8 in engine.finished:
            return
    raise AssertionError("the long request starved")


def test_a_request_that_never_fits_is_refused_with_value_bound_and_remedy():
    """Catches a request that waits at the head of the queue for ever."""
    scheduler = Scheduler(SchedulerLimits(max_positions=100, headroom=5))
    with pytest.raises(ValueError, match=r"at most 95, got 60 \+ 36; ask for at most 35"):
        scheduler.add(make_request(0, prompt=60, new=36))
    with pytest.raises(ValueError, match=r"at most 95, got 95 \+ 1; shorten the prompt"):
        scheduler.add_all([make_request(1), make_request(0, prompt=95, new=1)])
    with pytest.raises(ValueError, match="at least 1 token"):
        scheduler.add(make_request(0, prompt=0))
    assert scheduler.num_waiting == 0
    scheduler.add(make_request(0, prompt=94, new=1))
    assert scheduler.schedule(0).admit, "what only just fits runs alone"


def test_a_limit_below_one_is_refused():
    """Catches a server that starts and then admits nobody."""
    with pytest.raises(ValueError, match="max_rows must be >= 1, got 0"):
        SchedulerLimits(max_rows=0)


def test_a_full_queue_refuses_all_choices_of_a_request_or_none():
    """Catches half of n answers queued, whose client was told to come again."""
    scheduler = Scheduler(SchedulerLimits(max_rows=1, max_waiting=2))
    scheduler.add_all([make_request(0), make_request(1)])
    with pytest.raises(QueueFull):
        scheduler.add_all([make_request(2), make_request(3)])
    assert scheduler.num_waiting == 2
    scheduler.add(make_request(2))


def test_in_a_full_queue_the_newest_request_of_whoever_holds_most_gives_way():
    """Catches a key that keeps all others out by asking for everything."""
    engine = FakeEngine(SchedulerLimits(max_rows=1, max_waiting=4), growth=1)
    engine.add(*(make_request(i, tenant="greedy") for i in range(3)))
    engine.step()
    engine.add(make_request(3, tenant="modest"), make_request(4, tenant="modest", call_id=3))
    with pytest.raises(QueueFull):  # as many as the other holds: no better claim
        engine.add(make_request(5, tenant="modest"))
    with pytest.raises(QueueFull):
        engine.add(make_request(6, tenant="greedy"))
    assert [request.request_id for request in engine.add(make_request(7, tenant="new"))] == [2]
    assert [request.request_id for request in engine.scheduler.schedule(0).admit] == [], "the row is taken"


def test_a_call_gives_way_whole_or_not_at_all():
    """Catches n answers of which one is refused while the others are being streamed."""
    engine = FakeEngine(SchedulerLimits(max_rows=1, max_waiting=5), growth=1)
    engine.add(*(make_request(i, tenant="greedy", call_id=0) for i in range(3)))
    engine.step()  # the first of the three has a row
    engine.add(*(make_request(i, tenant="greedy", call_id=3) for i in range(3, 6)))
    assert {request.request_id for request in engine.add(make_request(6, tenant="new"))} == {3, 4, 5}
    engine.add(make_request(7, tenant="other"), make_request(8, tenant="other"))
    with pytest.raises(QueueFull):  # what the greedy one still has is begun
        engine.add(make_request(9, tenant="third"))


def test_the_wait_advised_follows_the_pace_of_late_finishes():
    """Catches advice that ignores the load, and an idle night counted as a slow one."""
    limits = SchedulerLimits(max_rows=1, max_waiting=1000, headroom=10)
    engine = FakeEngine(limits, growth=10)

    def advised_after(pace_s: float, first_id: int, start_s: float) -> float:
        engine.add(*(make_request(first_id + i, arrived_s=start_s) for i in range(80)))
        for i in range(1, 71):
            engine.step(start_s + i * pace_s)
        advice_s = engine.scheduler.retry_after_s
        engine.run()
        return advice_s

    assert advised_after(0.5, 0, start_s=0) == pytest.approx(10 * 0.5, rel=0.01)  # the older pace is forgotten by then
    assert advised_after(2.0, 100, start_s=40_000) == pytest.approx(10 * 2.0, rel=0.01)
    assert advised_after(60.0, 200, start_s=80_000) == 60
    assert engine.scheduler.retry_after_s == 1


def test_prefill_shares_one_budget_first_come_first():
    """Catches two long prompts that stall the decoding rows for two chunks, and a newcomer that is prefilled first."""
    engine = FakeEngine(ROOMY, growth=1)
    engine.add(make_request(0, prompt=131), make_request(1, prompt=51))
    assert [engine.step().prefill for _ in range(3)] == [[(0, 100)], [(0, 30), (1, 50)], []]


def test_prefilling_and_decoding_take_turns():
    """Catches a prompt read before every round all the same, and one that waits for rounds that nobody runs."""
    engine = FakeEngine(dataclasses.replace(ROOMY, rounds_per_prefill=3), growth=1)
    engine.add(make_request(0, prompt=131, new=8))
    assert [engine.step().prefill for _ in range(2)] == [[(0, 100)], [(0, 30)]], "nobody decodes yet"
    engine.add(make_request(1, prompt=131, new=8))
    assert [engine.step().prefill for _ in range(6)] == [[], [], [(1, 100)], [], [], [(1, 30)]]


def test_fewer_rows_let_those_that_run_end():
    """Catches a plan that takes rows away, and one that admits more than it has rows for."""
    engine = FakeEngine(dataclasses.replace(ROOMY, max_rows=6), growth=1)
    engine.add(*(make_request(i, new=10 + i) for i in range(12)))
    engine.step()
    engine.change(max_rows=2)
    plan = engine.step_until(lambda plan: plan.admit)
    # Five had ended before, and the sixth did in this step.
    assert engine.finished == list(range(6)) and len(plan.admit) == 1 and engine.num_preempted == 0
    engine.run()


def test_prefill_goes_on_after_the_positions_that_were_reused():
    """Catches a prefix read from the cache and then computed again."""
    scheduler = Scheduler(ROOMY)
    scheduler.add(make_request(0, prompt=131))
    assert scheduler.schedule(0).prefill == [(0, 100)]
    scheduler.reused(0, 96)
    scheduler.prefilled(0, 20)
    assert scheduler.schedule(0).prefill == [(0, 14)]


def test_a_preempted_request_comes_back_first_and_with_its_new_tokens():
    """Catches lost tokens, and a preempted request at the end of the queue."""
    limits = SchedulerLimits(max_rows=3, max_positions=140, max_waiting=9, prefill_tokens_per_step=99, headroom=5)
    engine = FakeEngine(limits, growth=5)
    engine.add(make_request(0, prompt=30, new=60), make_request(1, prompt=25, new=60), make_request(2, prompt=25))
    assert engine.step_until(lambda plan: plan.preempt).preempt == [1]
    num_tokens = len(engine.texts[1])
    assert num_tokens > 25
    plan = engine.step_until(lambda plan: plan.admit)
    assert plan.admit[0].request_id == 1 and plan.prefill[0] == (1, num_tokens - 1)


def test_room_is_made_by_the_tenant_that_holds_the_most_newest_first_and_never_by_the_oldest():
    """Catches a light tenant that pays for a heavy one, and an oldest request that is not safe."""
    limits = SchedulerLimits(max_rows=5, max_positions=400, max_waiting=9, prefill_tokens_per_step=400, headroom=5)

    def first_preempted(tenants: str) -> int:
        engine = FakeEngine(limits, growth=5)
        engine.add(*(make_request(i, tenant=tenant, prompt=40, new=300) for i, tenant in enumerate(tenants)))
        return engine.step_until(lambda plan: plan.preempt).preempt[0]

    assert first_preempted("abbbc") == 3
    assert first_preempted("aaabb") == 2
    assert first_preempted("abcde") == 4


def test_a_light_tenant_waits_for_no_more_than_one_of_a_heavy_one():
    """Catches one key with a hundred waiting requests that starves another with one."""
    engine = FakeEngine(ROOMY, growth=2)
    engine.add(*(make_request(i, tenant="heavy", prompt=30, new=20) for i in range(100)))
    for light_id in range(100, 110):
        for _ in range(20):
            engine.step()
        engine.add(make_request(light_id, tenant="light", prompt=30, new=20))
        num_before = len(engine.admitted)
        engine.step_until(lambda _, light_id=light_id: light_id in engine.admitted)
        assert engine.admitted.index(light_id) <= num_before + 1


def test_tenants_that_always_wait_are_served_the_same_number_of_positions():
    """Catches fairness by requests: long ones would get their tenant a multiple."""
    engine = FakeEngine(ROOMY)
    engine.add(*(make_request(i, tenant="long", prompt=150, new=50) for i in range(100)))
    engine.add(*(make_request(i, tenant="short", prompt=10, new=10) for i in range(100, 900)))
    for _ in range(1000):
        engine.step()
        # Each may be ahead by what its last admissions asked for: two rows of the longest request.
        assert abs(engine.served["long"] - engine.served["short"]) <= 2 * 200
    assert engine.served["long"] > 5000


@pytest.mark.parametrize("before", ["absent", "left", "trickled"])
def test_what_a_tenant_did_not_ask_for_gives_it_no_claim(before):
    """Catches a tenant that asked for little and then takes every place until it has caught up."""
    engine, idle_ids = FakeEngine(ROOMY, growth=5), iter(range(100, 300))
    engine.add(*(make_request(i, tenant="busy", prompt=20) for i in range(100)))

    def is_time(_: Plan) -> bool:
        is_there = any(request.tenant == "idle" for request in engine.requests.values())
        if not is_there and (before == "trickled" or (before == "left" and len(engine.finished) < 10)):
            engine.add(make_request(next(idle_ids), tenant="idle", prompt=1, new=5))
        return len(engine.finished) >= 60

    engine.step_until(is_time)
    engine.add(*(make_request(i, tenant="idle", prompt=20) for i in idle_ids))
    num_before = len(engine.admitted)
    engine.step_until(lambda _: len(engine.admitted) >= num_before + 20)
    num_busy = sum(request_id < 100 for request_id in engine.admitted[num_before:])
    assert 9 <= num_busy <= 11


def test_what_was_served_before_the_server_stood_idle_is_forgotten():
    """Catches a tenant that used a free server yesterday and stands behind everybody today."""
    engine = FakeEngine(ROOMY, growth=5)
    engine.add(*(make_request(i, tenant="early") for i in range(50)))
    engine.run()
    engine.add(*(make_request(i, tenant="early") for i in range(50, 60)))
    engine.add(*(make_request(i, tenant="late") for i in range(60, 70)))
    engine.run()
    assert sorted(request_id < 60 for request_id in engine.admitted[50:60]) == [False] * 5 + [True] * 5


def test_tenants_served_alike_go_by_arrival():
    """Catches ties broken by name or by table order, in which somebody may lose every time."""
    engine = FakeEngine(ROOMY, growth=5)
    engine.add(*(make_request(i, tenant=tenant) for i, tenant in enumerate("bacabc")))
    engine.run()
    assert engine.admitted[:2] == [0, 1]
    assert engine.admitted.index(3) > engine.admitted.index(2), "c has had nothing yet"


def test_a_prompt_read_again_after_preemption_is_not_counted_again():
    """Catches a tenant that loses its place twice: its row, and then its turn."""
    limits = SchedulerLimits(max_rows=2, max_positions=200, max_waiting=9, prefill_tokens_per_step=400, headroom=5)
    scheduler = Scheduler(limits)
    scheduler.add_all([make_request(0, tenant="a", prompt=90, new=50), make_request(1, tenant="b", prompt=70, new=50)])
    scheduler.schedule(0)
    scheduler.prefilled(0, 89)
    scheduler.prefilled(1, 69)
    scheduler.grew(0, 40)
    assert scheduler.schedule(0).preempt == [1]
    scheduler.finished(0)
    assert scheduler.schedule(0).admit[0].request_id == 1
    # a was served 130 positions; b was served 70, but 140 if it were charged twice.
    scheduler.add_all([make_request(2, tenant="a"), make_request(3, tenant="b")])
    assert scheduler.schedule(0).admit[0].request_id == 3


@pytest.mark.parametrize(
    ("timeouts", "complaint"),
    [
        (Timeouts(queue_s=30), "still queued after 30.5 s; the limit is 30 s"),
        (Timeouts(first_token_s=30, total_s=40), "no token yet after 30.5 s; the limit is 30 s"),
        (Timeouts(queue_s=35, first_token_s=40, total_s=30), "not finished after 30.5 s; the limit is 30 s"),
    ],
)
def test_a_waiting_request_out_of_time_is_given_up_with_the_seconds_and_the_limit(timeouts, complaint):
    """Catches a client that waits for ever, or is not told which limit it met."""
    scheduler = Scheduler(SchedulerLimits(max_rows=1))
    late = make_request(1, timeouts=timeouts, arrived_s=100)
    scheduler.add_all([make_request(0), late])
    assert scheduler.schedule(130).expired == []
    assert scheduler.schedule(130.5).expired == [(late, complaint)]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)


def test_a_timeout_ends_with_its_milestone():
    """Catches a queue limit that kills a running request, and a first-token limit that kills one with tokens."""
    scheduler = Scheduler(ROOMY)
    request = make_request(0, prompt=1, timeouts=Timeouts(queue_s=10, first_token_s=20, total_s=30))
    scheduler.add(request)
    assert scheduler.schedule(9).admit == [request]
    assert scheduler.schedule(15).expired == []
    scheduler.grew(0, 1)
    assert scheduler.schedule(25).expired == []
    assert scheduler.schedule(31).expired == [(request, "not finished after 31.0 s; the limit is 30 s")]
    assert scheduler.num_running == 0


def test_a_step_costs_the_same_however_many_wait():
    """Catches a scan of the queue in every step, counted in calls of functions."""

    def num_calls(num_waiting: int) -> int:
        scheduler = Scheduler(ROOMY)
        scheduler.add_all([make_request(i, timeouts=Timeouts(60, 60, 60)) for i in range(num_waiting)])
        calls = []
        sys.setprofile(lambda _frame, event, _arg: calls.append(event))
        try:
            scheduler.schedule(1.0)
        finally:
            sys.setprofile(None)
        return len(calls)

    assert num_calls(1000) == num_calls(10)


def test_requests_that_ended_leave_nothing_behind():
    """Catches deadlines, entries or tenants that pile up in a server that never stands idle."""
    engine = FakeEngine(SchedulerLimits(max_rows=4, max_waiting=8, headroom=5), growth=5)
    engine.add(make_request(0, new=9000))
    for i in range(1, 600):
        engine.add(make_request(i, timeouts=Timeouts(600, 600, 600)), make_request(i + 1000, timeouts=Timeouts(600)))
        engine.scheduler.cancel(i + 1000)
        engine.drop(i + 1000)
        engine.step(now_s=0.01 * i)
    assert len(engine.finished) > 500
    sizes = [len(value) for value in vars(engine.scheduler).values() if isinstance(value, dict | list)]
    assert max(sizes) < 30


class Simulation(RuleBasedStateMachine):
    """Random arrivals, cancels, timeouts and growth under tight bounds; time is the step's number."""

    def __init__(self) -> None:
        super().__init__()
        limits = SchedulerLimits(max_rows=4, max_positions=90, max_waiting=6, prefill_tokens_per_step=7, headroom=3)
        self.engine, self.now_s, self.num_added = FakeEngine(limits), 0.0, 0

    @rule(
        sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 45)), min_size=1, max_size=3),
        tenant=st.sampled_from("abc"), limits_s=st.tuples(*[st.sampled_from([2.5, 9.5, 30.5, float("inf")])] * 3),
    )
    def add(self, sizes, tenant, limits_s) -> None:
        first = self.num_added
        requests = [
            make_request(
                first + i, tenant=tenant, prompt=prompt, new=new, timeouts=Timeouts(*limits_s), arrived_s=self.now_s,
                call_id=first,
            )
            for i, (prompt, new) in enumerate(sizes)
        ]
        num_waiting = self.engine.scheduler.num_waiting
        try:
            self.engine.add(*requests)
        except QueueFull as full:
            assert num_waiting + len(requests) > 6 and 1 <= full.retry_after_s <= 60
            assert self.engine.scheduler.num_waiting == num_waiting, "all or none"
        else:
            self.num_added += len(requests)

    @rule(max_rows=st.integers(1, 6), rounds=st.sampled_from([1, 2, 5, 50]), num_positions=st.integers(1, 9))
    def change(self, max_rows, rounds, num_positions) -> None:
        self.engine.change(max_rows=max_rows, rounds_per_prefill=rounds, prefill_tokens_per_step=num_positions)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.engine.requests)))
        assert self.engine.scheduler.cancel(request_id)
        assert not self.engine.scheduler.cancel(request_id)
        self.engine.drop(request_id)

    @rule(num_steps=st.integers(1, 6), seed=st.integers(0, 1000))
    def steps(self, num_steps, seed) -> None:
        self.engine.chance.seed(seed)
        for _ in range(num_steps):
            overdue = {i for i in self.engine.requests if self._is_overdue(i)}
            plan = self.engine.step(self.now_s)
            assert {request.request_id for request, _ in plan.expired} == overdue
            self.now_s += 1

    def _is_overdue(self, request_id: int) -> bool:
        request = self.engine.requests[request_id]
        has_token = len(self.engine.texts[request_id]) > len(request.prompt_ids)
        age_s, timeouts = self.now_s - request.arrived_s, request.timeouts
        return (
            age_s > timeouts.total_s
            or (age_s > timeouts.first_token_s and not has_token)
            or (age_s > timeouts.queue_s and request_id not in self.engine.admitted)
        )

    @invariant()
    def counts_agree(self) -> None:
        engine = self.engine
        assert engine.scheduler.num_waiting == len(engine.requests) - len(engine.rows)
        assert len(engine.requests) <= 4 + 6 and engine.scheduler.num_places == 4 + 6 - len(engine.requests)

    def teardown(self) -> None:
        """Whatever is left ends: nothing holds another up for ever."""
        self.engine.run()
        assert self.engine.scheduler.num_waiting == 0


TestSimulation = Simulation.TestCase
TestSimulation.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
