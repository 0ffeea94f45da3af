"""What plans would give: continuous batching under steady load, simulated step by step for many plans at once.

Knows what steps take, requests, and the scheduler's order of things; no model, no clock.
"""
# P plans, B rows, N requests.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dvi.planning.limits import Limits
from dvi.planning.plans import Forecast
from dvi.planning.profile import LatencyProfile
from dvi.planning.steps import Requests, StepTimes
from dvi.planning.workload import Workload
from dvi.records import ServingPlan

NUM_REQUESTS = 256  # 99 of 100 are then told from the two or three slowest
NEVER = np.iinfo(np.int64).max // 4


class Simulator:
    """What each plan gives for this workload on this machine; see `forecast`.

    Seconds are whole nanoseconds: sums are then exact, and a plan's forecast is the same whichever plans are beside it.
    """

    def __init__(
        self, profile: LatencyProfile, workload: Workload, *, seed: int = 0, num_requests: int = NUM_REQUESTS
    ) -> None:
        """num_requests: counted ones; those that fill the rows before and after are not."""
        if num_requests < 1:
            raise ValueError(f"num_requests must be >= 1, got {num_requests}; {NUM_REQUESTS} tells 99 of 100")
        self.profile, self.workload = profile, workload
        self.requests = Requests(workload, seed=seed, num_requests=num_requests)
        self.times = StepTimes(profile, self.requests)
        self._limits = Limits(
            self.times, self.requests, places=profile.passes, learner_share=workload.learner_share
        )

    def forecast(self, plans: Sequence[ServingPlan]) -> list[Forecast]:
        """What each plan gives, whichever others are asked for with it.

        As many requests are there as the plan has rows, each followed by the next. A step reads prompts, first come
        first served, up to prefill_tokens_per_step, if it is the turn or no row decodes, and then goes one round over
        all rows whose prompts are read. In the beginning every row is in the middle of an answer; as many requests
        again are let go by, and then num_requests are counted. The tokens per second are those of the mean request: its
        rounds, at the seconds that a row's round took while the counted ones came in, and likewise its reading.
        Raises ValueError for what the profile or the workload does not know.
        """
        groups: dict[int, list[int]] = {}
        for index, plan in enumerate(plans):
            groups.setdefault(plan.max_rows, []).append(index)
        forecasts: dict[int, Forecast] = {}
        for indices in groups.values():
            forecasts |= zip(indices, _Run(
                [plans[index] for index in indices], self.times, self.requests,
                learner_share=self.workload.learner_share,
            ).forecasts(), strict=True)
        return [_within(forecasts[index], self.optimistic(plan, plan)) for index, plan in enumerate(plans)]

    def optimistic(self, lowest: ServingPlan, highest: ServingPlan) -> Forecast:
        """A throughput that no plan between the two exceeds, field by field, and latencies that none undercuts.

        See `dvi.planning.limits`; medians are 0. Raises ValueError as `forecast` does.
        """
        return self._limits.over(lowest, highest)


def _within(forecast: Forecast, limit: Forecast) -> Forecast:
    """The forecast without what chance alone has made better than can be in the long run."""
    return dataclasses.replace(
        forecast, tokens_per_s=min(forecast.tokens_per_s, limit.tokens_per_s),
        token_p99_s=max(forecast.token_p99_s, limit.token_p99_s),
        first_token_p99_s=max(forecast.first_token_p99_s, limit.first_token_p99_s),
    )


@dataclass
class _State:
    """Where the plans of a simulation stand, each at a moment of its own; arrays by plan [P], and row [P, B].

    place        of the plan among those that were asked for. turn, most_read, width: of the plan; width is T + 1.
    rounds_PN    that each request takes. round_ns, round_growth [P, B + 1] and read_ns, read_growth [P, W + 1]: see
                 `StepTimes`.
    now_ns       time. begun: number of the request to be admitted next; 0 is the first that counts.
    queued, read  positions of all prompts admitted, and of those the ones read. Prompts are read in the order they
                 came: a row's is what lies between `starts` and `ends`.
    since        rounds since prompts were read last.
    sums         [P, 4] while the counted requests are admitted: nanoseconds of rounds, rounds of rows, nanoseconds of
                 reading, positions read.
    num_counted  counted requests that have ended.
    request      number of each row's request; left: rounds it still takes; admitted_ns, first_ns: when.
    """

    place: np.ndarray
    turn: np.ndarray
    most_read: np.ndarray
    width: np.ndarray
    rounds_PN: np.ndarray
    round_ns: np.ndarray
    round_growth: np.ndarray
    read_ns: np.ndarray
    read_growth: np.ndarray
    now_ns: np.ndarray
    begun: np.ndarray
    queued: np.ndarray
    read: np.ndarray
    since: np.ndarray
    sums: np.ndarray
    num_counted: np.ndarray
    request: np.ndarray
    left: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    admitted_ns: np.ndarray
    first_ns: np.ndarray

    @classmethod
    def at_start(cls, plans: Sequence[ServingPlan], times: StepTimes, requests: Requests) -> _State:
        """Plans with as many rows, each in the middle of an answer."""
        num_plans, num_rows = len(plans), plans[0].max_rows
        rounds_PN = np.array([requests.rounds(plan.split_layer, plan.num_draft_tokens) for plan in plans])
        request = np.tile(np.arange(-2 * num_rows, -num_rows), (num_plans, 1))

        def none(*more: int, dtype: type = np.int64) -> np.ndarray:
            return np.zeros((num_plans, *more), dtype=dtype)

        return cls(
            np.arange(num_plans), np.array([plan.rounds_per_prefill for plan in plans]),
            np.array([plan.prefill_tokens_per_step for plan in plans]),
            np.array([plan.num_draft_tokens + 1 for plan in plans]), rounds_PN,
            *_stack([times.rounds(plan) for plan in plans]), *_stack([times.reading(plan) for plan in plans]),
            now_ns=none(dtype=float), begun=none() - num_rows, queued=none(), read=none(), since=none(),
            sums=none(4, dtype=float), num_counted=none(), request=request,
            left=np.ceil(requests.begun(num_rows) * rounds_PN[:, request[0] % rounds_PN.shape[1]]).astype(np.int64),
            starts=none(num_rows), ends=none(num_rows), admitted_ns=none(num_rows, dtype=float),
            first_ns=none(num_rows, dtype=float),
        )

    def of(self, plans: np.ndarray) -> _State:
        return _State(*(getattr(self, field.name)[plans] for field in dataclasses.fields(self)))


class _Run:
    """One simulation of plans with as many rows: advances all of them until every counted request has ended."""

    def __init__(
        self, plans: Sequence[ServingPlan], times: StepTimes, requests: Requests, *, learner_share: float
    ) -> None:
        self._state = _State.at_start(plans, times, requests)
        self._new_N, self._reading_N, self._num_requests = requests.new_N, requests.reading_N, len(requests.new_N)
        self._request_ns, self._stretch_s = times.request_ns, 1e-9 / (1 - learner_share)
        self._mean_rounds = self._state.rounds_PN.mean(axis=1)
        self._first_PN, self._token_PN = (np.full((len(plans), self._num_requests), math.nan) for _ in range(2))
        self._sums = np.zeros((len(plans), 4))
        self._look_up()

    def forecasts(self) -> list[Forecast]:
        while len(self._state.place):
            self._advance()
            is_over = self._state.num_counted == self._num_requests
            if 2 * is_over.sum() >= len(is_over):  # so that the rest is worth a copy
                self._sums[self._state.place] = self._state.sums
                self._state = self._state.of(~is_over)
                self._look_up()
        round_ns, row_rounds, read_ns, positions = self._sums.T
        request_ns = self._mean_rounds * round_ns / row_rounds + self._request_ns
        if self._reading_N.any():
            request_ns += self._reading_N.mean() * read_ns / np.maximum(positions, 1)
        rates = self._new_N.mean() / (request_ns * self._stretch_s)
        tokens = _quantiles(self._stretch_s * self._token_PN[:, self._new_N > 1])
        firsts = _quantiles(self._stretch_s * self._first_PN)
        return [Forecast(rate, *token, *first) for rate, token, first in zip(
            rates.tolist(), tokens.tolist(), firsts.tolist(), strict=True,
        )]  # fmt: skip

    def _advance(self) -> None:
        """One step that reads, or as many that do not as go by until a request ends or it is the turn to read."""
        state = self._state
        is_decoding = state.ends <= state.read[:, None]
        backlog = state.queued - state.read
        until_turn = np.where(is_decoding.any(axis=1), np.maximum(state.turn - 1 - state.since, 0), 0)
        reads = (backlog > 0) & (until_turn == 0)
        counts = (state.begun > 0) & (state.begun <= self._num_requests)
        read_ns = np.zeros(len(reads))
        if reads.any():
            amount = np.where(reads, np.minimum(state.most_read, backlog), 0)
            read_ns = self._read(amount)
            state.sums[:, 2] += read_ns * counts
            state.sums[:, 3] += amount * counts
            is_decoding = state.ends <= state.read[:, None]
        num_rows = is_decoding.sum(axis=1)
        soonest = np.where(is_decoding, state.left, NEVER).min(axis=1)
        num_rounds = np.where(reads, 1, np.minimum(soonest, np.where(backlog > 0, until_turn, NEVER)))
        num_rounds *= num_rows > 0
        state.since = np.where(reads, 0, state.since + num_rounds)

        # The longest row, half-way through these rounds.
        gone = self._rounds_PR - state.left + (num_rounds[:, None] - 1) / 2
        longest = ((self._cached_PR + self._pace_PR * gone) * is_decoding).max(axis=1)
        growth = _at(state.round_growth, num_rows) * (longest + state.width)
        round_ns = _at(state.round_ns, num_rows) + np.rint(growth)
        state.sums[:, 0] += num_rounds * round_ns * counts
        state.sums[:, 1] += num_rounds * num_rows * counts
        begins = is_decoding & np.isnan(state.first_ns)
        state.first_ns = np.where(begins, (state.now_ns + read_ns + round_ns)[:, None], state.first_ns)
        state.now_ns = state.now_ns + read_ns + num_rounds * round_ns
        state.left = state.left - is_decoding * num_rounds[:, None]
        has_ended = state.left == 0
        if has_ended.any():
            self._note(has_ended)
            self._replace(has_ended)

    def _read(self, amount: np.ndarray) -> np.ndarray:
        """Reads so many positions of each plan's prompts, first come first served; nanoseconds."""
        state = self._state
        begin = np.maximum(state.starts, state.read[:, None])
        state.read = state.read + amount
        piece = np.maximum(np.minimum(state.ends, state.read[:, None]) - begin, 0)
        growth_ns = _at(state.read_growth, piece) * (begin - state.starts)
        return (_at(state.read_ns, piece) + np.rint(growth_ns)).sum(axis=1)

    def _note(self, has_ended: np.ndarray) -> None:
        """Writes down the latencies of the counted requests that have ended."""
        state = self._state
        plan, row = (has_ended & (state.request >= 0) & (state.request < self._num_requests)).nonzero()
        request, first_ns = state.request[plan, row], state.first_ns[plan, row]
        at = state.place[plan], request
        self._first_PN[at] = first_ns - state.admitted_ns[plan, row]
        self._token_PN[at] = (state.now_ns[plan] - first_ns) / np.maximum(self._new_N[request] - 1, 1)
        state.num_counted = state.num_counted + np.bincount(plan, minlength=len(has_ended))

    def _replace(self, has_ended: np.ndarray) -> None:
        """Admits the next request in the place of each that has ended."""
        state = self._state
        num_ended = has_ended.sum(axis=1)
        state.now_ns = state.now_ns + num_ended * self._request_ns
        state.request = np.where(
            has_ended, state.begun[:, None] + has_ended.cumsum(axis=1) - 1, state.request
        )
        state.begun = state.begun + num_ended
        self._look_up()
        positions = self._cached_PR * has_ended
        ends = state.queued[:, None] + positions.cumsum(axis=1)
        state.starts, state.ends = np.where(has_ended, ends - positions, state.starts), np.where(
            has_ended, ends, state.ends
        )
        state.queued = ends[:, -1]
        state.left = np.where(has_ended, self._rounds_PR, state.left)
        state.admitted_ns = np.where(has_ended, state.now_ns[:, None], state.admitted_ns)
        state.first_ns = np.where(has_ended, math.nan, state.first_ns)

    def _look_up(self) -> None:
        """Of each row's request: positions cached before its first round, its rounds, and positions of a round."""
        index = self._state.request % self._num_requests
        self._cached_PR, self._rounds_PR = self._reading_N[index], _at(self._state.rounds_PN, index)
        self._pace_PR = self._new_N[index] / self._rounds_PR


def _at(tables: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Each plan's table [P, X] at that plan's index [P] or indices [P, B]."""
    plan = np.arange(len(tables))
    return tables[plan.reshape(-1, *[1] * (index.ndim - 1)), index]


def _stack(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Pairs of tables of different lengths as two arrays [P, longest], filled up with zeros."""
    longest = max(len(base) for base, _ in pairs)
    return [np.array([np.pad(pair[part], (0, longest - len(pair[part]))) for pair in pairs]) for part in range(2)]


def _quantiles(seconds_PN: np.ndarray) -> np.ndarray:
    """[P, 2] median and 99th percentile over requests; 0 of none."""
    if not seconds_PN.shape[1]:
        return np.zeros((len(seconds_PN), 2))
    return np.quantile(seconds_PN, (0.5, 0.99), axis=1).T
