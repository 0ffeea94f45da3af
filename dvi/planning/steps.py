"""What steps of a server take, and the requests that a forecast is made of.

Knows a profile's seconds and a workload; schedules nothing. Requests are drawn once and shared by all plans, so that
plans differ by what they do and not by chance.
"""
# B rows, N requests, T depths, J rounds.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dvi.planning.profile import LatencyProfile
from dvi.planning.workload import MAX_ACCEPTANCE, MIN_ACCEPTANCE, Workload
from dvi.records import ServingPlan

NEWTON_STEPS, MAX_LOG_ODDS = 12, 30.0
WEIGHTINGS = 3  # the weights follow from what they give; a fourth changes nothing that shows


class Requests:
    """The requests of a simulation, the same for every plan.

    new_N         tokens to generate. reading_N: positions to read, all of the prompt but its last token, which opens
                  the first round.
    """

    def __init__(self, workload: Workload, *, seed: int, num_requests: int) -> None:
        rng = np.random.default_rng(seed)
        num_samples = len(workload.lengths)
        # Whole shuffles of the sample, so that its mean is kept.
        order = np.concatenate([rng.permutation(num_samples) for _ in range(-(-num_requests // num_samples))])
        prompt_N, self.new_N = np.array(workload.lengths, dtype=np.int64)[order[:num_requests]].T
        self.reading_N = prompt_N - 1
        self._ease_N = np.array(workload.ease or (0.0,) * num_samples)[order[:num_requests]]
        self._luck_NJ = rng.random((num_requests, self.new_N.max()))
        self._seed_of_rows = int(rng.integers(2**32))
        self._workload = workload
        self._rounds: dict[tuple[int, int], np.ndarray] = {}

    def rounds(self, split_layer: int, num_draft_tokens: int) -> np.ndarray:
        """[N] rounds that each request takes. Never more with a longer draft.

        Raises ValueError for a split layer of which no acceptance is known, unless nothing is drafted.
        """
        key = (split_layer if num_draft_tokens else 0), num_draft_tokens
        if key not in self._rounds:
            tokens_NJ = np.ones(self._luck_NJ.shape, dtype=np.int64)
            if num_draft_tokens:
                reach_N, chance_TN = np.ones(len(self.new_N)), self._chances(split_layer)
                for depth in range(num_draft_tokens):
                    # A draft is accepted, as those before it, where luck is below the chance of coming past it.
                    reach_N = reach_N * chance_TN[min(depth, len(chance_TN) - 1)]
                    tokens_NJ += self._luck_NJ < reach_N[:, None]
            self._rounds[key] = 1 + (tokens_NJ.cumsum(axis=1) < self.new_N[:, None]).sum(axis=1)
        return self._rounds[key]

    def _chances(self, split_layer: int) -> np.ndarray:
        """[T, N] chance that each request's draft is accepted at each depth, once the depth is reached."""
        acceptance = self._workload.acceptance.get(split_layer)
        if acceptance is None:
            known = ", ".join(map(str, sorted(self._workload.acceptance)))
            raise ValueError(f"nothing is known of acceptance at split_layer {split_layer}, only at {known or 'none'}")
        return spread_out(acceptance.at(self._workload.tokens_seen), self._ease_N, new_N=self.new_N)

    def begun(self, num_rows: int) -> np.ndarray:
        """[B] how much of its rounds is still to come for each row's first request, in (0, 1]."""
        return 1 - np.random.default_rng(self._seed_of_rows).random(num_rows)

    def longest_contexts(self, num_rows: int) -> np.ndarray:
        """[B + 1] positions that the longest of 0, 1 .. num_rows rows is expected to have cached."""
        parts = (np.arange(4) + 0.5) / 4  # of an answer: a row is met as often in each
        contexts = (self.reading_N[:, None] + self.new_N[:, None] * parts).ravel()
        order = contexts.argsort()
        below = np.cumsum(np.repeat(self.new_N, len(parts))[order]) / (self.new_N.sum() * len(parts))
        all_below_BX = below ** np.arange(1, num_rows + 1)[:, None]
        return np.append(0.0, np.diff(all_below_BX, axis=1, prepend=0.0) @ contexts[order])


def spread_out(acceptance_T: Sequence[float], shift_N: np.ndarray, *, new_N: np.ndarray) -> np.ndarray:
    """[T, N] acceptance of requests whose log-odds differ by shift_N.

    At each depth all log-odds are moved alike until the rounds of all requests together accept as given: hard texts
    have more rounds and easy ones reach deeper, so without that the mean would be another.
    """
    acceptance_T = np.clip(acceptance_T, MIN_ACCEPTANCE, MAX_ACCEPTANCE)
    chance_TN = np.repeat(acceptance_T[:, None], len(shift_N), axis=1)
    for _ in range(WEIGHTINGS if shift_N.any() else 0):
        weight_N = new_N / (1 + chance_TN.cumprod(axis=0).sum(axis=0))  # rounds that reach the depth
        for depth, acceptance in enumerate(acceptance_T):
            log_odds = math.log(acceptance / (1 - acceptance))
            for _ in range(NEWTON_STEPS):
                chance_N = 1 / (1 + np.exp(-np.clip(log_odds + shift_N, -MAX_LOG_ODDS, MAX_LOG_ODDS)))
                missing = acceptance * weight_N.sum() - weight_N @ chance_N
                log_odds += np.clip(missing / (weight_N @ (chance_N * (1 - chance_N))), -1, 1)
            weight_N = weight_N * chance_N
            chance_TN[depth] = chance_N
    return chance_TN


class StepTimes:
    """Nanoseconds of a step's parts, as tables; whole where nothing is cached.

    Sums of whole numbers are exact: what is simulated for a plan is the same whichever plans are beside it.
    """

    def __init__(self, profile: LatencyProfile, requests: Requests) -> None:
        self._profile, self._requests = profile, requests
        self.request_ns = round(1e9 * profile.overheads.request_s)
        self._rounds: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._reading: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def rounds(self, plan: ServingPlan) -> tuple[np.ndarray, np.ndarray]:
        """[B + 1] by decoding rows: of a step with a round, and what each cached position adds."""
        key = plan.split_layer, plan.tensor_parallel, plan.num_draft_tokens, plan.max_rows
        if key not in self._rounds:
            more, rows_B = self._profile.overheads, np.arange(plan.max_rows + 1)
            base_B, growth_B = self._profile.of(*key[:2]).rounds(plan.max_rows, plan.num_draft_tokens)
            tokens = self._requests.new_N.sum() / self._requests.rounds(plan.split_layer, plan.num_draft_tokens).sum()
            base_B = base_B + more.step_s + rows_B * (more.row_s + tokens * more.token_s)
            self._rounds[key] = np.rint(1e9 * base_B), 1e9 * growth_B
        return self._rounds[key]

    def reading(self, plan: ServingPlan) -> tuple[np.ndarray, np.ndarray]:
        """[W + 1] by positions read of one prompt in a step: of reading them, and what each cached position adds."""
        key = plan.split_layer, plan.tensor_parallel, plan.prefill_tokens_per_step
        if key not in self._reading:
            base_W, growth_W = self._profile.of(*key[:2]).prefill(plan.prefill_tokens_per_step)
            self._reading[key] = np.rint(1e9 * base_W), 1e9 * growth_W
        return self._reading[key]
