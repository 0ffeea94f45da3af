"""What no plan of a box can do better, in closed form: the steady state of its best corner, part by part.

Knows what steps take and the drawn requests; simulates nothing.
"""
# B rows, N requests.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dvi.planning.plans import Forecast
from dvi.planning.steps import Requests, StepTimes
from dvi.records import ServingPlan

# How much of typical chance is counted on: of the spread of readings that fall into an answer, and how many times as
# long ago the last reading was. With these, of 420 simulations of 192 requests on 14 made-up machines, 3 lay beyond a
# limit by more than 5 %, and none by 8 %.
STALL_SPREAD, CALM = 0.7, 2.0


class Limits:
    """Bounds over boxes of plans.

    Each part of a step is monotone in each field of a plan, even where the whole is not, and is taken at the corner of
    the box where it is best. What a row's share of a round costs is looked up for each split layer, degree and draft
    length, and every number of rows that may decode together; a position is read at the price of the cheapest piece.

    Rows that decode together are all rows at most. Where prompts come in more slowly than rounds use them up, `supply`
    bounds their mean: C positions every so many rounds are a number of requests a round, each of which stays for its
    rounds. It is never less than one batch, since a step in which no row decodes reads on at once. They are about
    (all^-2 + supply^-2)^-1/2 at least.

    Throughput: a request pays its share of its rounds, and its reading. Token latency: its rounds, and the readings
    that fall into them, for some by chance more. First token: its own reading and round, the rounds between its pieces
    and until the first of them; where requests queue to be read, Little's law.

    These are laws of the long run and of typical chance: one simulation of some hundred requests may lie beyond them.
    What `Simulator.forecast` tells is the worse of the two, for the plan by itself. So no forecast beats the limits of
    a box that holds its plan: they are no stricter than those of the plan alone.
    """

    def __init__(
        self, times: StepTimes, requests: Requests, *, places: Collection[tuple[int, int]], learner_share: float
    ) -> None:
        """places: the pairs of split layer and tensor-parallel degree that there are."""
        self._times, self._requests, self._places = times, requests, sorted(places)
        self._stretch_s = 1e-9 / (1 - learner_share)
        self._mean_reading = float(requests.reading_N.mean())
        rng, num_requests = np.random.default_rng(0), len(requests.new_N)
        even_N = (np.arange(num_requests) + 0.5) / num_requests
        normal_N = np.array([NormalDist().inv_cdf(quantile) for quantile in even_N])
        self._stall_N = STALL_SPREAD * np.maximum(rng.permutation(normal_N), 0)
        self._calm_N = CALM * rng.permutation(-np.log(even_N))
        self._answers = requests.new_N > 1
        self._rounds: dict[tuple[int, ...], _Rounds] = {}
        self._readings: dict[tuple[int, ...], np.ndarray] = {}

    def over(self, lowest: ServingPlan, highest: ServingPlan) -> Forecast:
        """A throughput that no plan between the two, field by field, exceeds, and 99th percentiles that none undercuts.

        Medians are 0: no bound asks for them. Raises ValueError where no split layer and degree lie between the two.
        """
        parts = []
        for layer, degree in self._places:
            if (lowest.split_layer <= layer <= highest.split_layer
                    and lowest.tensor_parallel <= degree <= highest.tensor_parallel):  # fmt: skip
                for length in range(lowest.num_draft_tokens, highest.num_draft_tokens + 1):
                    one = dataclasses.replace(
                        highest, split_layer=layer, tensor_parallel=degree, num_draft_tokens=length
                    )
                    parts.append(self._parts(lowest, one))
        if not parts:
            raise ValueError(f"nothing was measured between {lowest} and {highest}; there are {self._places}")
        request_s, token_s, first_s = (self._stretch_s * min(part) for part in zip(*parts, strict=True))
        return Forecast(float(self._requests.new_N.mean()) / request_s, 0.0, token_s, 0.0, first_s)

    def _parts(self, lowest: ServingPlan, highest: ServingPlan) -> tuple[float, float, float]:
        """Nanoseconds of the mean request's share of all time, and 99th percentiles of token and first token.

        highest: with the split layer, degree and draft length in question.
        """
        rounds, reading_N = self._rounds_of(highest), self._reading_of(highest)
        mean_reading_ns = float(reading_N.mean())

        supply = self._supply(rounds, highest.prefill_tokens_per_step, lowest.rounds_per_prefill)
        batch = max(highest.prefill_tokens_per_step / max(self._mean_reading, 1), 1.0)
        # Rows in rounds that have any, where batches come in by chance.
        most_rows = max(supply / -math.expm1(-supply / batch), 1.0) if supply < math.inf else math.inf
        share_ns = rounds.cheapest_share(min(highest.max_rows, most_rows))
        request_ns = rounds.mean * share_ns + mean_reading_ns + self._times.request_ns

        turn = highest.rounds_per_prefill
        free_rows = lowest.max_rows / (1 + (turn - 1) / 2 / rounds.mean)  # but for those that wait for their turn
        supply = self._supply(rounds, lowest.prefill_tokens_per_step, turn)
        rows = max((free_rows**-2 + supply**-2) ** -0.5, 1.0)
        round_N = rounds.with_rows(rows)
        # Readings that a round meets: those of the others, and none where answers are shorter than the turn.
        met = (rows - 1) / rounds.mean * max(1 - turn / rounds.mean, 0.0)
        piece_ns = mean_reading_ns * lowest.prefill_tokens_per_step / max(self._mean_reading, 1)
        spread_ns = math.sqrt(met * float(reading_N @ np.minimum(reading_N, piece_ns)) / len(reading_N))
        later_N = rounds.rounds_N - 1
        token_N = later_N * (round_N + met * mean_reading_ns) + self._stall_N * np.sqrt(later_N) * spread_ns
        token_N = token_N[self._answers] / (self._requests.new_N[self._answers] - 1)

        waits_N = np.zeros(len(reading_N))  # in rounds; nobody's go on while the only row reads
        if lowest.max_rows > 1:
            turn, positions_N = lowest.rounds_per_prefill, self._requests.reading_N
            calm_N = self._calm_N * rounds.mean / (lowest.max_rows - 1)
            pieces_N = -(-positions_N // highest.prefill_tokens_per_step)
            waits_N = np.maximum(pieces_N - 1, 0) * turn + np.where(pieces_N, np.maximum(turn - 1 - calm_N, 0), 0)
        waiting_N = np.minimum(waits_N, rounds.mean / 2) * rounds.with_rows(max(rows - 1, 1))
        first_N = reading_N + waiting_N + round_N
        queue_ns = max(lowest.max_rows - most_rows, 0.0) * request_ns
        return request_ns, percentile_99(token_N), max(percentile_99(first_N), queue_ns)

    def _supply(self, rounds: _Rounds, prefill_tokens_per_step: int, turn: int) -> float:
        """Rows that reading so much can keep decoding."""
        if not self._mean_reading:
            return math.inf
        return rounds.mean * prefill_tokens_per_step / turn / self._mean_reading

    def _reading_of(self, plan: ServingPlan) -> np.ndarray:
        """[N] nanoseconds to read each prompt in pieces of up to the plan's most, each position at its best price."""
        key = plan.split_layer, plan.tensor_parallel, plan.prefill_tokens_per_step
        if key not in self._readings:
            base_W, growth_W = self._times.reading(plan)
            width_W, positions_N = np.arange(1, len(base_W)), self._requests.reading_N
            behind_N = positions_N * np.maximum(positions_N - plan.prefill_tokens_per_step, 0) / 2
            widest_N = np.clip(positions_N, 1, plan.prefill_tokens_per_step) - 1  # a short prompt has no long piece
            base_N, growth_N = (
                np.minimum.accumulate(table_W[1:] / width_W)[widest_N] for table_W in (base_W, growth_W)
            )
            self._readings[key] = positions_N * base_N + behind_N * growth_N
        return self._readings[key]

    def _rounds_of(self, plan: ServingPlan) -> _Rounds:
        key = plan.split_layer, plan.tensor_parallel, plan.num_draft_tokens, plan.max_rows
        if key not in self._rounds:
            base_B, growth_B = self._times.rounds(plan)
            rounds_N = self._requests.rounds(plan.split_layer, plan.num_draft_tokens)
            self._rounds[key] = _Rounds(
                rounds_N, base_B + growth_B * (plan.num_draft_tokens + 1), growth_B,
                context_N=self._requests.reading_N + self._requests.new_N / 2,
                longest_B=self._requests.longest_contexts(plan.max_rows),
            )
        return self._rounds[key]


@dataclass(frozen=True)
class _Rounds:
    """Rounds with one split layer, degree and draft length.

    rounds_N   that each request takes; context_N: positions it has cached half-way.
    base_B, growth_B  nanoseconds by rows, and more by position cached in the longest row.
    longest_B  positions that the longest of so many rows usually has.
    """

    rounds_N: np.ndarray
    base_B: np.ndarray
    growth_B: np.ndarray
    context_N: np.ndarray
    longest_B: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.rounds_N.mean())

    def cheapest_share(self, rows: float) -> float:
        """The least that a row's share of a round takes where up to so many decode together."""
        usual_B = self.base_B + self.growth_B * self.longest_B
        places = np.append(np.arange(1, int(rows) + 1), rows)
        return float((np.interp(places, np.arange(len(usual_B)), usual_B) / places).min())

    def with_rows(self, rows: float) -> np.ndarray:
        """[N] nanoseconds of a round with so many rows: the longest is each request's own, or another."""
        places = np.arange(len(self.base_B))
        base, growth = (np.interp(rows, places, table_B) for table_B in (self.base_B, self.growth_B))
        return base + growth * np.maximum(self.context_N, np.interp(rows - 1, places, self.longest_B))


def percentile_99(values: np.ndarray) -> float:
    """As `numpy.quantile` has it, in a tenth of its time for so few; 0 of none."""
    if not len(values):
        return 0.0
    ordered = np.sort(values)
    place = 0.99 * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
