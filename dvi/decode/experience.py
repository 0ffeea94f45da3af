"""What rounds and prefill passes teach: stretches of transitions, cut from their tensors as views.

Knows the round's tensors and the rows' requests; knows nothing of replay, losses or who learns.
"""
# B rows, D hidden, Q positions of one prefill pass, T drafted tokens, U = T + 1 verified positions, W positions of a
# stretch.

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dvi.decode.round import VerifiedRound
from dvi.decode.sequence import RowOutcome, Sequence
from dvi.records import Draft, Transitions


def of_prefill(
    sequence: Sequence, start_position: int, token_ids_W: Tensor, hidden_WD: Tensor, target_hidden_WD: Tensor,
    *, drafter_version: int,
) -> Transitions:
    """Text that the verifier read and nobody drafted."""
    return Transitions(
        request_id=sequence.request_id, start_position=start_position, token_ids_W=token_ids_W,
        hidden_WD=hidden_WD, target_hidden_WD=target_hidden_WD, num_drafted=0, num_accepted=0,
        draft_token_ids_W=torch.full_like(token_ids_W, -1),
        draft_log_probs_W=torch.zeros(len(token_ids_W), device=token_ids_W.device),
        drafter_version=drafter_version, is_prefill=True, tenant=sequence.tenant,
    )


class RoundExperience:
    """One round's tensors, from which each row's committed stretch is cut."""

    def __init__(self, verified: VerifiedRound, num_drafted: list[int]) -> None:
        """num_drafted: by row."""
        self._verified = verified
        self._draft_ids_BU, self._log_probs_BU = _drafts_by_position(verified.draft, num_drafted)

    def of_row(self, row: int, outcome: RowOutcome, *, start_position: int) -> Transitions:
        """Columns past a stop were verified but never became text: they are dropped."""
        sequence, verified = outcome.sequence, self._verified
        width = min(outcome.num_accepted + 1, outcome.num_kept)
        return Transitions(
            request_id=sequence.request_id, start_position=start_position,
            token_ids_W=verified.input_ids_BU[row, :width], hidden_WD=verified.draft.hidden_BUD[row, :width],
            target_hidden_WD=verified.final_BUD[row, :width], num_drafted=outcome.num_drafted,
            num_accepted=outcome.num_accepted, draft_token_ids_W=self._draft_ids_BU[row, :width],
            draft_log_probs_W=self._log_probs_BU[row, :width], drafter_version=verified.draft.drafter_version,
            num_waived=outcome.num_waived, tenant=sequence.tenant,
        )

    def of_walk(self, row: int, outcome: RowOutcome, *, start_position: int) -> list[Transitions]:
        """The row's committed positions, each as a plain round's: the drafter had no part in them."""
        verified, width = self._verified, min(outcome.num_accepted + 1, outcome.num_kept)
        return [
            Transitions(
                request_id=outcome.sequence.request_id, start_position=start_position + at,
                token_ids_W=verified.input_ids_BU[row, at : at + 1],
                hidden_WD=verified.draft.hidden_BUD[row, at : at + 1],
                target_hidden_WD=verified.final_BUD[row, at : at + 1], num_drafted=0, num_accepted=0,
                draft_token_ids_W=torch.full_like(verified.input_ids_BU[row, at : at + 1], -1),
                draft_log_probs_W=torch.zeros(1, device=verified.final_BUD.device),
                drafter_version=verified.draft.drafter_version, tenant=outcome.sequence.tenant,
            )
            for at in range(width)
        ]


def _drafts_by_position(draft: Draft, num_drafted: list[int]) -> tuple[Tensor, Tensor]:
    """What was drafted at each of the U positions: token ids [B, U], -1 where nothing was, and log-probabilities, 0."""
    ids_B1, log_probs_B1 = _nothing_drafted(len(num_drafted), draft.token_ids_BT.device)
    num_drafts = draft.token_ids_BT.shape[1]
    if num_drafts == 0:
        return ids_B1, log_probs_B1
    ids_BU = torch.cat([draft.token_ids_BT, ids_B1], 1)
    log_probs_BT = log_probs_B1.expand(-1, num_drafts) if draft.log_probs_BT is None else draft.log_probs_BT
    log_probs_BU = torch.cat([log_probs_BT, log_probs_B1], 1)
    if min(num_drafted) < num_drafts:
        is_empty_BU = torch.arange(num_drafts + 1, device=ids_BU.device) >= draft.num_drafted_B[:, None]
        ids_BU.masked_fill_(is_empty_BU, -1)
        log_probs_BU.masked_fill_(is_empty_BU, 0)
    return ids_BU, log_probs_BU


@functools.cache
def _nothing_drafted(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of one position, where nothing was drafted. Shared: nobody writes into transitions."""
    ids_B1 = torch.full((num_rows, 1), -1, dtype=torch.int64, device=device)
    return ids_B1, torch.zeros((num_rows, 1), device=device)
