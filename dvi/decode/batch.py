"""The batch: rows that prefill, decode round by round, and come and go between rounds.

Knows a split model, a drafter, their cache, a length policy and the rows' requests; emits transitions and knows nothing
of replay, losses or text. It alone changes the rows' state: what agrees is committed, and one token more.
"""
# B rows, D hidden, H columns for the host, K likeliest tokens, Q positions of one prefill pass, S positions of a text,
# T drafted tokens, U = T + 1 verified positions, V vocabulary, W committed positions.

from __future__ import annotations

import time

import torch
from torch import Tensor

from dvi.decode.experience import RoundExperience, of_prefill
from dvi.decode.host_row import HostRow
from dvi.decode.round import RowState, VerifiedRound, detached_from_graph, draft_and_verify, move_on
from dvi.decode.sampling import SamplingBatch, SeenTokens
from dvi.decode.sequence import RowOutcome, Sequence
from dvi.decode.tree_round import tree_draft, verify_tree
from dvi.decode.verification import VerifyRule
from dvi.draft.length_policies import LengthPolicy, RoundInfo, RoundOutcome
from dvi.draft.node_budget import NodeBudget, path_estimates
from dvi.draft.tree import MAX_WIDTH
from dvi.model.cuda_graph import RoundGraphs, can_capture
from dvi.model.drafter import MAX_DEPTH, Drafter
from dvi.model.kv_cache import KeysAndValues
from dvi.model.split import SplitModel
from dvi.model.transfers import to_device, to_host
from dvi.model.tree import MAX_NODES
from dvi.records import TokenLogprobs, Transitions

PREFILL_CHUNK = 512  # positions of one prefill pass: bounds its activations


class DecodingBatch:
    """Rows that decode together: they join and leave between rounds and always fill rows 0 .. num_rows - 1.

    sequences   the rows that decode. The rows after them hold `prefilling`: prompts read so far in part.
    outcomes    of the newest round, one per row.
    """

    def __init__(
        self, split: SplitModel, drafter: Drafter, *, max_rows: int, capacity: int, policy: LengthPolicy | NodeBudget,
        rule: VerifyRule, wants_transitions: bool, prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """max_rows: rows to begin with; a row beyond them makes the cache grow, and move.

        capacity: positions per row to begin with, 0 lets them follow from the requests.
        policy: how many tokens the drafter drafts, or a `NodeBudget`, whose source then proposes in its place.
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
        ids_1S = to_device([text_ids[done:end]], self._split.device, dtype=torch.int64)
        for chunk_1Q in ids_1S.split(self._prefill_chunk, dim=1) if end > done else ():
            start, width = self.cache.lengths[row], chunk_1Q.shape[1]
            placement = self.cache.place(offset=0, width=width, rows=rows)
            hidden_1QD = self._split.shallow(chunk_1Q, self.cache, placement)
            target_1QD = self._split.deep(hidden_1QD, chunk_1Q, self.cache, placement)
            self.cache.commit([width], rows=rows)
            self._anchor_BD[row] = target_1QD[0, -1]
            if self._wants_transitions and sequence.teaches:
                transitions.append(of_prefill(
                    sequence, start, chunk_1Q[0], hidden_1QD[0], target_1QD[0], drafter_version=self.drafter.version
                ))
        if end == len(text_ids) - 1:
            self._join(sequence, row)
        return transitions

    def _join(self, sequence: Sequence, row: int) -> None:
        """A prefilled row decodes from now on: it moves behind the rows that do."""
        target = len(self.sequences)
        if row != target:
            self.cache.swap_rows(row, target)
            swapped_2D = torch.stack([self._anchor_BD[target], self._anchor_BD[row]])
            self._anchor_BD[row], self._anchor_BD[target] = swapped_2D
            self.prefilling[row - target] = self.prefilling[0]
        self.prefilling.pop(0)
        self.sequences.append(sequence)
        self._last_token_B[target] = sequence.text_ids[-1]
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
        if isinstance(self.policy, NodeBudget):
            return self._round_of_nodes()
        state, cache = self._row_state(), self.cache
        rooms = [sequence.room for sequence in self.sequences]
        info = RoundInfo(len(rooms), self.drafter.version, max_draft_tokens=max(rooms))
        num_draft_tokens, num_captures = self.policy.choose(info), len(self._graphs or ())
        if self._graphs is None:  # elsewhere each length is a graph of its own, and what is too much counts in no row
            num_draft_tokens = min(num_draft_tokens, info.max_draft_tokens)
        if self.policy.companion is not None:
            self.policy.companion.follow(self.drafter, self.sequences)
        verified = self._on_device(state, num_draft_tokens)
        host_rows = move_on(state, verified)
        cache.commit([host_row.num_accepted + 1 for host_row in host_rows], rows=state.rows)
        transitions = self._account(host_rows, verified)
        ends = [max(sequence.kept_per_round[-1:], default=0) for sequence in self.sequences]
        # A round that captured a graph says nothing of what rounds cost.
        seconds = time.perf_counter() - start_s if len(self._graphs or ()) == num_captures else None
        self.policy.observe(RoundOutcome(
            [host_row.num_drafted for host_row in host_rows],
            [min(host_row.num_accepted, end) for host_row, end in zip(host_rows, ends, strict=True)],
            seconds=seconds,
            companion_scores=(
                None if verified.draft.companion_scores_BTC is None else [r.companion_scores for r in host_rows]
            ),
            limits=[min(pair) for pair in zip(rooms, ends, strict=True)],
        ))
        return transitions

    def _round_of_nodes(self) -> list[Transitions]:
        """A round that verifies what the policy's source proposes."""
        state, policy = self._row_state(), self.policy
        width, most = (MAX_WIDTH, MAX_NODES - 1) if self._split.can_tree else (1, MAX_DEPTH)
        proposals = []
        for sequence in self.sequences:
            if sequence.source_row is None:
                asked = {"tenant": sequence.tenant, "teaches": sequence.teaches}
                sequence.source_row = policy.source.open(sequence.prompt_ids, **asked)
                sequence.source_row.observe(sequence.token_ids)
            proposals.append(sequence.source_row.propose(
                budget=min(policy.max_nodes, most), max_depth=min(sequence.room, MAX_DEPTH), width=width
            ))
        num_nodes = policy.choose_nodes([path_estimates(nodes) for nodes in proposals])
        draft = tree_draft([nodes[:num_nodes] for nodes in proposals], self._split.device)
        verified = verify_tree(
            self._split, self.cache, state, draft, drafter_version=self.drafter.version,
            keeps_logits=any(sequence.num_logprobs is not None for sequence in self.sequences),
        )
        host_rows = move_on(state, verified)
        if draft.is_chain:
            self.cache.commit([len(host_row.path) for host_row in host_rows], rows=state.rows)
        else:
            self.cache.commit_paths([host_row.path for host_row in host_rows], rows=state.rows)
        return self._account(host_rows, verified)

    def _on_device(self, state: RowState, num_draft_tokens: int) -> VerifiedRound:
        """Drafts and verifies: replayed as one CUDA graph where a graph can serve, launched call by call elsewhere."""
        keeps_logits = any(sequence.num_logprobs is not None for sequence in self.sequences)

        def run() -> VerifiedRound:
            return draft_and_verify(
                self._split, self.drafter, self.cache, state, self.policy, num_draft_tokens, self._rule,
                wants_log_probs=self._wants_transitions, keeps_logits=keeps_logits,
            )

        # A graph holds addresses: sampling settings live at new ones for every set of rows, so only greedy rounds, and
        # none whose filters a lossy rule asks. A companion may follow the host.
        is_greedy = state.sampling.is_all_greedy and state.seen is None
        is_filtered = state.sampling.has_filters and not self._rule.is_lossless
        is_fixed = is_greedy and not is_filtered and self.policy.companion is None
        if self._graphs is None or not is_fixed or keeps_logits:
            return run()
        visible = self.cache.place(offset=0, width=num_draft_tokens + 1, rows=state.rows).visible
        # A drafter's buffers stay where they are until a learner trims its vocabulary.
        draft_vocab_size = self.drafter.draft_head.vocab_size
        # Which policy, too: what it keeps is part of the graph, and an administrator may choose another one.
        key = (self.policy, len(self.sequences), num_draft_tokens, visible, draft_vocab_size)
        verified = self._graphs.run(key, run)
        return detached_from_graph(verified, self.drafter.version) if self._wants_transitions else verified

    def _account(self, host_rows: list[HostRow], verified: VerifiedRound) -> list[Transitions]:
        """Hands every row its committed tokens and cuts the round into one stretch of experience per row."""
        transitions, self.outcomes = [], []
        num_drafted = [host_row.num_drafted for host_row in host_rows]
        experience = RoundExperience(verified, num_drafted) if self._wants_transitions else None
        for row, (sequence, host_row) in enumerate(zip(self.sequences, host_rows, strict=True)):
            if not host_row.is_finite:
                sequence.finish_reason = "error"
                continue
            committed = host_row.committed
            try:
                num_kept = sequence.extend(committed)
                if sequence.num_logprobs is not None:
                    logits_WV = verified.logits_BUV[row, :num_kept]
                    sequence.logprobs += _logprobs(logits_WV, committed[:num_kept], sequence.num_logprobs)
            except Exception as error:  # whatever a request brings with it is its own fault, and nobody else's
                sequence.fail(error)
                continue
            # Past the end everything is for nobody, and which of the accepted were waived the host cannot tell.
            num_accepted = min(host_row.num_accepted, num_kept)
            num_waived = min(host_row.num_waived, num_accepted)
            outcome = RowOutcome(
                sequence, host_row.num_drafted, num_accepted, num_waived, num_kept, num_committed=len(committed),
                num_reached=host_row.num_reached,
            )
            if sequence.source_row is not None:
                sequence.source_row.observe(committed[:num_kept])
            outcome.add_to(sequence.stats)
            sequence.kept_per_round.append(num_kept)
            self.outcomes.append(outcome)
            if experience is not None and sequence.teaches:
                start_position = self.cache.lengths[row] - len(committed)
                if verified.is_walk:
                    transitions += experience.of_walk(row, outcome, start_position=start_position)
                else:
                    transitions.append(experience.of_row(row, outcome, start_position=start_position))
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
            self._room_B[rows] = to_device([s.room for s in self.sequences], self._split.device)
            self._state = RowState(
                rows, self._room_B[rows], self._last_token_B[rows], self._anchor_BD[rows], sampling, seen
            )
        return self._state

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids as one tensor [B, S], and which of its ids are theirs."""
        width = max(map(len, rows))
        ids_BS = to_device([ids + [-1] * (width - len(ids)) for ids in rows], self._split.device, dtype=torch.int64)
        return ids_BS.clamp(min=0), ids_BS >= 0

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
        if sequence.source_row is not None and sequence.finish_reason is not None:
            sequence.source_row.close()
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


def _logprobs(logits_WV: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """The verifier's own log-probabilities of W committed tokens and of the num_top likeliest; waits for the device."""
    log_probs_WV = logits_WV.float().log_softmax(-1)
    chosen_W1 = log_probs_WV.gather(1, to_device(token_ids, log_probs_WV.device)[:, None])
    values_WK, ids_WK = log_probs_WV.topk(num_top)
    # In float64, which holds ids and log-probabilities alike: one wait.
    found_WX = to_host(torch.cat([chosen_W1.double(), values_WK.double(), ids_WK.double()], dim=1))
    return [
        TokenLogprobs(token_id, chosen, tuple(zip(map(int, both[num_top:]), both[:num_top], strict=True)))
        for token_id, (chosen, *both) in zip(token_ids, found_WX.tolist(), strict=True)
    ]
