"""Verdicts: which drafted tokens a row keeps, and the token that follows them. Pure functions over tensors.

Knows distributions, token ids and uniforms; knows nothing of models or of where the uniforms come from. No host syncs
and no data-dependent shapes. In Leviathan et al. 2023 (arXiv 2211.17192) our draft_probs is q and target_probs is p.

The words, everywhere in this project:

    round                 one draft and one verification: up to T tokens are drafted, T + 1 positions verified.
    drafted               tokens that the verdict is about; those behind a row's num_drafted are padding.
    accepted              drafted tokens that are kept: a prefix of the draft, up to the first one refused.
    recovered             the token that takes the place of the first one refused.
    bonus                 the token that follows when all drafted ones are accepted. Recovered or bonus, every round
                          commits one token after the accepted ones.
    acceptance rate       accepted / drafted.
    mean accepted tokens  new tokens per round, the recovered or bonus token among them, as Spec-Bench and vLLM count.

Accepted and new tokens of a text are those before its end: what a round gives behind it counts nowhere but in
`RoundStats.committed_tokens`.

The honest verdicts are functions. A `VerifyRule` can waive the honest test for some drafted tokens: they are kept
whatever it says, and counted, so that nobody takes them for what the target would have produced.
"""
# B rows, Q positions, T drafted tokens, U = T + 1 verified positions, V vocabulary.

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dvi.decode.sampling import sample_from
from dvi.records import Verdict
from dvi.settings import VerifySettings


def count_leading(mask_BT: Tensor) -> Tensor:
    """How many columns of each row are True before the first False, int64 [B]."""
    return mask_BT.cumprod(-1).sum(-1)


def verify_greedy(
    draft_ids_BT: Tensor, num_drafted_B: Tensor, target_ids_BU: Tensor, waived_BT: Tensor | None = None
) -> Verdict:
    """Keeps drafts as long as they equal what the target chose, then takes the target's own choice.

    target_ids_BU: int64, the target's choice at each position: its argmax, perturbed by noise under Gumbel coupling.
    waived_BT: bool, of `VerifyRule.waives`.
    """
    if draft_ids_BT.shape[1] == 0:
        return Verdict(num_drafted_B, target_ids_BU[:, 0], None if waived_BT is None else num_drafted_B)
    is_honest_BT = draft_ids_BT == target_ids_BU[:, :-1]
    num_accepted_B, num_waived_B = _count_accepted(is_honest_BT, waived_BT, num_drafted_B)
    next_token_B = target_ids_BU.gather(1, num_accepted_B[:, None]).squeeze(1)
    return Verdict(num_accepted_B, next_token_B, num_waived_B)


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
    waived_BT: Tensor | None = None,
) -> Verdict:
    """Exact rejection sampling: whatever the drafter, the committed tokens are distributed as the target's.

    A draft is kept when uniform * draft < target, strictly, so that a token the target excludes is never kept. The
    first one refused is replaced by a draw from `residual_probs`; after num_drafted acceptances the bonus token is
    drawn from the target at that position. Columns at or beyond num_drafted_B count as never drafted: whether they
    are must not depend on the tokens drawn there (law: no peeking).

    draft_probs_BTV, target_probs_BUV   after the same warping; draft_probs is what the tokens were really drawn from.
    accept_uniform_BT, recover_uniform_B  float64 in [0, 1), independent of each other and of the drafts.
    waived_BT  bool, of `VerifyRule.waives`; with any the result is exact no longer.
    Does not check that the drafts have positive draft probability: that would need a host sync.
    Source: Leviathan et al. 2023 (arXiv 2211.17192), Algorithm 1; Chen et al. 2023 (arXiv 2302.01318).
    """
    draft_BT, target_BT = _probs_of_drafts(draft_ids_BT, draft_probs_BTV, target_probs_BUV)
    is_honest_BT = accept_uniform_BT * draft_BT.double() < target_BT.double()
    num_accepted_B, num_waived_B = _count_accepted(is_honest_BT, waived_BT, num_drafted_B)
    next_probs_BV = row_at(target_probs_BUV, num_accepted_B)
    max_drafted = draft_ids_BT.shape[1]
    if max_drafted > 0:
        draft_row_BV = row_at(draft_probs_BTV, num_accepted_B.clamp(max=max_drafted - 1))
        is_rejected_B1 = (num_accepted_B < num_drafted_B)[:, None]
        next_probs_BV = torch.where(is_rejected_B1, residual_probs(draft_row_BV, next_probs_BV), next_probs_BV)
    return Verdict(num_accepted_B, sample_from(next_probs_BV, recover_uniform_B), num_waived_B)


class VerifyRule(Protocol):
    """Which drafted tokens are kept whatever the honest test says.

    is_lossless  True for a rule that waives nothing, and is never asked. Every result that another rule touched is
                 stamped "lossy", and no round in which it waived something counts as an honest reward.
    name         for stamps and reports: the rule's own name and its numbers, such as "margin 0.9".
    """

    is_lossless: bool
    name: str

    def waives(self, draft_ids_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        """bool [B, T]: drafted tokens to keep.

        logits_BTV: the target's at the drafted positions, after penalties, temperature (none in greedy rows) and
        filters; -inf where a filter excludes a token.
        """


class StrictRule:
    """The default: the honest tests alone."""

    is_lossless = True
    name = "strict"

    def waives(self, draft_ids_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        return torch.zeros_like(draft_ids_BT, dtype=torch.bool)


class MarginRule:
    """Keeps a drafted runner-up, or leader, where the target's two highest logits z1 >= z2 are close: z2 > theta z1.

    That is the ratio test z2 / z1 > theta of MARS (Song et al. 2026, arXiv 2601.15498), at the same positions, wherever
    z1 > 0. Where z1 <= 0 a ratio says nothing (of two negative logits it is above 1), and nothing is waived.
    The test does not depend on the temperature. In greedy rows a leader is kept anyway, so only the runner-up is new;
    in sampled rows either of the two is kept without its coin. Every token that ties with z2 is a runner-up: which of
    them a sort would put second is the machine's whim.
    """

    is_lossless = False

    def __init__(self, theta: float = VerifySettings.margin_theta) -> None:
        if not 0 < theta < 1:
            default = VerifySettings.margin_theta
            raise ValueError(f"margin_theta must be in (0, 1), got {theta}; try {default}, or the strict rule")
        self.theta = theta
        self.name = f"margin {theta:g}"

    def waives(self, draft_ids_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        first_BT, second_BT = logits_BTV.topk(2, dim=-1).values.unbind(-1)
        drafted_BT = logits_BTV.gather(-1, draft_ids_BT[..., None]).squeeze(-1)
        # As a product it needs no case for z1 <= 0: there z2 <= z1 <= theta z1.
        is_close_BT = second_BT > self.theta * first_BT
        return is_close_BT & (drafted_BT >= second_BT)


class TypicalRule:
    """Keeps a drafted token that the target finds likely enough: p > min(threshold, alpha exp(-H)), H the entropy of p.

    Typical acceptance of Medusa (Cai et al. 2024, arXiv 2401.10774), with its defaults. Greedy rows, too, are judged by
    the distribution at temperature 1.
    """

    is_lossless = False

    def __init__(
        self, threshold: float = VerifySettings.typical_threshold, alpha: float = VerifySettings.typical_alpha
    ) -> None:
        for name, value in (("typical_threshold", threshold), ("typical_alpha", alpha)):
            if not 0 < value <= 1:
                default = getattr(VerifySettings, name)
                raise ValueError(f"{name} must be in (0, 1], got {value}; try {default}, or the strict rule")
        self.threshold, self.alpha = threshold, alpha
        self.name = f"typical {threshold:g}/{alpha:g}"

    def waives(self, draft_ids_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        probs_BTV = logits_BTV.softmax(-1)
        floor_BT = (self.alpha * torch.exp(-torch.special.entr(probs_BTV).sum(-1))).clamp(max=self.threshold)
        return probs_BTV.gather(-1, draft_ids_BT[..., None]).squeeze(-1) > floor_BT


def make_rule(settings: VerifySettings) -> VerifyRule:
    """The rule of a run's settings."""
    return {
        "strict": lambda: StrictRule(),
        "margin": lambda: MarginRule(settings.margin_theta),
        "typical": lambda: TypicalRule(settings.typical_threshold, settings.typical_alpha),
    }[settings.rule]()


def _count_accepted(
    is_honest_BT: Tensor, waived_BT: Tensor | None, num_drafted_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """How many drafts each row keeps, and how many of those by a waiver alone; None where nothing is waived."""
    is_drafted_BT = _is_drafted(is_honest_BT, num_drafted_B)
    if waived_BT is None:
        return count_leading(is_drafted_BT & is_honest_BT), None
    num_accepted_B = count_leading(is_drafted_BT & (is_honest_BT | waived_BT))
    is_waived_BT = _is_drafted(is_honest_BT, num_accepted_B) & ~is_honest_BT
    return num_accepted_B, is_waived_BT.sum(-1)


def _is_drafted(drafts_BT: Tensor, num_drafted_B: Tensor) -> Tensor:
    return torch.arange(drafts_BT.shape[1], device=drafts_BT.device) < num_drafted_B[:, None]


def _probs_of_drafts(draft_ids_BT: Tensor, draft_probs_BTV: Tensor, target_probs_BUV: Tensor) -> tuple[Tensor, Tensor]:
    index_BT1 = draft_ids_BT[..., None]
    draft_BT = draft_probs_BTV.gather(-1, index_BT1).squeeze(-1)
    return draft_BT, target_probs_BUV[:, :-1].gather(-1, index_BT1).squeeze(-1)


def row_at(x_BQV: Tensor, column_B: Tensor) -> Tensor:
    """x_BQV[b, column_B[b]], [B, V]."""
    if x_BQV.shape[1] == 1:
        return x_BQV[:, 0]
    return x_BQV.gather(1, column_B[:, None, None].expand(-1, 1, x_BQV.shape[-1]))[:, 0]
