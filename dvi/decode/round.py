"""The round: draft with the shallow layers, verify in one deep pass, commit what agrees and one token more.

Knows a split model, a drafter, their cache and a batch of rows; emits transitions and knows nothing of replay, losses
or text. Plain decoding is the same round with nothing drafted, so there is one path to be right about. Nothing in
`propose` and `judge` waits for the device; `DecodingBatch.round` fetches one small tensor per round, once.
"""
# B rows, T drafted tokens, U = T + 1 verified positions, D hidden, V vocabulary, W committed positions.

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dvi.decode.sampling import Role, SamplingBatch, SeenTokens, gumbel_argmax, hash_gumbel, sample_from, uniform
from dvi.decode.verification import VerifyRule, verify_by_rejection, verify_greedy
from dvi.draft.companions import agreement, token_ratio
from dvi.draft.length_policies import DraftContext, LengthPolicy, RoundInfo, RoundOutcome
from dvi.model.cuda_graph import RoundGraphs, can_capture
from dvi.model.drafter import MAX_DEPTH, Drafter
from dvi.model.kv_cache import KeysAndValues, Placement
from dvi.model.ragged import Packing, is_worth_packing
from dvi.model.split import SplitModel
from dvi.records import Draft, RoundStats, SamplingParams, TokenLogprobs, Transitions, Verdict

PREFILL_CHUNK = 512  # positions of one prefill pass: bounds its activations
SCORE_UNITS = 2**20  # companion scores cross to the host among integers, in these units


@dataclass
class Sequence:
    """One request while it runs. `accept_token(id)` returns a finish reason when the text must end there, else None.

    num_logprobs   None: no log-probabilities of its tokens; else `logprobs` also has so many likeliest tokens each.
    teaches        False: no transitions are cut from its rounds. tenant is copied into those that are.
    finish_reason  "stop", "length", or "error": the verifier's state was not finite, or something raised `error`, and
                   its last round is not kept.
    started_s      when it began what it does, prefilling or decoding.
    kept_per_round tokens that each of its rounds gave it.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    accept_token: Callable[[int], str | None]
    max_new_tokens: int
    num_logprobs: int | None = None
    teaches: bool = True
    tenant: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    kept_per_round: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    stats: RoundStats = field(default_factory=RoundStats)
    started_s: float = 0.0

    @property
    def room(self) -> int:
        """Drafts that its next round could keep: the token after them is the last."""
        return self.max_new_tokens - len(self.token_ids) - 1

    @property
    def text_ids(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt_ids + self.token_ids

    def fail(self, error: Exception) -> None:
        """Ends it, and it alone, with an error."""
        self.finish_reason, self.error = "error", error

    def extend(self, committed: list[int]) -> int:
        """Appends committed tokens until one of them ends the request; returns how many were kept."""
        for count, token_id in enumerate(committed, start=1):
            self.token_ids.append(token_id)
            self.finish_reason = self.accept_token(token_id)
            if self.finish_reason is None and len(self.token_ids) >= self.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return count
        return len(committed)


@dataclass(frozen=True)
class RowOutcome:
    """One row's round in counts: num_waived of num_accepted of num_drafted; num_kept tokens became text.

    num_accepted   those that became text. num_committed: what the verdict gave, also behind the text's end.
    """

    sequence: Sequence
    num_drafted: int
    num_accepted: int
    num_waived: int
    num_kept: int
    num_committed: int

    def add_to(self, stats: RoundStats) -> None:
        stats.count_round(
            num_drafted=self.num_drafted, num_accepted=self.num_accepted, num_waived=self.num_waived,
            num_kept=self.num_kept, num_committed=self.num_committed,
        )


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
    sampling, companion, head = state.sampling, policy.companion, drafter.draft_head
    depth_state = drafter.begin(state.anchor_BD) if num_draft_tokens else None
    companion_state = companion.begin(state.anchor_BD) if companion is not None and num_draft_tokens else None
    is_greedy = sampling.is_all_greedy and not sampling.has_penalties
    # The output is the verifier's, or the noise's and the verifier's, whatever is verified: nothing can be given away.
    may_tell_drawn = sampling.is_all_greedy or sampling.is_gumbel
    token_B = state.last_token_B
    counts_B = torch.ones_like(token_B, dtype=torch.bool)
    num_positions = len(token_B) if token_B.device.type == "cpu" else None  # where to ask costs nothing
    tokens, hidden, logits, probs, counted, agreements, token_ratios = [], [], [], [], [], [], []

    def shallow(token_B: Tensor, depth: int) -> Tensor:
        placement = cache.place(offset=depth, width=1, rows=state.rows)
        return split.shallow(token_B[:, None], cache, placement)[:, 0]

    for depth in range(num_draft_tokens):
        hidden.append(shallow(token_B, depth))
        logits_BV = drafter.step(hidden[-1], depth_state, depth)
        if is_greedy:
            drawn_B = head.to_token_ids(logits_BV.argmax(-1))
        else:
            drawn_B, probs_BV = _draw(drafter, cache, state, logits_BV, tokens, depth)
        if companion is not None:
            companion_BV = companion.step(token_B, hidden[-1], logits_BV, companion_state, depth)
            agreements.append(agreement(logits_BV, companion_BV))
            token_ratios.append(token_ratio(logits_BV, companion_BV, head.to_draft_ids(drawn_B)))
        told = token_ratios if may_tell_drawn else token_ratios[:-1]
        counts_B = counts_B & (depth < state.room_B)
        counts_B = counts_B & policy.keep(DraftContext(depth, counts_B, logits_BV, agreements, told))
        if num_positions is not None:
            num_open = int(counts_B.count_nonzero())
            if num_open == 0:
                break  # the last hidden state is the last drafted token's: nothing is left to compute
            num_positions += num_open
        token_B = drawn_B
        if not is_greedy:
            probs.append(probs_BV)
        tokens.append(token_B)
        logits.append(logits_BV)
        counted.append(counts_B)
    else:
        hidden.append(shallow(token_B, num_draft_tokens))

    token_ids_BT = torch.stack(tokens, 1) if tokens else token_B.new_zeros(token_B.shape[0], 0)
    scores = [torch.stack(both, -1) for both in zip(agreements, token_ratios, strict=True)][: len(tokens)]
    return Draft(
        token_ids_BT=token_ids_BT,
        num_drafted_B=torch.stack(counted, 1).sum(1) if counted else torch.zeros_like(token_B),
        hidden_BUD=torch.stack(hidden, 1),
        num_positions=num_positions,
        probs_BTV=torch.stack(probs, 1) if probs else None,
        log_probs_BT=_log_probs(drafter, logits, token_ids_BT) if wants_log_probs and tokens else None,
        companion_scores_BTC=torch.stack(scores, 1) if scores else None,
        drafter_version=drafter.version,
    )


def _draw(
    drafter: Drafter, cache: object, state: RowState, logits_BV: Tensor, tokens: list[Tensor], depth: int
) -> tuple[Tensor, Tensor]:
    """The token each row drafts at this depth and the warped distribution it was drawn from."""
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
    logits_BTV = torch.stack(logits, 1).float()
    index_BT1 = drafter.draft_head.to_draft_ids(token_ids_BT)[..., None]
    return logits_BTV.gather(-1, index_BT1)[..., 0] - logits_BTV.logsumexp(-1)


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
    """All that one round computes on the device; nothing of the rows' state has changed yet.

    input_ids_BU  the last committed token and the drafted ones; final_BUD their final hidden states.
    anchor_BD     the final hidden state at the position whose logits gave next_token.
    for_host_BH   int64 [B, T + 5]: drafted ids, is_finite, next token, num_waived, num_accepted, num_drafted. is_finite
                  is 0 where the verifier's final states hold NaN or infinity: nothing of such a row may be used. Where
                  a companion drafts along, 2 T companion scores follow the drafted ids, in 1 / SCORE_UNITS.
    logits_BUV    the verifier's, where somebody wants log-probabilities.
    """

    draft: Draft
    verdict: Verdict
    input_ids_BU: Tensor
    final_BUD: Tensor
    anchor_BD: Tensor
    for_host_BH: Tensor
    logits_BUV: Tensor | None = None


def draft_and_verify(
    split: SplitModel, drafter: Drafter, cache: object, state: RowState, policy: LengthPolicy, num_draft_tokens: int,
    rule: VerifyRule, *, wants_log_probs: bool, keeps_logits: bool = False,
) -> VerifiedRound:
    """The round on the device, without a wait: propose, one deep pass over U positions from the stored h_k, judge."""
    draft = propose(split, drafter, cache, state, policy, num_draft_tokens, wants_log_probs=wants_log_probs)
    input_ids_BU = torch.cat([state.last_token_B[:, None], draft.token_ids_BT], dim=1)
    placement = cache.place(offset=0, width=input_ids_BU.shape[1], rows=state.rows)
    final_BUD, logits_BUV = _verify(split, draft, input_ids_BU, cache, placement)
    verdict = judge(draft, logits_BUV, cache, state, rule)
    row_B = torch.arange(len(input_ids_BU), device=input_ids_BU.device)
    # Of all that was computed: NaN in the cache does harm even where it is masked. What was left out is not in it.
    is_finite_B = final_BUD.sum((1, 2), dtype=torch.float32).isfinite().long()
    num_waived_B = torch.zeros_like(row_B) if verdict.num_waived_B is None else verdict.num_waived_B
    counts_B5 = torch.stack(
        [is_finite_B, verdict.next_token_B, num_waived_B, verdict.num_accepted_B, draft.num_drafted_B], dim=1
    )
    scores_BTC = draft.companion_scores_BTC
    scores = [] if scores_BTC is None else [(scores_BTC * SCORE_UNITS).long().flatten(1)]
    return VerifiedRound(
        draft, verdict, input_ids_BU, final_BUD, anchor_BD=final_BUD[row_B, verdict.num_accepted_B],
        for_host_BH=torch.cat([draft.token_ids_BT, *scores, counts_B5], dim=1),
        logits_BUV=logits_BUV if keeps_logits else None,
    )


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


class DecodingBatch:
    """Rows that decode together: they join and leave between rounds and always fill rows 0 .. num_rows - 1.

    sequences   the rows that decode. The rows after them hold `prefilling`: prompts read so far in part.
    outcomes    of the newest round, one per row.
    """

    def __init__(
        self, split: SplitModel, drafter: Drafter, *, max_rows: int, capacity: int, policy: LengthPolicy,
        rule: VerifyRule, wants_transitions: bool, prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """max_rows: rows to begin with; a row beyond them makes the cache grow, and move.

        capacity: positions per row to begin with, 0 lets them follow from the requests.
        """
        self._prefill_chunk = prefill_chunk
        self._split, self.drafter, self.policy, self._rule = split, drafter, policy, rule
        self._wants_transitions = wants_transitions
        self.cache = split.make_cache(max_rows, capacity)
        self.sequences: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.outcomes: list[RowOutcome] = []
        self._room_B = torch.zeros(max_rows, dtype=torch.int64, device=split.device)
        self._last_token_B = torch.zeros_like(self._room_B)
        self._anchor_BD = torch.zeros(max_rows, split.hidden_size, dtype=split.dtype, device=split.device)
        self._state: RowState | None = None
        self._graphs = RoundGraphs() if can_capture(split) else None
        self._graphs_epoch = 0

    @property
    def has_room(self) -> bool:
        return len(self.sequences) + len(self.prefilling) < self.cache.rows

    def admit(self, sequence: Sequence) -> list[Transitions]:
        """Opens a row and prefills it: the row decodes from the next round on."""
        self.open(sequence)
        return self.prefill(sequence, len(sequence.text_ids))

    def open(self, sequence: Sequence, *, reused: list[KeysAndValues] = ()) -> None:
        """Gives the sequence a row, to be prefilled; one that has generated tokens already goes on after them.

        reused: what `RollbackCache.copy_out` gave for the first positions of the same text, piece by piece. At least
        one position before the last must be left to prefill, or the first draft lacks its anchor.
        """
        sequence.started_s = time.perf_counter()
        row = len(self.sequences) + len(self.prefilling)
        # Room for a last round's block, begun one token before the end. The same for every policy: in exact mode the
        # capacity is part of each pass's shape, so a capacity that followed T would let T change bits.
        num_ahead = 2 * (MAX_DEPTH + 1)
        self.cache.open_row(row, len(sequence.prompt_ids) + sequence.max_new_tokens + num_ahead)
        if self.cache.rows > len(self._last_token_B):
            self._add_rows(self.cache.rows - len(self._last_token_B))
        if self._graphs is not None and self.cache.epoch != self._graphs_epoch:
            self._graphs, self._graphs_epoch = RoundGraphs(), self.cache.epoch  # the old ones hold memory for nothing
        for segment in reused:
            width = next(iter(segment.values()))[0].shape[1]
            self.cache.copy_in(row, self.cache.lengths[row], segment)
            self.cache.commit([width], rows=slice(row, row + 1))
        self._anchor_BD[row] = 0
        self.prefilling.append(sequence)
        sequence.stats.prompt_tokens = len(sequence.prompt_ids)

    def _add_rows(self, count: int) -> None:
        self._room_B = torch.cat([self._room_B, self._room_B.new_zeros(count)])
        self._last_token_B = torch.cat([self._last_token_B, self._last_token_B.new_zeros(count)])
        self._anchor_BD = torch.cat([self._anchor_BD, self._anchor_BD.new_zeros(count, self._split.hidden_size)])
        self._state = None

    @torch.no_grad()
    def prefill(self, sequence: Sequence, max_positions: int) -> list[Transitions]:
        """Runs up to max_positions more of the text before its last token, which will open the row's first round.

        Once nothing is left the row decodes. In exact mode passes keep to their fixed width wherever they begin.
        """
        row = len(self.sequences) + self.prefilling.index(sequence)
        rows, transitions = slice(row, row + 1), []
        done, text_ids = self.cache.lengths[row], sequence.text_ids
        end = min(done + max_positions, len(text_ids) - 1)
        aligned_end = end - end % self._prefill_chunk
        if done < aligned_end and end < len(text_ids) - 1:
            end = aligned_end  # passes begin at multiples of the chunk, however the positions were rationed
        ids_1S = torch.tensor([text_ids[done:end]], dtype=torch.int64, device=self._split.device)
        for chunk_1Q in ids_1S.split(self._prefill_chunk, dim=1) if end > done else ():
            start, width = self.cache.lengths[row], chunk_1Q.shape[1]
            placement = self.cache.place(offset=0, width=width, rows=rows)
            hidden_1QD = self._split.shallow(chunk_1Q, self.cache, placement)
            target_1QD = self._split.deep(hidden_1QD, chunk_1Q, self.cache, placement)
            self.cache.commit([width], rows=rows)
            self._anchor_BD[row] = target_1QD[0, -1]
            if self._wants_transitions and sequence.teaches:
                nothing_W = torch.full_like(chunk_1Q[0], -1)
                transitions.append(Transitions(
                    request_id=sequence.request_id, start_position=start, token_ids_W=chunk_1Q[0],
                    hidden_WD=hidden_1QD[0], target_hidden_WD=target_1QD[0], num_drafted=0, num_accepted=0,
                    draft_token_ids_W=nothing_W, draft_log_probs_W=torch.zeros(width, device=nothing_W.device),
                    drafter_version=self.drafter.version, is_prefill=True, tenant=sequence.tenant,
                ))
        if end == len(text_ids) - 1:
            self._join(sequence, row)
        return transitions

    def _join(self, sequence: Sequence, row: int) -> None:
        """A prefilled row decodes from now on: it takes the place after the rows that do."""
        place = len(self.sequences)
        if row != place:
            self.cache.swap_rows(row, place)
            self._anchor_BD[[row, place]] = self._anchor_BD[[place, row]]
            self.prefilling[row - place] = self.prefilling[0]
        self.prefilling.pop(0)
        self.sequences.append(sequence)
        self._last_token_B[place] = sequence.text_ids[-1]
        self._state = None
        now_s = time.perf_counter()
        sequence.stats.prefill_s += now_s - sequence.started_s
        sequence.started_s = now_s

    @property
    def newest(self) -> Sequence:
        """The row that began to decode last: the first to suspect when a round fails that went well without it."""
        return max(self.sequences, key=lambda sequence: sequence.started_s)

    @torch.no_grad()
    def round(self) -> list[Transitions]:
        """One round over all rows that decode; tokens, stops and counts land in them. Returns what it taught.

        Nothing is committed before all is computed: when it raises, the rows are as they were.
        """
        start_s = time.perf_counter()
        state, cache = self._row_state(), self.cache
        rooms = [sequence.room for sequence in self.sequences]
        info = RoundInfo(len(rooms), self.drafter.version, max_draft_tokens=max(rooms))
        num_draft_tokens, num_captures = self.policy.choose(info), len(self._graphs or ())
        if self._graphs is None:  # elsewhere each length is a graph of its own, and what is too much counts in no row
            num_draft_tokens = min(num_draft_tokens, info.max_draft_tokens)
        if self.policy.companion is not None:
            self.policy.companion.follow(self.drafter, self.sequences)
        verified = self._on_device(state, num_draft_tokens)
        if state.seen is not None:
            state.seen.add_generated(*_committed(verified.draft, verified.verdict))
        state.anchor_BD.copy_(verified.anchor_BD)
        state.last_token_B.copy_(verified.verdict.next_token_B)
        state.room_B.sub_(verified.verdict.num_accepted_B + 1)
        # The round's one wait for the device: everything the host must know, in one transfer.
        host_rows = verified.for_host_BH.tolist()
        cache.commit([host_row[-2] + 1 for host_row in host_rows], rows=state.rows)
        transitions = self._account(host_rows, verified)
        ends = [max(sequence.kept_per_round[-1:], default=0) for sequence in self.sequences]
        # A round that captured a graph says nothing of what rounds cost.
        seconds = time.perf_counter() - start_s if len(self._graphs or ()) == num_captures else None
        self.policy.observe(RoundOutcome(
            [r[-1] for r in host_rows], [min(r[-2], end) for r, end in zip(host_rows, ends, strict=True)],
            seconds=seconds,
            companion_scores=(
                None if verified.draft.companion_scores_BTC is None else [_companion_scores(r) for r in host_rows]
            ),
            limits=[min(pair) for pair in zip(rooms, ends, strict=True)],
        ))
        return transitions

    def _on_device(self, state: RowState, num_draft_tokens: int) -> VerifiedRound:
        """Drafts and verifies: replayed as one CUDA graph where a graph can serve, launched call by call elsewhere."""
        keeps_logits = any(sequence.num_logprobs is not None for sequence in self.sequences)

        def run() -> VerifiedRound:
            return draft_and_verify(
                self._split, self.drafter, self.cache, state, self.policy, num_draft_tokens, self._rule,
                wants_log_probs=self._wants_transitions, keeps_logits=keeps_logits,
            )

        # A graph holds addresses: sampling settings live at new ones for every set of rows, so only greedy rounds.
        # A companion may follow the host.
        is_fixed = state.sampling.is_all_greedy and state.seen is None and self.policy.companion is None
        if self._graphs is None or not is_fixed or keeps_logits:
            return run()
        visible = self.cache.place(offset=0, width=num_draft_tokens + 1, rows=state.rows).visible
        # A drafter's buffers stay where they are until a learner trims its vocabulary.
        draft_vocab_size = self.drafter.draft_head.vocab_size
        key = (len(self.sequences), num_draft_tokens, visible, draft_vocab_size)
        verified = self._graphs.run(key, run)
        return _detached_from_graph(verified, self.drafter.version) if self._wants_transitions else verified

    def _account(self, host_rows: list[list[int]], verified: VerifiedRound) -> list[Transitions]:
        """Hands every row its committed tokens and cuts the round into one stretch of experience per row."""
        transitions, self.outcomes = [], []
        drafts = _drafts_by_position(verified.draft) if self._wants_transitions else None
        for row, (sequence, host_row) in enumerate(zip(self.sequences, host_rows, strict=True)):
            is_finite, next_token, num_waived, num_accepted, num_drafted = host_row[-5:]
            if not is_finite:
                sequence.finish_reason = "error"
                continue
            committed = [*host_row[:num_accepted], next_token]
            try:
                num_kept = sequence.extend(committed)
                if sequence.num_logprobs is not None:
                    logits_WV = verified.logits_BUV[row, :num_kept]
                    sequence.logprobs += _logprobs(logits_WV, committed[:num_kept], sequence.num_logprobs)
            except Exception as error:  # whatever a request brings with it is its own fault, and nobody else's
                sequence.fail(error)
                continue
            # Past the end everything is for nobody, and which of the accepted were waived the host cannot tell.
            num_accepted = min(num_accepted, num_kept)
            num_waived = min(num_waived, num_accepted)
            outcome = RowOutcome(sequence, num_drafted, num_accepted, num_waived, num_kept, len(committed))
            outcome.add_to(sequence.stats)
            sequence.kept_per_round.append(num_kept)
            self.outcomes.append(outcome)
            if self._wants_transitions and sequence.teaches:
                # Columns past a stop were verified but never became text: drop them.
                transitions.append(_cut(
                    verified, drafts, row, sequence, num_drafted=num_drafted, num_accepted=num_accepted,
                    start_position=self.cache.lengths[row] - len(committed), num_kept=num_kept,
                    num_waived=num_waived,
                ))
        return transitions

    def _row_state(self) -> RowState:
        if self._state is None:
            rows = slice(0, len(self.sequences))
            sampling = SamplingBatch(
                [s.params for s in self.sequences], vocab_size=self._split.vocab_size, device=self._split.device
            )
            seen = None
            if sampling.has_penalties:
                seen = SeenTokens(len(self.sequences), self._split.vocab_size, self._split.device)
                seen.add_prompt(*self._padded([s.prompt_ids for s in self.sequences]))
                seen.add_generated(*self._padded([s.token_ids for s in self.sequences]))
            self._room_B[rows] = torch.tensor([s.room for s in self.sequences], device=self._split.device)
            self._state = RowState(
                rows, self._room_B[rows], self._last_token_B[rows], self._anchor_BD[rows], sampling, seen
            )
        return self._state

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids as one tensor [B, N], and which of its ids are theirs."""
        tensors = [torch.tensor(ids, dtype=torch.int64, device=self._split.device) for ids in rows]
        ids_BN = pad_sequence(tensors, batch_first=True, padding_value=-1)
        return ids_BN.clamp(min=0), ids_BN >= 0

    def take_finished(self) -> list[Sequence]:
        """Removes and returns the rows that have ended; other running rows move into the gaps."""
        finished = [s for s in self.sequences if s.finish_reason is not None]
        for sequence in finished:
            self.remove(sequence)
        return finished

    def row_of(self, sequence: Sequence) -> int:
        """The sequence's row. Raises ValueError when it has none here."""
        return (self.sequences + self.prefilling).index(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Frees the sequence's row, whatever it was doing; opened again it goes on with a prefill of all its text."""
        row, now_s = self.row_of(sequence), time.perf_counter()
        if sequence.finish_reason == "error":
            self.cache.wipe_row(row)
        if row < len(self.sequences):
            sequence.stats.decode_s += now_s - sequence.started_s
            last = self.sequences.pop()
            if last is not sequence:
                self._move_row(len(self.sequences), row)
                self.sequences[row] = last
            if self.prefilling:  # they follow the decoding rows without a gap
                self._move_row(len(self.sequences) + len(self.prefilling), len(self.sequences))
                self.prefilling.insert(0, self.prefilling.pop())
        else:
            sequence.stats.prefill_s += now_s - sequence.started_s
            last = self.prefilling.pop()
            if last is not sequence:
                self._move_row(len(self.sequences) + len(self.prefilling), row)
                self.prefilling[row - len(self.sequences)] = last
        self._state = None

    def _move_row(self, source: int, target: int) -> None:
        self.cache.copy_row(source=source, target=target)
        self._last_token_B[target] = self._last_token_B[source]
        self._anchor_BD[target] = self._anchor_BD[source]


def _detached_from_graph(verified: VerifiedRound, drafter_version: int) -> VerifiedRound:
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


def _committed(draft: Draft, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Token ids [B, U] and which of them the round committed: the accepted drafts, then the next token."""
    depth_T = torch.arange(draft.token_ids_BT.shape[1], device=draft.token_ids_BT.device)
    is_accepted_BT = depth_T < verdict.num_accepted_B[:, None]
    ids_BU = torch.cat([draft.token_ids_BT, verdict.next_token_B[:, None]], dim=1)
    return ids_BU, torch.cat([is_accepted_BT, torch.ones_like(ids_BU[:, :1], dtype=torch.bool)], dim=1)


def _companion_scores(host_row: list[int]) -> list[tuple[float, float]]:
    """(S, A) of each drafted position, out of a row for the host that has T ids, 2 T companion scores and 5 counts."""
    num_drafts = (len(host_row) - 5) // 3
    numbers = [units / SCORE_UNITS for units in host_row[num_drafts:-5]]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _logprobs(logits_WV: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """The verifier's own log-probabilities of W committed tokens and of the num_top likeliest; waits for the device."""
    log_probs_WV = logits_WV.float().log_softmax(-1)
    chosen_W = log_probs_WV.gather(1, torch.tensor(token_ids, device=log_probs_WV.device)[:, None])[:, 0].tolist()
    values_WN, ids_WN = log_probs_WV.topk(num_top)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids_WN.tolist(), values_WN.tolist(), strict=True)]
    return [TokenLogprobs(*one) for one in zip(token_ids, chosen_W, tops, strict=True)]


def _drafts_by_position(draft: Draft) -> tuple[Tensor, Tensor]:
    """What was drafted at each of the U positions: token ids [B, U], -1 where nothing was, and log-probabilities, 0."""
    width = draft.token_ids_BT.shape[1] + 1
    is_drafted_BU = torch.arange(width, device=draft.num_drafted_B.device) < draft.num_drafted_B[:, None]
    ids_BU = torch.where(is_drafted_BU, F.pad(draft.token_ids_BT, (0, 1)), -1)
    if draft.log_probs_BT is None:
        return ids_BU, torch.zeros(ids_BU.shape, device=ids_BU.device)
    return ids_BU, F.pad(draft.log_probs_BT, (0, 1)) * is_drafted_BU


def _cut(
    verified: VerifiedRound, drafts: tuple[Tensor, Tensor], row: int, sequence: Sequence, *, start_position: int,
    num_drafted: int, num_accepted: int, num_kept: int, num_waived: int,
) -> Transitions:
    """One row's committed stretch of a round, as views of the round's tensors. drafts: of `_drafts_by_position`."""
    width = min(num_accepted + 1, num_kept)
    draft_ids_BU, log_probs_BU = drafts
    return Transitions(
        request_id=sequence.request_id, start_position=start_position, token_ids_W=verified.input_ids_BU[row, :width],
        hidden_WD=verified.draft.hidden_BUD[row, :width], target_hidden_WD=verified.final_BUD[row, :width],
        num_drafted=num_drafted, num_accepted=num_accepted, draft_token_ids_W=draft_ids_BU[row, :width],
        draft_log_probs_W=log_probs_BU[row, :width], drafter_version=verified.draft.drafter_version,
        num_waived=num_waived, tenant=sequence.tenant,
    )
