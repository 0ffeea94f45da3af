"""The best plan under a latency bound, by branch and bound: few plans are simulated, and no better one is missed.

After ExeGPT (Oh et al., ASPLOS 2024, arXiv 2404.07947). Knows plans and forecasts; how a forecast is made is the
evaluator's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.records import ServingPlan

BATCH_PLANS = 8  # simulated in one call, which takes hardly longer than one; at most 7 of them turn out needless

Rank = tuple[float, float, ServingPlan]


class Evaluator(Protocol):
    """What the search asks; `dvi.planning.simulator.Simulator` answers."""

    def forecast(self, plans: Sequence[ServingPlan]) -> list[Forecast]:
        """What each plan gives, whichever others are asked for with it."""

    def optimistic(self, lowest: ServingPlan, highest: ServingPlan) -> Forecast:
        """A throughput that no plan between the two, field by field, exceeds, and latencies that none undercuts."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and what it took.

    best             the plan of the highest throughput that meets the bound; of equals, the first of the space.
    forecast         what it gives.
    simulated        every forecast made or known before.
    num_simulations  plans simulated in this search.
    num_bounds       boxes of plans that were bounded.
    is_proved        no plan of the space is better; False where `max_simulations` ended the search.
    """

    best: ServingPlan
    forecast: Forecast
    simulated: dict[ServingPlan, Forecast]
    num_simulations: int
    num_bounds: int
    is_proved: bool


class NoFeasiblePlan(ValueError):
    """No plan meets the bound.

    bound    what was asked.
    nearest  the search's result for the plan of the smallest max(latency / bound).
    remedy   the bound raised as far as that plan needs.
    """

    def __init__(self, bound: LatencyBound, nearest: SearchResult) -> None:
        self.bound, self.nearest, gives = bound, nearest, nearest.forecast
        self.remedy = LatencyBound(
            max(bound.token_s, gives.token_p99_s), max(bound.first_token_s, gives.first_token_p99_s)
        )
        needs = (
            ("--max-token-latency-ms", bound.token_s, gives.token_p99_s),
            ("--max-first-token-ms", bound.first_token_s, gives.first_token_p99_s),
        )
        tried = "no plan gives" if nearest.is_proved else f"none of the {nearest.num_simulations} plans tried gives"
        offer = LatencyBound(*(given_s if given_s > asked_s else math.inf for _, asked_s, given_s in needs))
        plan = ", ".join(f"{field.name} {getattr(nearest.best, field.name)}" for field in fields(ServingPlan))
        enough = " ".join(f"{option} {_above_ms(given_s)}" for option, asked_s, given_s in needs if given_s > asked_s)
        super().__init__(f"{tried} {bound}; the nearest gives {offer} ({plan}); {enough} would do")


def search(
    space: PlanSpace, bound: LatencyBound, evaluator: Evaluator, *,
    known: Mapping[ServingPlan, Forecast] | None = None, max_simulations: float = math.inf,
) -> SearchResult:
    """The plan of the most tokens per second whose 99th percentiles meet the bound.

    Best first over boxes of plans, halved by their widest field. A box is left alone as soon as its optimistic forecast
    ranks behind the best plan so far: no plan in it can meet the bound, or none can beat that throughput. The rank is
    (0 or else the largest latency / bound, -throughput, plan), the smallest is best: plans that meet the bound come
    first, by throughput, and then the others, by how little they violate it. A forecast that is better in every number
    never ranks behind, so an optimistic forecast ranks before every plan of its box.

    What makes such a forecast possible is that each part of a simulation is monotone in most fields, even where the
    whole is not. A round takes longer with more rows, and each row's share of it less time; a prompt is read in less
    time in longer pieces, and holds the others up for longer; with more rounds between two readings it waits longer,
    and holds fewer up. So each part is taken at the corner of the box where it is best, see `dvi.planning.limits`.
    Split layer, draft length and tensor-parallel degree have no such order: the best of their few values is taken.

    known            forecasts of earlier searches with the same evaluator: not made again, and not counted.
    max_simulations  the search ends with what it has once that many are made; at least one batch is.
    Raises NoFeasiblePlan.
    """
    simulated, num_simulations, num_bounds = dict(known or {}), 0, 0
    best: Rank = (math.inf, 0.0, _corners(space)[0])  # behind every plan
    queue: list[tuple[Rank, PlanSpace]] = []

    def push(box: PlanSpace) -> None:
        nonlocal num_bounds
        lowest, highest = _corners(box)
        heapq.heappush(queue, (_rank(lowest, evaluator.optimistic(lowest, highest), bound), box))
        num_bounds += 1

    def is_open() -> bool:
        return bool(queue) and queue[0][0] < best

    push(space)
    while is_open() and num_simulations < max_simulations:
        leaves: list[ServingPlan] = []
        while is_open() and len(leaves) < BATCH_PLANS:
            _, box = heapq.heappop(queue)
            if len(box) == 1:
                leaves.extend(box)
            else:
                for half in _halves(box):
                    push(half)
        new = [plan for plan in leaves if plan not in simulated]
        if new:
            simulated |= zip(new, evaluator.forecast(new), strict=True)
            num_simulations += len(new)
        best = min([best, *(_rank(plan, simulated[plan], bound) for plan in leaves)])
    plan = best[-1]
    result = SearchResult(
        best=plan, forecast=simulated[plan], simulated=simulated, num_simulations=num_simulations,
        num_bounds=num_bounds, is_proved=not is_open(),
    )
    if not result.forecast.meets(bound):
        raise NoFeasiblePlan(bound, result)
    return result


def _rank(plan: ServingPlan, forecast: Forecast, bound: LatencyBound) -> Rank:
    worst_ratio = forecast.worst_ratio(bound)
    return 0.0 if worst_ratio <= 1 else worst_ratio, -forecast.tokens_per_s, plan


def _corners(box: PlanSpace) -> tuple[ServingPlan, ServingPlan]:
    values = [getattr(box, field.name) for field in fields(box)]
    return ServingPlan(*(v[0] for v in values)), ServingPlan(*(v[-1] for v in values))


def _halves(box: PlanSpace) -> tuple[PlanSpace, PlanSpace]:
    """The box cut in two across the field with the most values."""
    name = max((field.name for field in fields(box)), key=lambda name: len(getattr(box, name)))
    values = getattr(box, name)
    middle = len(values) // 2
    return replace(box, **{name: values[:middle]}), replace(box, **{name: values[middle:]})


def _above_ms(seconds: float) -> str:
    """Milliseconds of three digits that are more than the seconds, however they are turned back into them."""
    milliseconds = 1e3 * seconds * (1 + 1e-9)  # beyond rounding: 13.000000000000001 must not become 13
    step = 10.0 ** (math.floor(math.log10(milliseconds)) - 2)
    return f"{math.ceil(milliseconds / step) * step:.12g}"
