"""Speculative Verification: which drafted tokens a batch verifies, by what a companion thinks of each of them.

After Kim et al. 2025 (arXiv 2509.24328). Knows S and A, measured seconds and outcomes; knows no tokens.

In a batch every position costs: the deep pass has one more row of each matrix product, and a rejected token has paid
for nothing. So positions are taken by their worth. Position i of a row gains a token if it is reached and accepted,

    reach = product over j < i of P(accept | S_j, A_j)  x  P(accept | S_i),

and at each depth the rows that are still open are served in the order of their reach: the m best, where m maximises

    sum of the m reaches  -  lambda x (seconds of one draft step + verify_s(N + m) - verify_s(N)),

N positions being verified anyhow, and lambda what a second is worth: the batch's present tokens per second, from
earlier rounds. That is Dinkelbach's way to the largest E[tokens] / seconds: what does not pay for its time at the ratio
reached so far would lower it. Drafting thus goes on, over the whole batch, until goodput would drop.

Why it is lawful. Under sampling, whether position i is verified may depend on what is known before its token is drawn:
committed tokens, drafts before i, and distributions at i. S_i is such a thing. A_i is not, it tells of the token drawn
at i: to leave a token out because it looks bad is to draw another in its stead from the target, where the law asks for
one from the residual. For the same reason the whole length cannot be chosen after drafting, as the argmax over gamma of
E[N | gamma] / latency: S_{i+1} belongs to the text that ends in the token drawn at i, so a gamma chosen with it in
sight may keep or drop position i by its own token. (Not where goodput has one hump, and the argmax is where it first
drops; measured costs promise no such thing.) A rule that decides position by position, and for good, has seen nothing
of that yet. Where the output cannot depend on what is verified, in greedy and Gumbel-coupled rounds, A_i is told as
well, and P(accept | S_i, A_i) takes the last factor's place.
Batch mates may be looked at: their draws are independent of this row's, whatever they decide here.
"""
# B rows, T drafted tokens.

from __future__ import annotations

import functools
import itertools
import operator

from torch import Tensor

from dvi.draft.agreement import FIRST_FIT, AgreementEstimate
from dvi.draft.companions import Companion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import (
    BURST_ROUNDS,
    AcceptanceEstimate,
    DraftContext,
    GoodputLength,
    RoundInfo,
    RoundOutcome,
)
from dvi.model.ragged import is_worth_packing
from dvi.model.transfers import to_device

FULL = 0.99  # chance that the rule lets a row go on, before anything is known of it


class CompanionLength(GoodputLength):
    """T by the goodput rule, and within the round the positions that pay, as the module says.

    On CPUs. Elsewhere a round drafts and verifies all T positions whatever counts, so a stop would save nothing, and to
    look at S would be a wait within the round: there it is the goodput rule, with figures of what the companion tells.

    Until the estimate's first fit, and in its parent's probes, it verifies whole drafts: what is left out is never
    heard of again. In probes it still notes what it would have left out, so that goodput is judged by that. The first
    fit is news, like a new drafter: the rule may make drafting pay where it did not.
    The parent is told that a stop was not accepted. Its acceptance by depth is then the chance to gain a token there
    *by this rule*, and E[tokens | T] what the rule really yields; told of the counted positions alone it would take the
    acceptance of the picked ones for everybody's. Costs alike: a length costs what its rounds cost, stops included.
    """

    stops_early = True

    def __init__(
        self, buckets: tuple[int, ...], costs: CostTable, companion: Companion, *,
        is_on_cpu: bool = True, can_pack: bool = False, **options: float,
    ) -> None:
        """can_pack: verification leaves out what does not count, see `dvi.model.ragged`; without, a depth costs the
        same for one row as for all. options: of `GoodputLength`.
        """
        super().__init__(buckets, costs, **options)
        self.companion = companion
        self.estimate = AgreementEstimate()
        self._is_on_cpu, self._can_pack = is_on_cpu, can_pack
        # By the table, each looked up many times a round.
        self._full_round_s = functools.cache(costs.round_s)
        self._verify_s = functools.cache(lambda num_positions: costs.round_s(num_positions, 0))
        self._draft_step_s = functools.cache(lambda num_rows: costs.round_s(num_rows, 1) - self._verify_s(2 * num_rows))
        self._work: dict[int, _WorkEstimate] = {}
        self._goodput: dict[int, float] = {}  # as last asked for
        self._length, self._has_rule, self._keeps_all = 0, False, True
        self._tokens_per_s = 0.0  # by the table's seconds
        # Of the round, row by row: positions that the rule keeps, and the chance that all of them are accepted.
        self._num_wanted: list[int] = []
        self._survival: list[float] = []

    # Between rounds

    def goodput(self, num_rows: int) -> dict[int, float]:
        work = self._work_of(num_rows).expected()
        self._goodput = {
            t: goodput / self._share(num_rows, t, num_rows * work[t][0], work[t][1])
            for t, goodput in super().goodput(num_rows).items()
        }
        return self._goodput

    def choose(self, info: RoundInfo) -> int:
        if self._is_on_cpu and not self._has_rule and self.estimate.num_samples >= FIRST_FIT:
            self._has_rule, self._is_burst = True, True
            self._probe_credit = BURST_ROUNDS if self._probe_share else 0.0
        num_rows, length = info.num_rows, super().choose(info)
        usual = self._within(self._standings[num_rows].length, info)
        self._length, self._keeps_all = length, length != usual or not self._has_rule
        slowness = self.costs.round_s(num_rows, length) / self._full_round_s(num_rows, length)
        self._tokens_per_s = num_rows * self._goodput[usual] * slowness
        return length

    def observe(self, outcome: RoundOutcome) -> None:
        if outcome.companion_scores is not None:
            self.estimate.observe(_samples(outcome))
        num_rows, num_wanted, seconds = outcome.num_rows, outcome.num_drafted, outcome.seconds
        if self._length:
            if self._has_rule:
                num_wanted = self._num_wanted
            self._work_of(num_rows).observe(num_wanted, self._length)
            if seconds is not None:
                seconds /= self._share(num_rows, self._length, sum(outcome.num_drafted), max(outcome.num_drafted))
        num_accepted = [min(pair) for pair in zip(outcome.num_accepted, num_wanted, strict=True)]
        drafted = [self._length] * num_rows
        super().observe(RoundOutcome(drafted, num_accepted, seconds=seconds, limits=outcome.limits))

    def _share(self, num_rows: int, length: int, num_drafted: float, depth: float) -> float:
        """Of the table's seconds of a full round, those of one with so many positions drafted, the last at `depth`."""
        num_steps = min(depth + 1, length)  # the one at which all stopped was made, too
        num_positions, num_places = num_rows + num_drafted, num_rows * (1 + depth)
        if not (self._can_pack and is_worth_packing(num_positions, num_places)):
            num_positions = num_places
        seconds = num_steps * self._draft_step_s(num_rows) + self._verify_s(round(num_positions))
        return seconds / self._full_round_s(num_rows, length)

    def _work_of(self, num_rows: int) -> _WorkEstimate:
        size = (num_rows - 1).bit_length()  # shared between powers of two, as `LiveCosts` has it
        return self._work.setdefault(size, _WorkEstimate(self.buckets[-1]))

    # Within a round

    def keep(self, context: DraftContext) -> Tensor:
        if not self._has_rule:
            return context.is_open_B
        num_rows = len(context.is_open_B)
        if context.depth == 0:
            self._num_wanted, self._survival = [0] * num_rows, [1.0] * num_rows
        for row in self._worth_their_time(context, self._reach(context)):
            self._num_wanted[row] += 1
        if self._keeps_all:
            return context.is_open_B
        return to_device([num_wanted > context.depth for num_wanted in self._num_wanted], context.is_open_B.device)

    def _reach(self, context: DraftContext) -> list[float]:
        """The chance, row by row, that this position is reached and accepted, if it counts."""
        agreements = context.agreements[-1].tolist()
        bins, told = self.estimate.bins, context.token_ratios
        if told:
            newest = zip(context.agreements[len(told) - 1].tolist(), told[-1].tolist(), strict=True)
            self._survival = [s * bins.given_both(*both) for s, both in zip(self._survival, newest, strict=True)]
        if len(told) > context.depth:  # of this very position
            return self._survival
        return [s * bins.given_agreement(a) for s, a in zip(self._survival, agreements, strict=True)]

    def _worth_their_time(self, context: DraftContext, reach: list[float]) -> list[int]:
        """The open rows that go on at this depth."""
        depth, is_open = context.depth, context.is_open_B.tolist()
        num_rows, num_positions = len(reach), len(reach) + sum(self._num_wanted)
        open_rows = [row for row, num in enumerate(self._num_wanted) if num == depth and is_open[row]]
        open_rows.sort(key=reach.__getitem__, reverse=True)
        best, num_kept, gain = 0.0, 0, 0.0
        for num_more, row in enumerate(open_rows, start=1):
            if self._can_pack:
                seconds = self._verify_s(num_positions + num_more) - self._verify_s(num_positions)
            else:
                seconds = self._verify_s(num_rows * (depth + 2)) - self._verify_s(num_rows * (depth + 1))
            gain += reach[row]
            worth = gain - self._tokens_per_s * (self._draft_step_s(num_rows) + seconds)
            if worth > best:
                best, num_kept = worth, num_more
        return open_rows[:num_kept]


def _samples(outcome: RoundOutcome) -> list[tuple[float, float, bool]]:
    """(S, A, accepted) of the positions that were reached: the accepted ones, and the first rejected one."""
    return [
        (*companion_scores[depth], depth < num_accepted)
        for companion_scores, num_reached, num_accepted in zip(
            outcome.companion_scores, outcome.num_reached, outcome.num_accepted, strict=True
        )
        for depth in range(num_reached)
    ]


class _WorkEstimate:
    """How deep the rule lets rows draft, and the deepest of a batch; depths never tried are judged by those above."""

    def __init__(self, num_depths: int) -> None:
        self._rows = AcceptanceEstimate(num_depths, prior=FULL)
        self._deepest = AcceptanceEstimate(num_depths, prior=FULL)

    def observe(self, num_wanted: list[int], length: int) -> None:
        """num_wanted: of `length`, row by row."""
        self._rows.observe(RoundOutcome([length] * len(num_wanted), num_wanted))
        self._deepest.observe(RoundOutcome([length], [max(num_wanted)]))

    def expected(self) -> list[tuple[float, float]]:
        """For each length, from 0 on: positions drafted by a row, and by the deepest row."""
        reached = (itertools.accumulate(depths.per_depth(), operator.mul) for depths in (self._rows, self._deepest))
        return list(zip(*(itertools.accumulate(chances, initial=0.0) for chances in reached), strict=True))
