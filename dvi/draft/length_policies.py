"""How many tokens to draft: once per round from earlier rounds, and within a round from the draft distributions.

Knows counts, draft distributions and measured seconds; knows no token ids, which is what keeps it lawful: under
sampling, whether position i is verified may depend on committed tokens, drafted tokens before i and distributions at
i, never on the token drawn at i or later. (Stopping *because of* the token drawn at i would keep it more often when it
suits, and the output would no longer follow the target.)
"""
# B rows, T drafted tokens, V the drafter's vocabulary.

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dvi.draft.companions import Companion
from dvi.draft.costs import CostTable, LiveCosts
from dvi.settings import DraftSettings

# What a burst of probes may cost, in rounds of the length in use; see `GoodputLength`.
BURST_ROUNDS = 12.0
# Standard deviations by which doubtful acceptance is overrated. Without, a drafter that pays a little is given up in
# its first bad stretch and then known by rare probes only; with 1, one that loses a little is tried too often. Of 0,
# 0.5 and 1 only 0.5 kept both within bounds, simulated as in tests/draft/test_length_policies.py.
HOPE = 0.5


@dataclass(frozen=True)
class RoundInfo:
    """What is known before a round drafts.

    num_rows          rows of the batch that take part.
    drafter_version   of the drafter that will draft; None where versions are not told.
    max_draft_tokens  drafts that the row with most room could keep; no longer draft can pay.
    """

    num_rows: int
    drafter_version: int | None = None
    max_draft_tokens: int = 2**31


@dataclass(frozen=True)
class RoundOutcome:
    """What one round showed, per row. A row's depths up to num_accepted were reached; later ones say nothing.

    num_drafted   0..T, what the verifier was shown.
    num_accepted  0..num_drafted, those behind the end of a text left out.
    limits        depths that can say something of a row: those that it has room for, before the end of its text. None
                  where all can.
    seconds       wall time of the whole round; None where it was not measured, or would mislead (a round that captured
                  a graph).
    companion_scores  where a companion drafted along: (S, A) of each of the row's T positions, counted or not.
    """

    num_drafted: list[int]
    num_accepted: list[int]
    seconds: float | None = None
    companion_scores: list[list[tuple[float, float]]] | None = None
    limits: list[int] | None = None

    @property
    def num_reached(self) -> list[int]:
        """How many depths of each row were decided on: the accepted ones, and the first rejected one."""
        limits = self.num_drafted if self.limits is None else self.limits
        return [min(a + 1, *most) for a, *most in zip(self.num_accepted, self.num_drafted, limits, strict=True)]

    @property
    def num_rows(self) -> int:
        return len(self.num_drafted)

    @property
    def num_draft_tokens(self) -> int:
        """The longest draft of the round: its T, unless every row stopped early."""
        return max(self.num_drafted)


@dataclass(frozen=True)
class DraftContext:
    """All that may be known when it is decided whether the position at `depth` of a draft counts. B rows.

    depth           0..T-1.
    is_open_B       bool: rows whose earlier positions all count. The others' entries below mean nothing.
    logits_BV       the drafter's at this position, before temperature and filters (warped greedy distributions are
                    one-hot and say nothing).
    agreements      S of depths 0 .. depth, float32 [B] each, and
    token_ratios    A of depths 0 .. depth - 1, where a companion drafts along, see `dvi.draft.companions`; else none.
                    Where the output cannot depend on what is verified, in greedy and Gumbel-coupled rounds, also A of
                    this depth: it tells of the token drawn here.
    """

    depth: int
    is_open_B: Tensor
    logits_BV: Tensor
    agreements: list[Tensor] = field(default_factory=list)
    token_ratios: list[Tensor] = field(default_factory=list)


class LengthPolicy(Protocol):
    """Chooses T on the host and which of the T positions count on the device.

    buckets     the values `choose` may return, ascending, so that shapes can be prepared.
    companion   drafts along, for the policy's sake; None: nothing does.
    stops_early whether `keep` is asked; where not, all T positions count.
    """

    buckets: tuple[int, ...]
    companion: Companion | None
    stops_early: bool

    def choose(self, info: RoundInfo) -> int:
        """T for the coming round, out of `buckets`; called once per round. Where no row has room for so much, fewer
        are drafted: a row near the end of its text never counts more than it could keep."""

    def keep(self, context: DraftContext) -> Tensor:
        """bool [B]: whether position `context.depth` counts as drafted; num_drafted is a row's leading run of True."""

    def observe(self, outcome: RoundOutcome) -> None:
        """Takes in the outcome of the round last chosen for."""


class FixedLength:
    """Always T = num_draft_tokens."""

    companion, stops_early = None, False

    def __init__(self, num_draft_tokens: int) -> None:
        self.buckets = _checked_buckets((num_draft_tokens,))

    def choose(self, info: RoundInfo) -> int:
        return self.buckets[0]

    def keep(self, context: DraftContext) -> Tensor:
        return torch.ones_like(context.is_open_B)

    def observe(self, outcome: RoundOutcome) -> None:
        """Nothing to learn."""


class ConfidenceStop(FixedLength):
    """At most num_draft_tokens, ending before the first position where the drafter is less sure than `threshold`.

    Sure: the largest probability. 0.6 is Kangaroo's threshold (arXiv 2404.18911). A NaN confidence stops.
    """

    stops_early = True

    def __init__(self, num_draft_tokens: int, *, threshold: float = DraftSettings.confidence_threshold) -> None:
        super().__init__(num_draft_tokens)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}; 0 never stops")
        self.threshold = threshold

    def keep(self, context: DraftContext) -> Tensor:
        return context.logits_BV.softmax(-1).amax(-1) >= self.threshold


class AcceptanceEstimate:
    """Live acceptance probability at each depth, given that the depth was reached.

    Counts on a Beta prior that fade with every round. A depth's prior mean is the estimate one depth above it, so
    depths never tried are judged by those that were. Where nothing new comes in, the mean stays and the counts fade to
    `stale_weight`, no further: what was found not to pay is not forgotten merely because it is no longer tried, but a
    burst of probes of a better drafter outweighs it.
    """

    def __init__(
        self, num_depths: int, *, prior: float = 0.5, prior_weight: float = 4.0, memory_rounds: float = 100.0,
        stale_weight: float = 12.0,
    ) -> None:
        """prior_weight and stale_weight are in observations; a count loses 1 / memory_rounds of itself per round."""
        if not 0 < prior < 1:
            raise ValueError(f"prior must be in (0, 1), got {prior}")
        self._prior = prior
        self._prior_weight = prior_weight
        self._keep = 1 - 1 / memory_rounds
        self._stale_weight = stale_weight
        self._reached = [0.0] * num_depths
        self._accepted = [0.0] * num_depths

    def observe(self, outcome: RoundOutcome) -> None:
        for depth, weight in enumerate(self._reached):
            if weight > self._stale_weight:
                self._reached[depth] *= self._keep
                self._accepted[depth] *= self._keep
        for num_reached, num_accepted in zip(outcome.num_reached, outcome.num_accepted, strict=True):
            for depth in range(num_reached):
                self._reached[depth] += 1
                self._accepted[depth] += depth < num_accepted

    def per_depth(self, *, hope: float = 0.0) -> list[float]:
        """The posterior mean at each depth, and `hope` standard deviations more."""
        estimates = []
        mean = self._prior
        for reached, accepted in zip(self._reached, self._accepted, strict=True):
            weight = reached + self._prior_weight
            mean = (accepted + self._prior_weight * mean) / weight
            estimates.append(min(mean + hope * math.sqrt(mean * (1 - mean) / weight), 1.0))
        return estimates


@dataclass
class _Standing:
    """The length in use at one number of rows, and the round since which another has beaten it whenever asked."""

    length: int
    beaten_since: int | None = None


class GoodputLength:
    """The T that maximises expected tokens per second, 0 (plain decoding) included.

    goodput(T) = (1 + sum over j = 1..T of a_0 ... a_{j-1}) / round_s(T), with a the live `AcceptanceEstimate`, hopeful
    while it knows little, and round_s the `LiveCosts`. Each number of rows has its own T: what pays alone may not pay
    in a batch.
    Hysteresis: another T takes over when the present one has been found beaten by more than `margin` throughout
    `patience` rounds, of whatever size: evidence from all of them has gone into it.
    Probing: a round now and then drafts at one of the present T's neighbours, the largest T, or not at all, each in
    turn, so that no cost and no acceptance stays unknown. Every round earns `probe_share` of a round, a probe is paid
    from that: margin + probe_share bounds what is lost against the best T at steady state, as far as costs and
    estimates are right. The last BURST_ROUNDS earned are kept for news: at the start, and whenever the drafter's
    version has changed since, every other round is a probe until they are spent.
    Same rule with a companion's estimate: Speculative Verification (arXiv 2509.24328).
    """

    companion, stops_early = None, False

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
        self.costs = LiveCosts(costs)
        self.acceptance = AcceptanceEstimate(self.buckets[-1], prior=prior_acceptance)
        self._margin = margin
        self._patience = patience
        self._probe_share = probe_share
        self._standings: dict[int, _Standing] = {}
        self._num_rounds = 0
        self._probe_credit = BURST_ROUNDS if probe_share else 0.0
        self._is_burst = True
        self._burst_version: int | None = None
        self._was_probe = False
        self._num_probes = 0

    def goodput(self, num_rows: int) -> dict[int, float]:
        """Expected tokens per second and row, for every bucket; acceptance as hopeful as `choose` takes it."""
        expected_tokens = [1.0]
        reach = 1.0
        for acceptance in self.acceptance.per_depth(hope=HOPE):
            reach *= acceptance
            expected_tokens.append(expected_tokens[-1] + reach)
        return {t: expected_tokens[t] / self.costs.round_s(num_rows, t) for t in self.buckets}

    def choose(self, info: RoundInfo) -> int:
        goodput = self.goodput(info.num_rows)
        best = max(self.buckets, key=goodput.__getitem__)
        standing = self._standings.setdefault(info.num_rows, _Standing(best))
        is_beaten = goodput[best] > (1 + self._margin) * goodput[standing.length]
        if not is_beaten:
            standing.beaten_since = None
        elif standing.beaten_since is None:
            standing.beaten_since = self._num_rounds
        if is_beaten and self._num_rounds - standing.beaten_since >= self._patience - 1:
            standing.length, standing.beaten_since = best, None
        self._num_rounds += 1
        current = self._within(standing.length, info)
        return self._probe_or(current, info, goodput[current])

    def _within(self, length: int, info: RoundInfo) -> int:
        """The longest draft up to this length that the round has room for."""
        return max(t for t in self.buckets if t <= min(length, info.max_draft_tokens))

    def _probe_or(self, current: int, info: RoundInfo, goodput: float) -> int:
        """The next length to probe, if earlier rounds have earned it; else `current`."""
        if info.drafter_version != self._burst_version and self._probe_credit >= BURST_ROUNDS:
            self._is_burst, self._burst_version = True, info.drafter_version
        round_s = {t: self.costs.round_s(info.num_rows, t) for t in self._worth_a_probe(current)}
        # What would lose with every draft accepted is not worth a look.
        others = [
            t for t, seconds in round_s.items()
            if t <= info.max_draft_tokens and (t < current or (t + 1) / seconds > goodput)
        ]
        # The first rounds of a process are its slowest: nothing can be compared with them.
        if not others or self._num_rounds <= self._patience:
            return current
        probe = others[self._num_probes % len(others)]
        # At least one round, so that probes are bounded in number as well as in seconds.
        price = max(round_s[probe] / self.costs.round_s(info.num_rows, current), 1.0)
        is_affordable = self._probe_credit >= (price if self._is_burst else BURST_ROUNDS + price)
        self._is_burst &= is_affordable
        # Never two in a row: the pace by which a probe is judged is that of the length in use.
        self._was_probe = is_affordable and not self._was_probe
        if self._was_probe:
            self._probe_credit -= price
            self._num_probes += 1
            return probe
        self._probe_credit += self._probe_share
        return current

    def _worth_a_probe(self, current: int) -> list[int]:
        """No drafts, the neighbours of `current` and the largest T, without `current` itself."""
        index = self.buckets.index(current)
        return sorted({0, *self.buckets[max(index - 1, 0) : index + 2], self.buckets[-1]} - {current})

    def keep(self, context: DraftContext) -> Tensor:
        return torch.ones_like(context.is_open_B)

    def observe(self, outcome: RoundOutcome) -> None:
        self.acceptance.observe(outcome)
        if outcome.seconds is not None:
            self.costs.observe(outcome.num_rows, outcome.num_draft_tokens, outcome.seconds)


def _checked_buckets(buckets: tuple[int, ...]) -> tuple[int, ...]:
    if min(buckets) < 0:
        raise ValueError(f"a number of draft tokens must be >= 0, got {min(buckets)}; 0 is plain decoding")
    return tuple(sorted(set(buckets)))
