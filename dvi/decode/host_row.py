"""What the host must know of a round: written on the device as one tensor, fetched in one transfer, read as records.

Knows the layout of `VerifiedRound.for_host_BH`, which nobody else does: H columns of int64, the drafted ids, with a
companion two scores for each of them, and the counts.
"""
# B rows, C = 2 companion scores, H columns for the host, T drafted tokens.

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.model.transfers import to_host
from dvi.records import Draft, Verdict

NUM_COUNTS = 5  # is finite, next token, waived, accepted, drafted
SCORE_UNITS = 2**20  # companion scores cross to the host among integers, in these units


@dataclass(frozen=True)
class HostRow:
    """One row's round, on the host.

    draft_ids         T of them, counted or not.
    companion_scores  (S, A) of each of the T positions; None where nothing drafted along.
    is_finite         False where the verifier's final states hold NaN or infinity: nothing of such a row may be used.
    next_token        the recovered or bonus token.
    num_drafted       of a tree all of its nodes.
    path              of a tree the nodes that were accepted, the root first; else None.
    has_more          of a tree: something was drafted behind the last accepted node.
    """

    draft_ids: list[int]
    companion_scores: list[tuple[float, float]] | None
    is_finite: bool
    next_token: int
    num_waived: int
    num_accepted: int
    num_drafted: int
    path: list[int] | None = None
    has_more: bool = False

    @property
    def committed(self) -> list[int]:
        """The accepted drafts and the token after them."""
        return [*self.draft_ids[: self.num_accepted], self.next_token]

    @property
    def num_reached(self) -> int:
        """Depths at which a drafted token was judged."""
        return min(self.num_accepted + 1, self.num_drafted) if self.path is None else self.num_accepted + self.has_more


def for_host(draft: Draft, verdict: Verdict, is_finite_B: Tensor, *of_walk: Tensor) -> Tensor:
    """Every row of a round as integers, int64 [B, H]; no wait. of_walk: of a tree, the walk's nodes [B, U], and
    whether more was drafted behind its end [B, 1]."""
    num_accepted_B, num_waived_B = verdict.num_accepted_B, verdict.num_waived_B
    if num_waived_B is None:
        num_waived_B = torch.zeros_like(num_accepted_B)
    counts = is_finite_B.long(), verdict.next_token_B, num_waived_B, num_accepted_B, draft.num_drafted_B
    scores_BTC = draft.companion_scores_BTC
    scores = [] if scores_BTC is None else [(scores_BTC * SCORE_UNITS).long().flatten(1)]
    return torch.cat([draft.token_ids_BT, *scores, torch.stack(counts, dim=1), *of_walk], dim=1)


def judged_on_host(draft: Draft, target_ids_BU: Tensor, final_sum_B: Tensor) -> list[HostRow]:
    """All that `verify_greedy`, `for_host` and `fetch` give, of tensors on a CPU and of drafts that nothing waives.

    There one call of torch takes 20 to 40 us where a pass through the layers has emptied the caches since the last, ten
    times as long as another one right after it; the verdict in tensors has fifteen.
    """
    columns = draft.token_ids_BT, draft.num_drafted_B, target_ids_BU, final_sum_B
    rows = []
    for draft_ids, num_drafted, target_ids, final_sum in zip(*(c.tolist() for c in columns), strict=True):
        num_accepted = 0
        while num_accepted < num_drafted and draft_ids[num_accepted] == target_ids[num_accepted]:
            num_accepted += 1
        rows.append(HostRow(
            draft_ids, None, is_finite=math.isfinite(final_sum), next_token=target_ids[num_accepted], num_waived=0,
            num_accepted=num_accepted, num_drafted=num_drafted,
        ))  # fmt: skip
    return rows


def fetch(for_host_BH: Tensor, draft: Draft) -> list[HostRow]:
    """The rows as records. The round's one wait for the device; the draft is asked for shapes alone."""
    num_drafts, has_scores = draft.token_ids_BT.shape[1], draft.companion_scores_BTC is not None
    end_of_scores = 3 * num_drafts if has_scores else num_drafts
    rows = []
    for numbers in to_host(for_host_BH).tolist():
        scores = [units / SCORE_UNITS for units in numbers[num_drafts:end_of_scores]]
        pairs = list(zip(scores[::2], scores[1::2], strict=True)) if has_scores else None
        is_finite, *counts = numbers[end_of_scores : end_of_scores + NUM_COUNTS]
        walk = numbers[end_of_scores + NUM_COUNTS :]
        row = HostRow(numbers[:num_drafts], pairs, bool(is_finite), *counts)
        if walk:
            row = dataclasses.replace(row, path=walk[: row.num_accepted + 1], has_more=bool(walk[-1]))
        rows.append(row)
    return rows
