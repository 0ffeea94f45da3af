"""Verdicts: which drafted tokens a row keeps, and the token that follows them. Pure functions over tensors.

Knows distributions, token ids and uniforms; knows nothing of models or of where the uniforms come from. No host syncs
and no data-dependent shapes. In Leviathan et al. 2023 (arXiv 2211.17192) our draft_probs is q and target_probs is p.
"""
# B rows, T drafted tokens, U = T + 1 verified positions, V vocabulary.

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dvi.records import Verdict
from dvi.sampling import sample_from


def count_leading(mask_BT: Tensor) -> Tensor:
    """How many columns of each row are True before the first False, int64 [B]."""
    return mask_BT.long().cumprod(-1).sum(-1)


def verify_greedy(draft_ids_BT: Tensor, num_drafted_B: Tensor, target_ids_BU: Tensor) -> Verdict:
    """Keeps drafts as long as they equal what the target chose, then takes the target's own choice.

    target_ids_BU: int64, the target's choice at each position: its argmax, perturbed by noise under Gumbel coupling.
    """
    num_accepted_B = count_leading(_is_drafted(draft_ids_BT, num_drafted_B) & (draft_ids_BT == target_ids_BU[:, :-1]))
    return Verdict(num_accepted_B, target_ids_BU.gather(1, num_accepted_B[:, None]).squeeze(1))


def acceptance_probs(draft_ids_BT: Tensor, draft_probs_BTV: Tensor, target_probs_BUV: Tensor) -> Tensor:
    """The probability min(1, target / draft) that each drafted token is accepted once it is reached, [B, T].

    0 where the target gives the token nothing or the draft probability is NaN.
    """
    draft_BT, target_BT = _probs_of_drafts(draft_ids_BT, draft_probs_BTV, target_probs_BUV)
    return (target_BT / draft_BT).nan_to_num(nan=0.0).clamp(max=1.0)


def residual_probs(draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """The distribution of the token after a rejection, [..., V]: (target - draft)+, normalised.

    Where nothing is left (draft == target, so that only rounding can have rejected) or the draft is NaN (so that
    every draft is rejected) it is the target itself.
    """
    excess = (target_probs - draft_probs).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, target_probs)


def verify_by_rejection(
    draft_ids_BT: Tensor,
    num_drafted_B: Tensor,
    draft_probs_BTV: Tensor,
    target_probs_BUV: Tensor,
    accept_uniform_BT: Tensor,
    recover_uniform_B: Tensor,
) -> Verdict:
    """Exact rejection sampling: whatever the drafter, the committed tokens are distributed as the target's.

    A draft is kept when uniform * draft < target, strictly, so that a token the target excludes is never kept. The
    first one refused is replaced by a draw from `residual_probs`; after num_drafted acceptances the bonus token is
    drawn from the target at that position. Columns at or beyond num_drafted_B count as never drafted: whether they
    are must not depend on the tokens drawn there (law: no peeking).

    draft_probs_BTV, target_probs_BUV   after the same warping; draft_probs is what the tokens were really drawn from.
    accept_uniform_BT, recover_uniform_B  float64 in [0, 1), independent of each other and of the drafts.
    Does not check that the drafts have positive draft probability: that would need a host sync.
    Source: Leviathan et al. 2023 (arXiv 2211.17192), Algorithm 1; Chen et al. 2023 (arXiv 2302.01318).
    """
    draft_BT, target_BT = _probs_of_drafts(draft_ids_BT, draft_probs_BTV, target_probs_BUV)
    is_accepted_BT = accept_uniform_BT * draft_BT.double() < target_BT.double()
    num_accepted_B = count_leading(_is_drafted(draft_ids_BT, num_drafted_B) & is_accepted_BT)
    next_probs_BV = _row_at(target_probs_BUV, num_accepted_B)
    max_drafted = draft_ids_BT.shape[1]
    if max_drafted > 0:
        draft_row_BV = _row_at(draft_probs_BTV, num_accepted_B.clamp(max=max_drafted - 1))
        is_rejected_B1 = (num_accepted_B < num_drafted_B)[:, None]
        next_probs_BV = torch.where(is_rejected_B1, residual_probs(draft_row_BV, next_probs_BV), next_probs_BV)
    return Verdict(num_accepted_B, sample_from(next_probs_BV, recover_uniform_B))


class VerifyRule(Protocol):
    """How a round with distributions on both sides is judged. Arguments as for `verify_by_rejection`.

    is_lossless: False for a rule that may keep what the target would not have produced; every result it touched is
    then stamped and none of its acceptances counts as an honest reward.
    """

    is_lossless: bool

    def verify(
        self,
        draft_ids_BT: Tensor,
        num_drafted_B: Tensor,
        draft_probs_BTV: Tensor,
        target_probs_BUV: Tensor,
        accept_uniform_BT: Tensor,
        recover_uniform_B: Tensor,
    ) -> Verdict:
        """The verdict of every row."""


class RejectionRule:
    """The default: exact for greedy rows (one-hot distributions) and sampled rows alike."""

    is_lossless = True
    verify = staticmethod(verify_by_rejection)


def _is_drafted(draft_ids_BT: Tensor, num_drafted_B: Tensor) -> Tensor:
    return torch.arange(draft_ids_BT.shape[1], device=draft_ids_BT.device) < num_drafted_B[:, None]


def _probs_of_drafts(draft_ids_BT: Tensor, draft_probs_BTV: Tensor, target_probs_BUV: Tensor) -> tuple[Tensor, Tensor]:
    index_BT1 = draft_ids_BT[..., None]
    draft_BT = draft_probs_BTV.gather(-1, index_BT1).squeeze(-1)
    return draft_BT, target_probs_BUV[:, :-1].gather(-1, index_BT1).squeeze(-1)


def _row_at(probs_BQV: Tensor, column_B: Tensor) -> Tensor:
    """probs_BQV[b, column_B[b]], [B, V]."""
    index_B1V = column_B[:, None, None].expand(-1, 1, probs_BQV.shape[-1])
    return probs_BQV.gather(1, index_B1V).squeeze(1)
