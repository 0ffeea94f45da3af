"""How many tokens to draft: once per round from earlier rounds, and within a round from the draft distributions.

Knows counts, confidences and measured seconds; knows nothing of token ids, which is what keeps it lawful: under
sampling, whether position i is verified may depend on committed tokens, drafted tokens before i and distributions at
i, never on the token drawn at i or later. (Stopping *because of* the token drawn at i would keep it more often when it
suits, and the output would no longer follow the target.)
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoundInfo:
    """What is known before a round drafts. num_rows: rows of the batch that take part."""

    num_rows: int


@dataclass(frozen=True)
class RoundOutcome:
    """What one round showed, per row. A row's depths up to num_accepted were reached; later ones say nothing.

    num_drafted   0..T, what the verifier was shown.
    num_accepted  0..num_drafted.
    """

    num_drafted: list[int]
    num_accepted: list[int]


class LengthPolicy(Protocol):
    """Chooses T on the host and which of the T positions count on the device.

    buckets            the values `choose` may return, ascending, so that shapes can be prepared.
    needs_confidence   whether `keep` reads its confidence; if not, callers may pass any tensor with one entry a row.
    """

    buckets: tuple[int, ...]
    needs_confidence: bool

    def choose(self, info: RoundInfo) -> int:
        """T for the coming round, out of `buckets`; called once per round."""

    def keep(self, depth: int, confidence_B: Tensor) -> Tensor:
        """bool [B]: whether position `depth` counts as drafted. A row's num_drafted is its leading run of True.

        confidence_B: the largest probability of the drafter's distribution at this position, before temperature and
        filters (warped greedy distributions are one-hot and say nothing).
        """

    def observe(self, outcome: RoundOutcome) -> None:
        """Takes in the outcome of the round last chosen for."""


class FixedLength:
    """Always T = num_draft_tokens."""

    needs_confidence = False

    def __init__(self, num_draft_tokens: int) -> None:
        self.buckets = _checked_buckets((num_draft_tokens,))

    def choose(self, info: RoundInfo) -> int:
        return self.buckets[0]

    def keep(self, depth: int, confidence_B: Tensor) -> Tensor:
        return torch.ones_like(confidence_B, dtype=torch.bool)

    def observe(self, outcome: RoundOutcome) -> None:
        """Nothing to learn."""


class ConfidenceStop(FixedLength):
    """At most num_draft_tokens, ending before the first position where the drafter is less sure than `threshold`.

    0.6 is Kangaroo's threshold (arXiv 2404.18911). A NaN confidence stops.
    """

    needs_confidence = True

    def __init__(self, num_draft_tokens: int, *, threshold: float = 0.6) -> None:
        super().__init__(num_draft_tokens)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}; 0 never stops")
        self.threshold = threshold

    def keep(self, depth: int, confidence_B: Tensor) -> Tensor:
        return confidence_B >= self.threshold


@dataclass(frozen=True)
class CostTable:
    """Measured seconds by number of token rows in the pass; between measurements linear, beyond the last proportional.

    draft_step_s  one draft step for that many rows.
    verify_s      all the rest of a round that verifies that many positions (batch rows times T + 1); with T = 0 it is
                  one plain decoding step.
    Example: CostTable(draft_step_s={1: 0.3e-3}, verify_s={1: 1.0e-3, 2: 1.1e-3, 5: 1.3e-3}).
    """

    draft_step_s: Mapping[int, float]
    verify_s: Mapping[int, float]

    def __post_init__(self) -> None:
        for name, seconds in (("draft_step_s", self.draft_step_s), ("verify_s", self.verify_s)):
            if not seconds or min(seconds) < 1 or not all(0 < s < float("inf") for s in seconds.values()):
                raise ValueError(f"{name} must map row counts >= 1 to positive seconds, got {dict(seconds)}")

    def round_s(self, num_rows: int, num_draft_tokens: int) -> float:
        """Expected seconds of a round of num_rows rows with T = num_draft_tokens."""
        drafting_s = num_draft_tokens * _interpolate(self.draft_step_s, num_rows) if num_draft_tokens else 0.0
        return drafting_s + _interpolate(self.verify_s, num_rows * (num_draft_tokens + 1))


def _interpolate(seconds: Mapping[int, float], num_rows: int) -> float:
    measured = sorted(seconds)
    if num_rows >= measured[-1]:
        return seconds[measured[-1]] * num_rows / measured[-1]
    above = bisect.bisect_left(measured, num_rows)
    high = measured[above]
    low = measured[max(above - 1, 0)]
    share = (num_rows - low) / (high - low) if high > low else 0.0
    return seconds[low] + share * (seconds[high] - seconds[low])


class AcceptanceEstimate:
    """Live acceptance probability at each depth, given that the depth was reached.

    Exponentially forgetting counts on a Beta prior. A depth's prior mean is the estimate one depth above it, so depths
    never tried are judged by those that were. A depth forgets only when it sees new evidence: what was found not to
    pay is not forgotten merely because it is no longer tried.
    """

    def __init__(self, num_depths: int, *, prior: float = 0.5, prior_weight: float = 4.0, memory: float = 50.0) -> None:
        """prior_weight and memory are in observations: of the prior, and at most of the evidence."""
        if not 0 < prior < 1:
            raise ValueError(f"prior must be in (0, 1), got {prior}")
        self._prior = prior
        self._prior_weight = prior_weight
        self._keep = 1 - 1 / memory
        self._reached = [0.0] * num_depths
        self._accepted = [0.0] * num_depths

    def observe(self, outcome: RoundOutcome) -> None:
        for num_drafted, num_accepted in zip(outcome.num_drafted, outcome.num_accepted, strict=True):
            for depth in range(min(num_accepted + 1, num_drafted)):
                self._reached[depth] = self._keep * self._reached[depth] + 1
                self._accepted[depth] = self._keep * self._accepted[depth] + (depth < num_accepted)

    def per_depth(self) -> list[float]:
        """The posterior mean at each depth."""
        means = []
        mean = self._prior
        for reached, accepted in zip(self._reached, self._accepted, strict=True):
            mean = (accepted + self._prior_weight * mean) / (reached + self._prior_weight)
            means.append(mean)
        return means


class GoodputLength:
    """The T that maximises expected tokens per second, 0 (plain decoding) included.

    goodput(T) = (1 + sum over j = 1..T of a_0 ... a_{j-1}) / round_s(T), with a the live `AcceptanceEstimate`.
    Hysteresis: another T takes over when the present one has been beaten by more than `margin` in `patience` rounds
    running. Probing: now and then a round drafts at a bucket above the present T, each in turn, so that a drafter that
    improved is noticed. The seconds of such rounds are at most `probe_share` of all, and so is their number: margin +
    probe_share bounds what is lost against the best T at steady state, as far as costs and estimates are right.
    Same rule with a companion model's estimate: Speculative Verification (arXiv 2509.24328).
    """

    needs_confidence = False

    def __init__(
        self,
        buckets: tuple[int, ...],
        costs: CostTable,
        *,
        prior_acceptance: float = 0.5,
        margin: float = 0.02,
        patience: int = 8,
        probe_share: float = 0.01,
    ) -> None:
        """buckets: the T to choose from; 0 is added. prior_acceptance: of every depth, before any evidence."""
        self.buckets = _checked_buckets((0, *buckets))
        self.costs = costs
        self.acceptance = AcceptanceEstimate(self.buckets[-1], prior=prior_acceptance)
        self._margin = margin
        self._patience = patience
        self._probe_share = probe_share
        self._current: int | None = None
        self._rounds_beaten = 0
        self._probe_credit_s = 0.0
        self._num_probes = 0
        self._round_s: dict[int, dict[int, float]] = {}

    def _seconds(self, num_rows: int) -> dict[int, float]:
        if num_rows not in self._round_s:
            self._round_s[num_rows] = {t: self.costs.round_s(num_rows, t) for t in self.buckets}
        return self._round_s[num_rows]

    def goodput(self, num_rows: int) -> dict[int, float]:
        """Expected tokens per second and row, for every bucket."""
        expected_tokens = [1.0]
        reach = 1.0
        for acceptance in self.acceptance.per_depth():
            reach *= acceptance
            expected_tokens.append(expected_tokens[-1] + reach)
        return {t: expected_tokens[t] / seconds for t, seconds in self._seconds(num_rows).items()}

    def choose(self, info: RoundInfo) -> int:
        goodput = self.goodput(info.num_rows)
        best = max(self.buckets, key=goodput.__getitem__)
        if self._current is None:
            self._current = best
        is_beaten = goodput[best] > (1 + self._margin) * goodput[self._current]
        self._rounds_beaten = self._rounds_beaten + 1 if is_beaten else 0
        if self._rounds_beaten >= self._patience:
            self._current = best
            self._rounds_beaten = 0
        return self._probe_or(self._current, info.num_rows)

    def _probe_or(self, current: int, num_rows: int) -> int:
        """The next bucket above `current` in turn, if earlier rounds have earned its seconds; else `current`."""
        above = [t for t in self.buckets if t > current]
        if not above:
            return current
        probe = above[self._num_probes % len(above)]
        seconds = self._seconds(num_rows)
        # The dearer of the two, or a table in which drafting more costs less would lift the bound on rounds.
        probe_s = max(seconds[probe], seconds[current])
        if self._probe_credit_s < probe_s:
            self._probe_credit_s += self._probe_share * seconds[current]
            return current
        self._probe_credit_s -= probe_s
        self._num_probes += 1
        return probe

    def keep(self, depth: int, confidence_B: Tensor) -> Tensor:
        return torch.ones_like(confidence_B, dtype=torch.bool)

    def observe(self, outcome: RoundOutcome) -> None:
        self.acceptance.observe(outcome)


def _checked_buckets(buckets: tuple[int, ...]) -> tuple[int, ...]:
    if min(buckets) < 0:
        raise ValueError(f"a number of draft tokens must be >= 0, got {min(buckets)}; 0 is plain decoding")
    return tuple(sorted(set(buckets)))
