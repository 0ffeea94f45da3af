"""The round: draft with the shallow layers, verify in one deep pass. No row changes before its `move_on`.

Knows a split model, a drafter, their cache and the rows' state; knows nothing of requests, text, replay or losses.
Plain decoding is the same round with nothing drafted, so there is one path to be right about. Nothing but `move_on`
waits for the device, for one small tensor a round.
"""
# B rows, D hidden, H columns for the host, M packed positions, T drafted tokens, U = T + 1 verified positions,
# V vocabulary.

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.decode.host_row import HostRow, fetch, for_host, judged_on_host
from dvi.decode.sampling import Role, SamplingBatch, SeenTokens, gumbel_argmax, hash_gumbel, sample_from, uniform
from dvi.decode.verification import VerifyRule, row_at, verify_by_rejection, verify_greedy
from dvi.draft.companions import Opinions
from dvi.draft.length_policies import DraftContext, LengthPolicy
from dvi.model.drafter import Drafter
from dvi.model.greedy import likeliest
from dvi.model.kv_cache import Placement
from dvi.model.ragged import Packing, is_worth_packing
from dvi.model.split import SplitModel
from dvi.model.transfers import overwrite
from dvi.records import Draft, Verdict


@dataclass
class RowState:
    """What the next round of B rows starts from, on the device. Views of fixed buffers.

    room_B: int64, drafts that each row could keep; further ones never count.
    """

    rows: slice
    room_B: Tensor
    last_token_B: Tensor
    anchor_BD: Tensor
    sampling: SamplingBatch
    seen: SeenTokens | None


def propose(
    split: SplitModel, drafter: Drafter, cache: object, state: RowState, policy: LengthPolicy, num_draft_tokens: int,
    *, wants_log_probs: bool,
) -> Draft:
    """Draft of up to num_draft_tokens tokens per row; T may come out smaller where all rows stopped (CPU only).

    Runs the shallow layers over U = T + 1 positions, the last committed token first, and writes their keys and values.
    """
    depth_state = drafter.begin(state.anchor_BD) if num_draft_tokens else None
    opinions = Opinions(
        policy.companion if num_draft_tokens else None, drafter.draft_head, state.anchor_BD,
        may_tell_drawn=state.sampling.is_blind_to_drafts,
    )
    token_B, counts_B, is_on_cpu = state.last_token_B, None, state.last_token_B.device.type == "cpu"
    tokens, hidden, logits, probs, counted = [], [], [], [], []

    def shallow(token_B: Tensor, depth: int) -> Tensor:
        placement = cache.place(offset=depth, width=1, rows=state.rows)
        return split.shallow(token_B[:, None], cache, placement)

    for depth in range(num_draft_tokens):
        hidden.append(shallow(token_B, depth))
        hidden_BD = hidden[-1][:, 0]
        logits_BV = drafter.step(hidden_BD, depth_state, depth)
        drawn_B, probs_BV = _draw(drafter, cache, state, logits_BV, tokens, depth)
        opinions.add(token_B, hidden_BD, logits_BV, drawn_B, depth)
        if policy.stops_early:
            has_room_B = depth < state.room_B
            is_open_B = has_room_B if counts_B is None else counts_B & has_room_B
            context = DraftContext(depth, is_open_B, logits_BV, opinions.agreements, opinions.told_ratios)
            counts_B = is_open_B & policy.keep(context)
            if is_on_cpu and not counts_B.any():  # where to ask costs nothing
                break  # the last hidden state is the last drafted token's: nothing is left to compute
            counted.append(counts_B)
        token_B = drawn_B
        tokens.append(token_B)
        logits.append(logits_BV)
        probs.append(probs_BV)
    else:
        hidden.append(shallow(token_B, num_draft_tokens))

    token_ids_BT = torch.stack(tokens, 1) if tokens else token_B.new_zeros(token_B.shape[0], 0)
    num_drafted_B = torch.stack(counted, 1).sum(1) if counted else state.room_B.clamp(0, len(tokens))
    num_positions = None
    if is_on_cpu:
        num_positions = len(token_B) + sum(num_drafted_B.tolist())
    return Draft(
        token_ids_BT=token_ids_BT,
        num_drafted_B=num_drafted_B,
        hidden_BUD=torch.cat(hidden, 1),
        num_positions=num_positions,
        probs_BTV=torch.stack(probs, 1) if probs and probs[0] is not None else None,
        log_probs_BT=_log_probs(drafter, logits, token_ids_BT) if wants_log_probs and tokens else None,
        companion_scores_BTC=opinions.scores(len(tokens)),
        drafter_version=drafter.version,
    )


def _draw(
    drafter: Drafter, cache: object, state: RowState, logits_BV: Tensor, tokens: list[Tensor], depth: int
) -> tuple[Tensor, Tensor | None]:
    """The token each row drafts at this depth and the warped distribution it was drawn from; None where greedy."""
    if state.sampling.is_all_greedy and not state.sampling.has_penalties:
        return drafter.draft_head.to_token_ids(likeliest(logits_BV)), None
    sampling, lengths_B = state.sampling, cache.lengths_B[state.rows]
    full_B1V = drafter.draft_head.scatter_logits(logits_BV, sampling.vocab_size)[:, None]
    seen = None
    if state.seen is not None:
        drafted_BT = torch.stack(tokens, 1) if tokens else state.last_token_B.new_zeros(len(lengths_B), 0)
        seen = state.seen.after_drafts(drafted_BT)
    probs_B1V = sampling.warp(full_B1V, seen)
    # A drafter gone NaN drafts token 0 with a distribution of NaN: every such draft is rejected, none is harmful.
    if sampling.is_gumbel:
        noise_B1V = hash_gumbel(sampling.seed_B, lengths_B[:, None] + depth + 1, sampling.vocab_size)
        return gumbel_argmax(probs_B1V, noise_B1V)[:, 0], probs_B1V[:, 0]
    return sample_from(probs_B1V[:, 0], uniform(sampling.seed_B, lengths_B, depth, Role.DRAFT)), probs_B1V[:, 0]


def _log_probs(drafter: Drafter, logits: list[Tensor], token_ids_BT: Tensor) -> Tensor:
    """Log-probability of each drafted token under the drafter as it stood, before any warping, [B, T] float32."""
    index_BT1 = drafter.draft_head.to_draft_ids(token_ids_BT)[..., None]
    return torch.stack(logits, 1).float().log_softmax(-1).gather(-1, index_BT1)[..., 0]


def judge(draft: Draft, logits_BUV: Tensor, cache: object, state: RowState, rule: VerifyRule) -> Verdict:
    """The verifier's verdict on a draft from its own logits."""
    sampling, lengths_B = state.sampling, cache.lengths_B[state.rows]
    seen = None if state.seen is None else state.seen.with_drafts(draft.token_ids_BT)
    drafted = draft.token_ids_BT, draft.num_drafted_B
    waived_BT = None
    if not rule.is_lossless:
        waived_BT = rule.waives(draft.token_ids_BT, sampling.warp_logits(logits_BUV, seen)[:, :-1])
    if sampling.is_all_greedy:
        return verify_greedy(*drafted, sampling.argmax(logits_BUV, seen), waived_BT)
    depth_U = torch.arange(logits_BUV.shape[1], device=logits_BUV.device)
    target_probs_BUV = sampling.warp(logits_BUV, seen)
    if sampling.is_gumbel:
        noise_BUV = hash_gumbel(sampling.seed_B, lengths_B[:, None] + depth_U + 1, sampling.vocab_size)
        return verify_greedy(*drafted, gumbel_argmax(target_probs_BUV, noise_BUV), waived_BT)
    accept_uniform_BT = uniform(sampling.seed_B[:, None], lengths_B[:, None], depth_U[:-1], Role.ACCEPT)
    # The depth is part of no recovered token's key: a round has one, whatever depth it falls on.
    recover_uniform_B = uniform(sampling.seed_B, lengths_B, 0, Role.RECOVER)
    draft_probs_BTV = target_probs_BUV[:, :0] if draft.probs_BTV is None else draft.probs_BTV
    return verify_by_rejection(
        *drafted, draft_probs_BTV, target_probs_BUV, accept_uniform_BT, recover_uniform_B, waived_BT
    )


@dataclass
class VerifiedRound:
    """All that one round computes; nothing of the rows' state has changed yet.

    input_ids_BU  the last committed token and the drafted ones; final_BUD their final hidden states.
    judged        the verdict and what follows from it, on the device; or, of a greedy round on a CPU, the rows as the
                  host knows them.
    logits_BUV    the verifier's, where somebody wants log-probabilities.
    is_walk       the other tensors are those of an accepted path of a tree, see `dvi.decode.tree_round`.
    """

    draft: Draft
    input_ids_BU: Tensor
    final_BUD: Tensor
    judged: Judged | list[HostRow]
    logits_BUV: Tensor | None = None
    is_walk: bool = False


@dataclass
class Judged:
    """A verdict on the device.

    anchor_BD     the final hidden state at the position whose logits gave next_token.
    for_host_BH   int64, all that the host must know: see `dvi.decode.host_row`.
    """

    verdict: Verdict
    anchor_BD: Tensor
    for_host_BH: Tensor


def draft_and_verify(
    split: SplitModel, drafter: Drafter, cache: object, state: RowState, policy: LengthPolicy, num_draft_tokens: int,
    rule: VerifyRule, *, wants_log_probs: bool, keeps_logits: bool = False,
) -> VerifiedRound:
    """The round on the device, without a wait: propose, one deep pass over U positions from the stored h_k, judge."""
    draft = propose(split, drafter, cache, state, policy, num_draft_tokens, wants_log_probs=wants_log_probs)
    input_ids_BU = torch.cat([state.last_token_B[:, None], draft.token_ids_BT], dim=1)
    placement = cache.place(offset=0, width=input_ids_BU.shape[1], rows=state.rows)
    final_BUD, logits_BUV = _verify(split, draft, input_ids_BU, cache, placement)
    # Of all that was computed: NaN in the cache does harm even where it is masked. What was left out is not in it.
    final_sum_B = final_BUD.sum((1, 2), dtype=torch.float32)
    is_plain_greedy = state.sampling.is_all_greedy and state.seen is None and rule.is_lossless
    if final_BUD.device.type == "cpu" and is_plain_greedy and policy.companion is None:
        judged = judged_on_host(draft, state.sampling.argmax(logits_BUV), final_sum_B)
    else:
        verdict = judge(draft, logits_BUV, cache, state, rule)
        anchor_BD = row_at(final_BUD, verdict.num_accepted_B)
        judged = Judged(verdict, anchor_BD, for_host(draft, verdict, final_sum_B.isfinite()))
    return VerifiedRound(draft, input_ids_BU, final_BUD, judged, logits_BUV if keeps_logits else None)


def _verify(
    split: SplitModel, draft: Draft, input_ids_BU: Tensor, cache: object, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, U, D] and logits [B, U, V] of the draft's positions, by one deep pass.

    Where rows stop at different depths the positions that do not count may be left out. They then repeat what their
    row's last counted position gave: nothing reads them, and no round commits them.
    """
    if not (split.can_pack and is_worth_packing(draft.num_positions, input_ids_BU.numel())):
        final_BUD = split.deep(draft.hidden_BUD, input_ids_BU, cache, placement)
        return final_BUD, split.head(final_BUD)
    packing = Packing(draft.num_drafted_B + 1, width=input_ids_BU.shape[1])
    final_MD = split.deep_packed(packing.pack(draft.hidden_BUD), cache, placement, packing)
    return packing.unpack(final_MD), packing.unpack(split.head(final_MD))


def move_on(state: RowState, verified: VerifiedRound) -> list[HostRow]:
    """Has the rows' state be what the next round starts from; what the host must know of this one.

    On a device the round's one wait for it.
    """
    judged = verified.judged
    if isinstance(judged, list):
        for row, host_row in enumerate(judged):
            state.anchor_BD[row] = verified.final_BUD[row, host_row.num_accepted]
        rooms = zip(state.room_B.tolist(), judged, strict=True)
        overwrite(state.room_B, [room - host_row.num_accepted - 1 for room, host_row in rooms])
        overwrite(state.last_token_B, [host_row.next_token for host_row in judged])
        return judged
    if state.seen is not None:
        state.seen.add_generated(*_committed(verified.draft, judged.verdict))
    state.anchor_BD.copy_(judged.anchor_BD)
    state.last_token_B.copy_(judged.verdict.next_token_B)
    state.room_B.sub_(judged.verdict.num_accepted_B + 1)
    return fetch(judged.for_host_BH, verified.draft)


def _committed(draft: Draft, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Token ids [B, U] and which of them the round committed: the accepted drafts, then the next token."""
    depth_T = torch.arange(draft.token_ids_BT.shape[1], device=draft.token_ids_BT.device)
    is_accepted_BT = depth_T < verdict.num_accepted_B[:, None]
    ids_BU = torch.cat([draft.token_ids_BT, verdict.next_token_B[:, None]], dim=1)
    return ids_BU, torch.cat([is_accepted_BT, torch.ones_like(ids_BU[:, :1], dtype=torch.bool)], dim=1)


def detached_from_graph(verified: VerifiedRound, drafter_version: int) -> VerifiedRound:
    """What transitions keep, out of the graph's memory; the version, a host fact, is as old as the capture there."""
    draft = verified.draft
    log_probs_BT = None if draft.log_probs_BT is None else draft.log_probs_BT.clone()
    draft = dataclasses.replace(
        draft, token_ids_BT=draft.token_ids_BT.clone(), hidden_BUD=draft.hidden_BUD.clone(), log_probs_BT=log_probs_BT,
        drafter_version=drafter_version,
    )
    return dataclasses.replace(
        verified, draft=draft, input_ids_BU=verified.input_ids_BU.clone(), final_BUD=verified.final_BUD.clone()
    )
