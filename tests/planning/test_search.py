"""Branch and bound: it finds what looking at every plan finds, looks at few, and says what would be possible."""

import math
import random
import re
from dataclasses import dataclass, field

import pytest

from dvi.planning.frontier import RUNG, find_frontier
from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.planning.search import BATCH_PLANS, NoFeasiblePlan, search
from dvi.planning.simulator import Simulator
from dvi.records import ServingPlan
from tests.support.planning_doubles import synthetic

SPACE = PlanSpace(split_layer=(1, 2), num_draft_tokens=(0, 2, 4, 8), max_rows=(1, 4, 16), tensor_parallel=(1, 2))


@dataclass
class Arithmetic:
    """An evaluator in closed form. Its bounds are loose by `slack`, a factor; asked holds every plan it forecast."""

    acceptance: float = 0.7
    row_s: float = 0.002
    slack: float = 1.0
    asked: list[ServingPlan] = field(default_factory=list)

    def forecast(self, plans):
        self.asked += plans
        return [self._between(plan, plan, 1.0) for plan in plans]

    def optimistic(self, lowest, highest):
        return self._between(lowest, highest, self.slack)

    def _between(self, lowest, highest, slack):
        round_s = (0.01 + self.row_s * lowest.max_rows * (1 + lowest.num_draft_tokens / 4)) / highest.tensor_parallel
        reading_s = 2e-5 * lowest.prefill_tokens_per_step / highest.rounds_per_prefill
        tokens = sum((self.acceptance + 0.1 * highest.split_layer) ** i for i in range(highest.num_draft_tokens + 1))
        token_s = (round_s + reading_s) / tokens / slack
        first_token_s = round_s * lowest.rounds_per_prefill * 512 / highest.prefill_tokens_per_step / slack
        return Forecast(highest.max_rows / token_s, token_s, 1.5 * token_s, first_token_s, 2 * first_token_s)


def by_looking_at_all(space, bound, evaluator):
    """(whether any plan meets the bound, the best plan, else the one that violates it least)."""
    found = list(zip(space, evaluator.forecast(list(space)), strict=True))
    feasible = [(plan, forecast) for plan, forecast in found if forecast.meets(bound)]
    if feasible:
        return True, max(feasible, key=lambda pair: pair[1].tokens_per_s)[0]  # of equals the first

    def violation(pair):
        gives = pair[1]
        excess = max(gives.token_p99_s / bound.token_s, gives.first_token_p99_s / bound.first_token_s)
        return excess, -gives.tokens_per_s

    return False, min(found, key=violation)[0]


def by_search(space, bound, evaluator, **options):
    """(whether any plan meets the bound, the result)."""
    try:
        return True, search(space, bound, evaluator, **options)
    except NoFeasiblePlan as error:
        return False, error.nearest


def random_bound(space, evaluator, chance):
    """One that some plan just meets, in one latency or in both; or one that none meets."""
    forecasts = evaluator.forecast(chance.sample(list(space), 2))
    token_s, first_token_s = forecasts[0].token_p99_s, forecasts[1].first_token_p99_s
    kind = chance.choice(("token", "first token", "both", "loose", "impossible"))
    return {
        "token": LatencyBound(token_s), "first token": LatencyBound(first_token_s=first_token_s),
        "both": LatencyBound(token_s, first_token_s), "loose": LatencyBound(10 * token_s, 10 * first_token_s),
        "impossible": LatencyBound(token_s / 1000, first_token_s),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("slack", [1.0, 1.3])
def test_a_search_by_arithmetic_finds_what_looking_at_every_plan_finds(slack):
    """Catches pruning a box that holds the best plan, and ties that go another way; bounds may be loose."""
    for seed in range(60):
        chance = random.Random(seed)
        evaluator = Arithmetic(chance.uniform(0.2, 0.7), row_s=10 ** chance.uniform(-4, -2), slack=slack)
        bound = random_bound(SPACE, evaluator, chance)
        is_feasible, result = by_search(SPACE, bound, evaluator)
        assert (is_feasible, result.best) == by_looking_at_all(SPACE, bound, evaluator), seed
        assert result.is_proved and result.forecast == evaluator.forecast([result.best])[0]


def test_of_plans_that_give_the_same_the_first_of_the_space_is_best():
    """Catches a tie that batches or the order of the queue decide: two runs on one profile would disagree."""

    class Alike:
        def forecast(self, plans):
            return [Forecast(100.0, 0.01, 0.02, 0.1, 0.2) for _ in plans]

        def optimistic(self, lowest, highest):  # the last plans promise more than the first
            return Forecast(150.0 if highest.max_rows == 16 else 100.0, 0.01, 0.02, 0.1, 0.2)

    result = search(SPACE, LatencyBound(), Alike())
    assert result.best == next(iter(SPACE))


def test_with_exact_bounds_one_batch_of_simulations_is_enough():
    """Catches a search that simulates what its bounds have ruled out, and a miscount."""
    evaluator = Arithmetic()
    result = search(SPACE, LatencyBound(token_s=0.02), evaluator)
    assert result.num_simulations == len(evaluator.asked) <= BATCH_PLANS
    assert result.num_bounds < len(SPACE) and result.simulated.keys() == set(evaluator.asked)


def test_forecasts_that_are_known_are_not_made_again():
    """Catches a frontier whose every rung pays for its plans anew."""
    evaluator = Arithmetic(slack=1.3)
    first = search(SPACE, LatencyBound(token_s=0.02), evaluator)
    again = search(SPACE, LatencyBound(token_s=0.02), evaluator, known=first.simulated)
    assert (again.best, again.forecast, again.num_simulations) == (first.best, first.forecast, 0)
    assert len(evaluator.asked) == first.num_simulations


def test_a_search_cut_short_says_that_nothing_is_proved():
    """Catches a plan that is called the best of the space after one batch of it."""
    evaluator = Arithmetic(slack=4.0)
    result = search(SPACE, LatencyBound(token_s=0.02), evaluator, max_simulations=1)
    assert result.num_simulations == BATCH_PLANS and not result.is_proved
    assert result.forecast.meets(LatencyBound(token_s=0.02))


@pytest.mark.parametrize(
    ("bound", "unit", "options"),
    [
        (LatencyBound(token_s=1e-6), "at most 0.001 ms a token for", ["--max-token-latency-ms"]),
        (LatencyBound(first_token_s=1e-6), "at most 0.001 ms to the first token for", ["--max-first-token-ms"]),
        (
            LatencyBound(1e-6, 1e-6), "at most 0.001 ms a token and 0.001 ms to the first token for",
            ["--max-token-latency-ms", "--max-first-token-ms"],
        ),
    ],
)
def test_an_impossible_bound_is_refused_with_one_that_would_do(bound, unit, options):
    """Catches a remedy that is refused as well, by rounding or because the other latency was forgotten."""
    evaluator = Arithmetic(slack=1.2)
    with pytest.raises(NoFeasiblePlan, match=r"no plan gives at most .* for 99 requests of 100;") as caught:
        search(SPACE, bound, evaluator)
    message = str(caught.value)
    assert unit in message and f"max_rows {caught.value.nearest.best.max_rows}" in message
    found = dict(re.findall(r"(--max-\S+) (\S+)", message))
    assert list(found) == options
    asked = [float(found.get(option, math.inf)) / 1e3 for option in ("--max-token-latency-ms", "--max-first-token-ms")]
    assert caught.value.nearest.forecast.meets(LatencyBound(*asked))
    assert search(SPACE, caught.value.remedy, evaluator).forecast.meets(caught.value.remedy)


def test_the_frontier_is_the_best_plan_under_every_bound_and_makes_no_forecast_twice():
    """Catches a step that a better plan stands above, a rung skipped, and wasted simulations."""
    evaluator = Arithmetic(slack=1.1)
    bound = LatencyBound(token_s=0.02, first_token_s=0.5)
    known = search(SPACE, bound, evaluator).simulated
    frontier = find_frontier(SPACE, bound, evaluator, known=known)
    assert len(evaluator.asked) == len(set(evaluator.asked)) == len(frontier.simulated)
    latencies = [choice.forecast.token_p99_s for choice in frontier.choices]
    speeds = [choice.forecast.tokens_per_s for choice in frontier.choices]
    assert len(latencies) >= 3 and latencies == sorted(latencies) and speeds == sorted(speeds)
    for choice, next_latency in zip(frontier.choices, [*latencies[1:], math.inf], strict=True):
        asked = LatencyBound(min(next_latency / RUNG, 1e9), bound.first_token_s)
        assert by_looking_at_all(SPACE, asked, evaluator) == (True, choice.plan)
    beyond = LatencyBound(latencies[0] / RUNG, bound.first_token_s)
    assert not by_looking_at_all(SPACE, beyond, evaluator)[0]


@dataclass
class Table:
    """An evaluator that has every forecast already, and the bounds of the simulator that made them."""

    simulator: Simulator
    forecasts: dict[ServingPlan, Forecast]

    def forecast(self, plans):
        return [self.forecasts[plan] for plan in plans]

    def optimistic(self, lowest, highest):
        return self.simulator.optimistic(lowest, highest)


def check_on_a_synthetic_machine(seed):
    profile, workload = synthetic(seed)
    space = PlanSpace(split_layer=profile.split_layers, tensor_parallel=profile.degrees)
    simulator = Simulator(profile, workload, num_requests=64)
    table = Table(simulator, dict(zip(space, simulator.forecast(list(space)), strict=True)))
    bound = random_bound(space, table, random.Random(seed))
    is_feasible, result = by_search(space, bound, table)
    assert (is_feasible, result.best) == by_looking_at_all(space, bound, table), f"{seed}: {bound}"
    assert result.is_proved and result.num_simulations <= 0.1 * len(space), f"{seed}: {bound}"


@pytest.mark.parametrize("seed", range(4))
def test_a_search_by_simulation_finds_what_looking_at_every_plan_finds_with_a_tenth_of_the_simulations(seed):
    """Catches limits that a simulation beats, and limits too loose to spare any."""
    check_on_a_synthetic_machine(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 200))
def test_so_it_does_on_two_hundred_machines(seed):
    """Catches what only an odd machine shows: answers shorter than a turn, prompts shorter than a piece."""
    check_on_a_synthetic_machine(seed)
