"""What plans would give: continuous batching under steady load, simulated step by step for many plans at once.

Knows a profile's seconds, a workload and the scheduler's order of things; no model, no clock. A request's rounds are
drawn once and shared by all plans, so that plans differ by what they do and not by chance.
"""
# P plans, R rows, N requests, D depths, J rounds.

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from dvi.planning.plans import Forecast, ServingPlan
from dvi.planning.profile import LatencyProfile
from dvi.planning.workload import MAX_ACCEPTANCE, MIN_ACCEPTANCE, Workload

NUM_REQUESTS = 256  # 99 of 100 are then told from the two or three slowest
NEWTON_STEPS, MAX_LOG_ODDS = 12, 30.0
NEVER = np.iinfo(np.int64).max // 4


class Requests:
    """The requests of a simulation: lengths, and in how many rounds each is answered, the same for every plan.

    prompt_N, new_N    tokens. reading_N: positions to read, all of the prompt but its last token, which opens the first
                       round.
    begun_R            how much of its rounds is still to come for each row's first request, in (0, 1].
    """

    def __init__(self, workload: Workload, *, seed: int, num_requests: int) -> None:
        rng = np.random.default_rng(seed)
        num_samples = len(workload.lengths)
        # Whole shuffles of the sample, so that its mean is kept.
        order = np.concatenate([rng.permutation(num_samples) for _ in range(-(-num_requests // num_samples))])
        self.prompt_N, self.new_N = np.array(workload.lengths, dtype=np.int64)[order[:num_requests]].T
        self.reading_N = self.prompt_N - 1
        quantiles = (np.arange(num_requests) + 0.5) / num_requests
        self._difficulty_N = rng.permutation([NormalDist().inv_cdf(q) for q in quantiles])
        self._luck_NJ = rng.random((num_requests, self.new_N.max()))
        self._begun_rng_seed = int(rng.integers(2**32))
        self._workload = workload
        self._reach: dict[int, np.ndarray] = {}
        self._rounds: dict[tuple[int, int], np.ndarray] = {}

    def begun(self, num_rows: int) -> np.ndarray:
        return 1 - np.random.default_rng(self._begun_rng_seed).random(num_rows)

    def rounds(self, split_layer: int, num_draft_tokens: int) -> np.ndarray:
        """[N] rounds that each request takes. A longer draft never takes more."""
        key = (split_layer if num_draft_tokens else 0), num_draft_tokens
        if key not in self._rounds:
            tokens_NJ = np.ones(self._luck_NJ.shape, dtype=np.int64)
            if num_draft_tokens:
                # Drafted token d is accepted, as those before it, where luck is below the chance of reaching past it.
                for reach_N in self._reach_past(split_layer, num_draft_tokens):
                    tokens_NJ += self._luck_NJ < reach_N[:, None]
            self._rounds[key] = 1 + (tokens_NJ.cumsum(axis=1) < self.new_N[:, None]).sum(axis=1)
        return self._rounds[key]

    def _reach_past(self, split_layer: int, num_draft_tokens: int) -> np.ndarray:
        """[D, N] chance that a round of each request accepts its first 1, 2 ... D drafts."""
        acceptance = self._workload.acceptance.get(split_layer)
        if acceptance is None:
            known = ", ".join(map(str, sorted(self._workload.acceptance)))
            raise ValueError(f"nothing is known of acceptance at split_layer {split_layer}, only at {known or 'none'}")
        reach_DN = self._reach.get(split_layer, np.empty((0, 0)))
        if len(reach_DN) < num_draft_tokens:
            at_D = acceptance.at(self._workload.tokens_seen)
            at_D = [*at_D, *[at_D[-1]] * (num_draft_tokens - len(at_D))]
            reach_DN = self._reach[split_layer] = spread_out(
                at_D, acceptance.spread * self._difficulty_N, new_N=self.new_N
            )
        return reach_DN[:num_draft_tokens]


def spread_out(acceptance_D: Sequence[float], shift_N: np.ndarray, *, new_N: np.ndarray) -> np.ndarray:
    """[D, N] chance of accepting the first 1 .. D drafts, of requests whose log-odds differ by shift_N.

    At each depth all log-odds are moved alike until the rounds of all requests together accept as given: hard texts
    have more rounds and easy ones reach deeper, so without that the mean would be another.
    """
    acceptance_D = np.clip(acceptance_D, MIN_ACCEPTANCE, MAX_ACCEPTANCE)
    reach_DN = np.cumprod(acceptance_D)[:, None].repeat(len(shift_N), axis=1)
    for _ in range(3 if shift_N.any() else 0):  # the weights follow from what they give; the third changes nothing
        weight_N = new_N / (1 + reach_DN.sum(axis=0))  # rounds
        for depth, acceptance in enumerate(acceptance_D):
            log_odds = math.log(acceptance / (1 - acceptance))
            for _ in range(NEWTON_STEPS):
                chance_N = 1 / (1 + np.exp(-np.clip(log_odds + shift_N, -MAX_LOG_ODDS, MAX_LOG_ODDS)))
                slope = weight_N @ (chance_N * (1 - chance_N))
                log_odds += (acceptance * weight_N.sum() - weight_N @ chance_N) / slope
            weight_N = weight_N * chance_N
            reach_DN[depth] = chance_N * (reach_DN[depth - 1] if depth else 1)
    return reach_DN


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
        self._round_ns: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._prefill_ns: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def forecast(self, plans: Sequence[ServingPlan]) -> list[Forecast]:
        """What each plan gives, whichever others are asked for with it.

        As many requests are there as the plan has rows, each followed by the next. A step reads prompts, first come
        first served, up to prefill_tokens_per_step, if it is the turn or no row decodes, and then goes one round over
        all rows whose prompts are read. In the beginning every row is in the middle of an answer; as many requests
        again are let go by, and then num_requests are counted. The tokens per second are those of the mean request: its
        rounds, at the seconds that a row's round took while the counted ones came in, and likewise its reading.
        Raises ValueError for what the profile or the workload does not know.
        """
        return _Run(self, plans).forecasts() if plans else []

    def seconds_per_round(self, plan: ServingPlan) -> tuple[np.ndarray, np.ndarray]:
        """[R + 1] nanoseconds of a step's round by decoding rows, with nothing cached and more by cached position."""
        key = plan.split_layer, plan.tensor_parallel, plan.num_draft_tokens, plan.max_rows
        if key not in self._round_ns:
            more, rows_R = self.profile.overheads, np.arange(plan.max_rows + 1)
            base_R, growth_R = self.profile.of(*key[:2]).rounds(plan.max_rows, plan.num_draft_tokens)
            tokens = self.requests.new_N.sum() / self.requests.rounds(plan.split_layer, plan.num_draft_tokens).sum()
            base_R = base_R + more.step_s + rows_R * (more.row_s + tokens * more.token_s)
            self._round_ns[key] = np.rint(1e9 * base_R), 1e9 * growth_R
        return self._round_ns[key]

    def seconds_per_reading(self, plan: ServingPlan) -> tuple[np.ndarray, np.ndarray]:
        """The same by positions that a step reads of one prompt, up to the plan's most."""
        key = plan.split_layer, plan.tensor_parallel, plan.prefill_tokens_per_step
        if key not in self._prefill_ns:
            base_W, growth_W = self.profile.of(*key[:2]).prefill(plan.prefill_tokens_per_step)
            self._prefill_ns[key] = np.rint(1e9 * base_W), 1e9 * growth_W
        return self._prefill_ns[key]


class _Run:
    """One simulation: state by plan [P] and by plan and row [P, R], all plans at moments of their own.

    now_ns       time. begun: requests admitted so far, less those before the first that counts.
    queued, read positions of all prompts admitted, and of those what is read: prompts are read in the order they came,
                 so a row's is read once `read` has come to its `ends`.
    since        rounds since prompts were read last.
    request      number of each row's request; left: rounds it still takes; admitted_ns, first_ns: of it.
    """

    def __init__(self, simulator: Simulator, plans: Sequence[ServingPlan]) -> None:
        requests = simulator.requests
        self.simulator, self.plans = simulator, plans
        self.prompt_N, self.new_N, self.reading_N = requests.prompt_N, requests.new_N, requests.reading_N
        num_plans, num_requests = len(plans), len(self.new_N)
        self.max_rows = np.array([plan.max_rows for plan in plans])
        self.most_read = np.array([plan.prefill_tokens_per_step for plan in plans])
        self.turn = np.array([plan.rounds_per_prefill for plan in plans])
        self.rounds_PN = np.array([requests.rounds(plan.split_layer, plan.num_draft_tokens) for plan in plans])
        self.width = np.array([plan.num_draft_tokens + 1 for plan in plans])
        self.round_ns, self.round_growth = _stack([simulator.seconds_per_round(plan) for plan in plans])
        self.read_ns, self.read_growth = _stack([simulator.seconds_per_reading(plan) for plan in plans])
        self.request_ns = round(1e9 * simulator.profile.overheads.request_s)
        self.plan_P1 = np.arange(num_plans)[:, None]
        self.is_row = np.arange(self.max_rows.max()) < self.max_rows[:, None]
        self.first_NP, self.token_NP = (np.full((num_plans, num_requests), math.nan) for _ in range(2))
        # Sums while the counted requests come in.
        self.round_sum, self.row_rounds, self.read_sum, self.positions = (np.zeros(num_plans) for _ in range(4))

        self.now_ns = np.zeros(num_plans)
        self.queued, self.read, self.since = (np.zeros(num_plans, dtype=np.int64) for _ in range(3))
        self.begun = -self.max_rows
        self.request = np.arange(self.is_row.shape[1]) - 2 * self.max_rows[:, None]
        index = self.request % num_requests
        rounds = np.ceil(requests.begun(self.is_row.shape[1]) * self.rounds_PN[self.plan_P1, index])
        self.left = np.where(self.is_row, rounds, NEVER).astype(np.int64)
        self.starts, self.ends = (np.zeros(self.is_row.shape, dtype=np.int64) for _ in range(2))
        self.admitted_ns, self.first_ns = (np.zeros(self.is_row.shape) for _ in range(2))
        self._look_up(index)

    def forecasts(self) -> list[Forecast]:
        num_left = self.first_NP.size
        while num_left:
            num_left -= self._advance()
        mean_rounds, mean_reading = self.rounds_PN.mean(axis=1), self.reading_N.mean()
        request_ns = mean_rounds * self.round_sum / self.row_rounds + self.request_ns
        if mean_reading:
            request_ns += mean_reading * self.read_sum / self.positions
        stretch = 1e-9 / (1 - self.simulator.workload.learner_share)
        tokens_per_s = self.new_N.mean() / (request_ns * stretch)
        tokens_s = quantiles(self.token_NP * stretch)
        firsts_s = quantiles(self.first_NP * stretch)
        return [Forecast(float(rate), *token_s, *first_s) for rate, token_s, first_s in zip(
            tokens_per_s, tokens_s.tolist(), firsts_s.tolist(), strict=True,
        )]  # fmt: skip

    def _advance(self) -> int:
        """One step that reads, or as many that do not as go by until a request ends or it is the turn to read."""
        is_decoding = self.is_row & (self.ends <= self.read[:, None])
        backlog = self.queued - self.read
        until_turn = np.where(is_decoding.any(axis=1), np.maximum(self.turn - 1 - self.since, 0), 0)
        reads = (backlog > 0) & (until_turn == 0)
        read_ns = np.zeros(len(self.plans))
        if reads.any():
            read_ns = self._read(np.where(reads, np.minimum(self.most_read, backlog), 0))
            is_decoding = self.is_row & (self.ends <= self.read[:, None])
        num_rows = is_decoding.sum(axis=1)
        soonest = np.where(is_decoding, self.left, NEVER).min(axis=1)
        num_rounds = np.where(reads, 1, np.minimum(soonest, np.where(backlog > 0, until_turn, NEVER)))
        num_rounds = np.where(num_rows > 0, num_rounds, 0)
        self.since = np.where(reads, 0, self.since) + np.where(reads, 0, num_rounds)

        halfway = (num_rounds[:, None] - 1) / 2
        cached = np.where(is_decoding, self.base + self.pace * (self.of_rounds - self.left + halfway), 0).max(axis=1)
        plan_P = self.plan_P1[:, 0]
        growth_ns = self.round_growth[plan_P, num_rows] * (cached + self.width)
        round_ns = self.round_ns[plan_P, num_rows] + np.rint(growth_ns)
        self.first_ns = np.where(
            is_decoding & np.isnan(self.first_ns), (self.now_ns + read_ns + round_ns)[:, None], self.first_ns
        )
        is_counted = (self.begun > 0) & (self.begun <= self.new_N.size)
        for total, amount in (
            (self.round_sum, num_rounds * round_ns), (self.row_rounds, num_rounds * num_rows), (self.read_sum, read_ns)
        ):
            total += np.where(is_counted, amount, 0)
        self.now_ns = self.now_ns + read_ns + num_rounds * round_ns
        self.left -= np.where(is_decoding, num_rounds[:, None], 0)
        return self._follow_up(self.is_row & (self.left == 0))

    def _read(self, amount: np.ndarray) -> np.ndarray:
        """Reads so many positions of each plan's prompts, first come first served; nanoseconds."""
        upto = self.read + amount
        begin = np.maximum(self.starts, self.read[:, None])
        piece = np.maximum(np.minimum(self.ends, upto[:, None]) - begin, 0)
        growth_ns = self.read_growth[self.plan_P1, piece] * (begin - self.starts)
        seconds = self.read_ns[self.plan_P1, piece] + np.rint(growth_ns)
        is_counted = (self.begun > 0) & (self.begun <= self.new_N.size)
        self.positions += np.where(is_counted, amount, 0)
        self.read = upto
        return seconds.sum(axis=1)

    def _follow_up(self, has_ended: np.ndarray) -> int:
        """Puts the next request in the place of each that has ended; how many of those are counted."""
        plan, row = has_ended.nonzero()
        if not len(plan):
            return 0
        request, first_ns, now_ns = self.request[plan, row], self.first_ns[plan, row], self.now_ns[plan]
        counts = (request >= 0) & (request < self.new_N.size)
        at = plan[counts], request[counts]
        self.first_NP[at] = (first_ns - self.admitted_ns[plan, row])[counts]
        with np.errstate(invalid="ignore", divide="ignore"):
            self.token_NP[at] = np.where(
                self.new_N[at[1]] > 1, (now_ns - first_ns)[counts] / (self.new_N[at[1]] - 1), math.nan
            )
        num_ended = has_ended.sum(axis=1)
        nth = has_ended.cumsum(axis=1)
        self.now_ns = self.now_ns + num_ended * self.request_ns
        self.request = np.where(has_ended, self.begun[:, None] + nth - 1, self.request)
        self.begun = self.begun + num_ended
        index = self.request % self.new_N.size
        reading = np.where(has_ended, self.reading_N[index], 0)
        ends = self.queued[:, None] + reading.cumsum(axis=1)
        self.starts, self.ends = np.where(has_ended, ends - reading, self.starts), np.where(has_ended, ends, self.ends)
        self.queued = self.queued + reading.sum(axis=1)
        self.left = np.where(has_ended, self.rounds_PN[self.plan_P1, index], self.left)
        self.admitted_ns = np.where(has_ended, self.now_ns[:, None], self.admitted_ns)
        self.first_ns = np.where(has_ended, math.nan, self.first_ns)
        self._look_up(index)
        return int(counts.sum())

    def _look_up(self, index: np.ndarray) -> None:
        """What each row's request is like: positions cached before its first round, and how many each round adds."""
        self.base, self.of_rounds = self.reading_N[index], self.rounds_PN[self.plan_P1, index]
        self.pace = self.new_N[index] / self.of_rounds


def _stack(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Tables of different lengths as two of [P, longest], filled up with zeros."""
    longest = max(len(base) for base, _ in pairs)
    return [np.array([np.pad(table, (0, longest - len(table))) for table in tables]) for tables in zip(*pairs)]


def quantiles(seconds_PN: np.ndarray) -> np.ndarray:
    """[P, 2] median and 99th percentile over requests; 0 where no request has any."""
    seconds_PN = seconds_PN[:, ~np.isnan(seconds_PN[0])]  # answers of one token, the same for all plans
    return np.quantile(seconds_PN, (0.5, 0.99), axis=1).T if seconds_PN.shape[1] else np.zeros((len(seconds_PN), 2))
