"""Companions: a second opinion on every drafted token, from which a length rule reads how far to trust the draft.

After Speculative Verification (Kim et al. 2025, arXiv 2509.24328). With Pd the drafter's distribution and Pc the
companion's, at one position of a draft:

    S = sum over v of min(Pd(v), Pc(v))      how well the two agree, whatever was drawn
    A = min(1, Pc(a) / Pd(a))                what the companion thinks of the drawn token a

Both before temperature and filters. Knows draft logits and shallow states; decides nothing.
"""
# B rows, D hidden, V the drafter's vocabulary (trimmed or full).

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from dvi.drafter import Drafter


class Row(Protocol):
    """What a companion may know of the request in a row: its number, and its text, which ends in the newest token."""

    request_id: int

    @property
    def text_ids(self) -> list[int]: ...


class Companion(Protocol):
    """Drafts along without being asked for tokens. One companion serves one policy."""

    def follow(self, drafter: Drafter, rows: Sequence[Row]) -> None:
        """Before each round: who drafts, and for whom, row by row."""

    def begin(self, anchor_BD: Tensor) -> object:
        """State of one round, as `Drafter.begin` has one."""

    def step(self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, state: object, depth: int) -> Tensor:
        """Logits [B, V] over the drafter's vocabulary at the position whose drafter's logits are given.

        token_B, hidden_BD: the token before it (the last committed one at depth 0) and that token's h_k.
        """


def agreement(draft_logits_BV: Tensor, companion_logits_BV: Tensor) -> Tensor:
    """S of each row, float32 [B] in 0..1; 0 where either distribution is not finite."""
    shared_BV = draft_logits_BV.float().softmax(-1).minimum(companion_logits_BV.float().softmax(-1))
    return shared_BV.sum(-1).nan_to_num(nan=0.0).clamp(max=1.0)


def token_ratio(draft_logits_BV: Tensor, companion_logits_BV: Tensor, draft_ids_B: Tensor) -> Tensor:
    """A of each row's drawn token, float32 [B] in 0..1; 0 where it is not defined. draft_ids_B: ids among the V."""
    draft_B, companion_B = (
        logits_BV.float().log_softmax(-1).gather(1, draft_ids_B[:, None])[:, 0]
        for logits_BV in (draft_logits_BV, companion_logits_BV)
    )
    return (companion_B - draft_B).clamp(max=0.0).exp().nan_to_num(nan=0.0)
