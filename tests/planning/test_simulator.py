"""The simulator: it does what the scheduler does, forecasts are a plan's own, and none beats the limits of its box."""

import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from dvi.planning.plans import Forecast, PlanSpace
from dvi.planning.profile import LatencyProfile, Overheads
from dvi.planning.simulator import Simulator, _Run
from dvi.planning.steps import Requests, spread_out
from dvi.planning.workload import AcceptanceModel, Workload
from dvi.records import SamplingParams, ServingPlan
from dvi.serving.request import Request
from dvi.serving.scheduler import Scheduler, SchedulerLimits
from tests.support.planning_doubles import synthetic


def space_of(profile):
    return PlanSpace(
        split_layer=profile.split_layers, num_draft_tokens=(0, 1, 3, 8), max_rows=(1, 3, 16),
        prefill_tokens_per_step=(24, 96, 512), rounds_per_prefill=(1, 3, 16), tensor_parallel=profile.degrees,
    )  # fmt: skip


def some_plans(profile, num, chance):
    return chance.sample(list(space_of(profile)), num)


def without_growth(profile):
    """The same machine, on which cached positions cost nothing."""
    passes = {
        key: dataclasses.replace(one, round_s=(one.round_s[0],) * 2, prefill_s=(one.prefill_s[0],) * 2)
        for key, one in profile.passes.items()
    }
    return dataclasses.replace(profile, passes=passes)


def by_the_scheduler(simulator, plan):
    """The slow clear version: one plan, step by step, planned by the server's own scheduler."""
    times, requests = simulator.times, simulator.requests
    (round_ns, growth), (read_ns, read_growth) = times.rounds(plan), times.reading(plan)
    rounds_N, new_N, reading_N = (
        requests.rounds(plan.split_layer, plan.num_draft_tokens), requests.new_N, requests.reading_N
    )
    num, num_rows, now_ns = len(new_N), plan.max_rows, 0.0
    scheduler = Scheduler(SchedulerLimits(
        max_rows=num_rows, max_positions=10**9, prefill_tokens_per_step=plan.prefill_tokens_per_step,
        rounds_per_prefill=plan.rounds_per_prefill,
    ))  # fmt: skip
    rows = {}  # by number: rounds left and, of the others, when what happened

    def add(number, *, left=None):
        is_begun = left is not None
        prompt_ids = [0] * (1 if is_begun else 1 + reading_N[number % num])
        scheduler.add(Request(number, prompt_ids, SamplingParams(max_new_tokens=10**6)))
        rows[number] = SimpleNamespace(
            left=left if is_begun else rounds_N[number % num], admitted_ns=now_ns, first_ns=None, read=0
        )

    begun_B = requests.begun(num_rows)
    for row in range(num_rows):
        number = row - 2 * num_rows
        add(number, left=math.ceil(begun_B[row] * rounds_N[number % num]))
    following, firsts, tokens = -num_rows, {}, {}
    sums = np.zeros(4)
    while len(firsts) < num:
        is_counted = 0 < following <= num
        step = scheduler.schedule(0.0)
        reading_ns = 0.0
        for number, positions in step.prefill:
            reading_ns += read_ns[positions] + np.rint(read_growth[positions] * rows[number].read)
            scheduler.prefilled(number, positions)
            rows[number].read += positions
        is_reading = {number for number, row in rows.items() if scheduler._running[number].num_missing}
        decoding = [number for number in rows if number not in is_reading]
        step_ns = 0.0
        if decoding:
            longest = max(cached(requests, rounds_N, rows[number], number) for number in decoding)
            step_ns = round_ns[len(decoding)] + np.rint(growth[len(decoding)] * (longest + plan.num_draft_tokens + 1))
        now_ns += reading_ns + step_ns
        if is_counted:
            sums += step_ns, len(decoding), reading_ns, sum(positions for _, positions in step.prefill)
        num_ended = 0
        for number in decoding:
            row = rows[number]
            row.first_ns = row.first_ns or now_ns
            row.left -= 1
            scheduler.grew(number, 1)
            if row.left == 0:
                num_ended += 1
                scheduler.finished(number)
                del rows[number]
                if 0 <= number < num:
                    firsts[number] = row.first_ns - row.admitted_ns
                    tokens[number] = (now_ns - row.first_ns) / max(new_N[number] - 1, 1)
        now_ns += num_ended * times.request_ns
        for _ in range(num_ended):
            add(following)
            following += 1
    request_ns = rounds_N.mean() * sums[0] / sums[1] + times.request_ns
    request_ns += reading_N.mean() * sums[2] / max(sums[3], 1)
    stretch_s = 1e-9 / (1 - simulator.workload.learner_share)
    several = [tokens[number] for number in range(num) if new_N[number] > 1]
    token_s, first_s = (
        np.quantile(values, (0.5, 0.99)) * stretch_s for values in (several, [firsts[number] for number in range(num)])
    )
    return Forecast(new_N.mean() / (request_ns * stretch_s), *token_s, *first_s)


def cached(requests, rounds_N, row, number):
    index = number % len(rounds_N)
    pace = requests.new_N[index] / rounds_N[index]
    return requests.reading_N[index] + pace * (rounds_N[index] - row.left)


def simulated(simulator, plan):
    """Without the limits."""
    run = _Run([plan], simulator.times, simulator.requests, learner_share=simulator.workload.learner_share)
    return run.forecasts()[0]


@pytest.mark.parametrize("seed", range(6))
def test_the_simulation_does_what_the_scheduler_does(seed):
    """Catches prompts read out of turn, a row that decodes too early, a stretch of rounds too long: all of the order
    that the fast version takes a short way through."""
    profile, workload = synthetic(seed)
    simulator = Simulator(without_growth(profile), workload, num_requests=24)
    for plan in some_plans(profile, 8, random.Random(seed)):
        fast, slow = simulated(simulator, plan), by_the_scheduler(simulator, plan)
        assert list(vars(fast).values()) == pytest.approx(list(vars(slow).values()), rel=1e-9), plan


def test_cached_positions_cost_in_a_stretch_of_rounds_what_they_cost_in_each():
    """Catches a context that stands still, or one row's instead of the longest's. Half-way is not quite the mean."""
    profile, workload = synthetic(2)
    passes = {
        key: dataclasses.replace(one, round_s=(one.round_s[0], tuple(
            tuple(2 * seconds for seconds in by_rows) for by_rows in one.round_s[0]
        ))) for key, one in profile.passes.items()
    }  # fmt: skip
    simulator = Simulator(dataclasses.replace(profile, passes=passes), workload, num_requests=24)
    for plan in some_plans(profile, 8, random.Random(2)):
        fast, slow = simulated(simulator, plan), by_the_scheduler(simulator, plan)
        assert list(vars(fast).values()) == pytest.approx(list(vars(slow).values()), rel=0.01), plan


def test_a_plan_forecasts_the_same_whichever_plans_are_beside_it():
    """Catches sums whose order follows the batch: a search would judge by its own history."""
    profile, workload = synthetic(1)
    plans = some_plans(profile, 20, random.Random(0))
    together = Simulator(profile, workload, num_requests=24).forecast(plans)
    apart = Simulator(profile, workload, num_requests=24)
    assert together == [apart.forecast([plan])[0] for plan in reversed(plans)][::-1]


@pytest.mark.parametrize("seed", range(8))
def test_no_forecast_beats_the_limits_of_a_box_that_holds_its_plan(seed):
    """Catches a part of a limit that is taken at the wrong corner: branch and bound would prune the best plan."""
    profile, workload = synthetic(100 + seed)
    simulator, chance = Simulator(profile, workload, num_requests=16), random.Random(seed)
    plans = some_plans(profile, 40, chance)
    forecasts = simulator.forecast(plans)
    for _ in range(60):
        corners = [dataclasses.astuple(plan) for plan in chance.sample(plans, 2)]
        lowest, highest = (ServingPlan(*(pick(pair) for pair in zip(*corners, strict=True))) for pick in (min, max))
        limit = simulator.optimistic(lowest, highest)
        for plan, forecast in zip(plans, forecasts, strict=True):
            between = zip(*map(dataclasses.astuple, (lowest, plan, highest)), strict=True)
            if all(low <= value <= high for low, value, high in between):
                assert forecast.tokens_per_s <= limit.tokens_per_s
                assert forecast.token_p50_s >= limit.token_p50_s and forecast.token_p99_s >= limit.token_p99_s
                assert forecast.first_token_p50_s >= limit.first_token_p50_s
                assert forecast.first_token_p99_s >= limit.first_token_p99_s


def test_limits_are_near_what_single_plans_give_and_seldom_change_it():
    """Catches limits too loose to search by, and laws that do not hold: they would be what is forecast."""
    near, changed = [], []
    for seed in range(6):
        profile, workload = synthetic(seed)
        simulator = Simulator(profile, workload, num_requests=96)
        for plan in some_plans(profile, 12, random.Random(seed)):
            found, limit = simulated(simulator, plan), simulator.optimistic(plan, plan)
            near.append(found.tokens_per_s / limit.tokens_per_s)
            changed.append(max(
                found.tokens_per_s / limit.tokens_per_s, limit.token_p99_s / max(found.token_p99_s, 1e-12),
                limit.first_token_p99_s / found.first_token_p99_s,
            ) > 1.05)  # fmt: skip
    assert np.median(near) > 0.93 and np.mean(changed) < 0.05


def one_kind(prompt, new, acceptance=(), **settings):
    """A workload of requests that are all alike, at split layer 1."""
    return Workload(((prompt, new),), {1: AcceptanceModel.constant(acceptance or (0.5,))}, **settings)


def test_rows_alone_give_what_arithmetic_says():
    """Catches a unit, a round too many, and overheads that are left out."""
    [(layer, degree)] = list(synthetic(1)[0].passes)[:1]
    profile = without_growth(synthetic(1)[0])
    profile = LatencyProfile(
        {(1, 1): profile.passes[layer, degree]}, Overheads(step_s=1e-3, row_s=2e-3, token_s=3e-3, request_s=4e-3)
    )
    plan = ServingPlan(1, 0, 1, 512)
    [forecast] = Simulator(profile, one_kind(33, 10), num_requests=8).forecast([plan])
    round_s = profile.passes[1, 1].round_s[0][0][0] + 6e-3
    read_s = profile.passes[1, 1].prefill_s[0][1]  # of 32 positions
    assert forecast.first_token_p99_s == pytest.approx(read_s + round_s, rel=1e-6)
    assert forecast.token_p50_s == pytest.approx(round_s, rel=1e-6)
    assert forecast.tokens_per_s == pytest.approx(10 / (read_s + 10 * round_s + 4e-3), rel=1e-6)


def test_a_learners_share_stretches_every_second():
    """Catches a budget that only throughput pays for."""
    profile, workload = synthetic(5)
    plans = some_plans(profile, 5, random.Random(0))
    free, shared = (
        Simulator(profile, dataclasses.replace(workload, learner_share=share), num_requests=16).forecast(plans)
        for share in (0.0, 0.2)
    )
    for one, other in zip(free, shared, strict=True):
        assert other.tokens_per_s == pytest.approx(0.8 * one.tokens_per_s)
        assert other.token_p99_s == pytest.approx(one.token_p99_s / 0.8)
        assert other.first_token_p99_s == pytest.approx(one.first_token_p99_s / 0.8)


def test_a_drafter_further_on_its_curve_makes_a_faster_server():
    """Catches a forecast at the wrong place on the learning curve."""
    profile, workload = synthetic(6)
    layer = profile.split_layers[0]
    learning = {layer: AcceptanceModel((0.1,), (0.9,), tau_tokens=1000.0)}
    speeds = [
        Simulator(profile, dataclasses.replace(workload, acceptance=learning, tokens_seen=seen), num_requests=16)
        .forecast([ServingPlan(layer, 4, 1, 256)])[0].tokens_per_s
        for seen in (0.0, 1000.0, math.inf)
    ]  # fmt: skip
    assert speeds[0] < speeds[1] < speeds[2]


def test_requests_take_no_more_rounds_with_longer_drafts_and_as_many_as_tokens_without():
    """Catches draws that differ between draft lengths: plans would differ by chance."""
    _, workload = synthetic(3)
    requests, layer = Requests(workload, seed=0, num_requests=50), min(workload.acceptance)
    rounds = [requests.rounds(layer, length) for length in range(9)]
    assert (rounds[0] == requests.new_N).all()
    assert all((after <= before).all() for before, after in itertools.pairwise(rounds))


def test_easy_and_hard_requests_together_accept_as_given():
    """Catches a spread that moves the mean: a workload with one would promise another throughput."""
    rng = np.random.default_rng(0)
    new_N, given_T = rng.integers(5, 200, 400), (0.8, 0.7, 0.9)
    chance_TN = spread_out(given_T, rng.normal(0.3, 1.0, 400), new_N=new_N)
    reached_TN = np.vstack([np.ones(400), chance_TN.cumprod(axis=0)])
    rounds_N = new_N / reached_TN.sum(axis=0)
    for depth, given in enumerate(given_T):
        reached_N = rounds_N * reached_TN[depth]
        assert (reached_N @ chance_TN[depth]) / reached_N.sum() == pytest.approx(given, abs=1e-3)


def test_what_nobody_knows_is_refused_by_name():
    """Catches a guess in place of an acceptance or of a measurement."""
    profile, workload = synthetic(7)
    layer = profile.split_layers[0]
    blind = Simulator(profile, dataclasses.replace(workload, acceptance={}), num_requests=4)
    assert blind.forecast([ServingPlan(layer, 0, 1, 64)])[0].tokens_per_s > 0  # who drafts nothing needs none
    with pytest.raises(ValueError, match=f"acceptance at split_layer {layer}"):
        blind.forecast([ServingPlan(layer, 1, 1, 64)])
    with pytest.raises(ValueError, match=r"split_layer 99 .* must be measured first"):
        blind.forecast([ServingPlan(99, 0, 1, 64)])
    with pytest.raises(ValueError, match="num_requests must be >= 1, got 0"):
        Simulator(profile, workload, num_requests=0)
