"""Whether traffic has changed: the requests that ended lately beside those that a plan was made for.

Knows counts of ended requests; knows no clock, plan or thread.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from statistics import fmean

TOLERANCE = 0.25  # relative: what a plan is made for need not be known better
# Standard errors of the difference. Lengths have long tails: with 3, about 2 % of unchanged windows of 50 requests seem
# changed beside a reference of 200, with 4 three in a thousand; simulated as in tests/planning/test_controller.py.
NUM_ERRORS = 4.0
LONGEST_DRAFT = 8  # at which acceptance is judged: about where more of it is worth most


@dataclass(frozen=True)
class EndedRequest:
    """One request that ended by itself, in counts.

    prompt_tokens       those that were read: what the prefix cache had is left out.
    new_tokens          generated.
    drafted_per_depth, accepted_per_depth  of the drafts that reached each depth, see `dvi.records.RoundStats`.
    """

    prompt_tokens: int
    new_tokens: int
    drafted_per_depth: tuple[int, ...] = ()
    accepted_per_depth: tuple[int, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A mean and the variance of its error, from a sample."""

    mean: float
    variance: float

    def differs(self, other: Estimate) -> bool:
        """By more than TOLERANCE of it, and by more than NUM_ERRORS standard errors of the difference (Welch's)."""
        error = math.sqrt(self.variance + other.variance)
        return abs(other.mean - self.mean) > max(TOLERANCE * self.mean, NUM_ERRORS * error)


@dataclass(frozen=True)
class Traffic:
    """What a plan depends on, of requests of one kind.

    tokens_per_round  of a round of LONGEST_DRAFT drafts, were each accepted as were those that the verifier came to;
                      None where nothing was drafted. Not the tokens that rounds had: those follow the draft length,
                      which plans change.
    """

    prompt_tokens: Estimate
    new_tokens: Estimate
    tokens_per_round: Estimate | None

    @classmethod
    def of(cls, requests: Collection[EndedRequest]) -> Traffic:
        """Of two requests or more."""
        return cls(
            _mean([request.prompt_tokens for request in requests]), _mean([request.new_tokens for request in requests]),
            _tokens_per_round(requests),
        )

    def drift(self, now: Traffic) -> str | None:
        """The first field that differs in `now`, if any does."""
        for name in (field.name for field in fields(self)):
            before, after = getattr(self, name), getattr(now, name)
            if before is not None and after is not None and before.differs(after):
                return name
        return None


def _mean(values: list[int]) -> Estimate:
    mean, count = fmean(values), len(values)
    return Estimate(mean, fmean([(value - mean) ** 2 for value in values]) / (count - 1))


def _tokens_per_round(requests: Collection[EndedRequest]) -> Estimate | None:
    """1 + a + ... + a^LONGEST_DRAFT, with a the ratio of all accepted to all reached drafts.

    Its variance is the ratio estimator's over requests, taken through the slope at a.
    """
    counts = [(sum(request.accepted_per_depth), sum(request.drafted_per_depth)) for request in requests]
    num_reached = sum(reached for _, reached in counts)
    if not num_reached:
        return None
    ratio = sum(accepted for accepted, _ in counts) / num_reached
    variance = sum((accepted - ratio * reached) ** 2 for accepted, reached in counts) / num_reached**2
    slope = sum(depth * ratio ** (depth - 1) for depth in range(1, LONGEST_DRAFT + 1))
    return Estimate(sum(ratio**depth for depth in range(LONGEST_DRAFT + 1)), slope**2 * variance)
