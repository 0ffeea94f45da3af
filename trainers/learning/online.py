"""OnlineTrainer: learns a drafter from the verdicts of serving, a little at a time, and publishes it between rounds.

Knows transitions, replay, steps and versions; knows nothing of decoding, so it is tested with random tensors. What
learns is a copy, the `Student`: what serves changes only in `_publish`.

On several ranks each has experience of its own, and all make the same steps on the sum of their gradients. Now and then
a rank says its `RankReport`; when all have, their sum tells every rank the same: whether a step is made, and all that a
step depends on. No rank waits for another while it serves: what is under way is looked at between rounds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dvi.distributed import POLL_S, SOLO, PeerLostError, Peers, Pieces, Progress
from dvi.learner import Learner
from dvi.model.drafter import MAX_DEPTH, choose_draft_tokens
from dvi.records import DrafterVersion, ReplayBatch, Transitions, UpdateReport
from dvi.settings import LearningSettings
from trainers.learning import rank_report
from trainers.learning.acceptance_trend import AcceptanceTrend
from trainers.learning.budget import TimeBudget
from trainers.learning.checkpoint import check_counts
from trainers.learning.loss_schedule import LossSchedule
from trainers.learning.losses import BatchTotals, RewardBaseline
from trainers.learning.rank_report import Notices, RankReport
from trainers.learning.replay import ReplayBuffer
from trainers.learning.student import copy_state
from trainers.learning.versions import Snapshot, State, VersionHistory
from trainers.learning.zero_student import build_student

MIN_POSITIONS_PER_BLOCK = 2  # replay positions per sampled block before the first step: below it, batches repeat
CANARY_BLOCKS = 256  # fewer, and the score's noise alone looks like a loss of a tenth
STORED_AT_ONCE = 64  # positions: a call of ReplayBuffer.add costs about as much as a hundred of them
SETTLED_PART = 0.1  # of the steps, and of the time for them, that remains once acceptance has settled
# Blocks: what a step costs besides its blocks, and its messages, must not become most of it.
SMALLEST_PART = 8
TICK_S = 0.1  # between reports of a rank that owes no step: how long the others may have to wait for it
BEST = -1  # of Notices.rollback
IDLE_S = 0.005  # a rank that only waits for others sleeps so long at a time


class OnlineTrainer(Learner):
    """A `Learner` for the drafter of one speculator.

    num_steps       optimizer steps made; num_skipped those whose loss, gradient or weights were not finite.
    num_rollbacks   returns to earlier weights, by the trainer or by `rollback`.
    num_noop_swaps  publishes left out because the weights served already.
    train_s         seconds spent in steps, publishing and canaries included.
    last_report     the newest step's UpdateReport; None before the first.
    blocks_here     of a step's blocks those of this rank: a step of many ranks has no more than one of a single rank,
                    as long as each has SMALLEST_PART, and where it has more it is made after as many more rounds.
    follows_rounds  rounds observed owe steps; False where somebody else says when one is due, by must_step.
    notices         what this rank's job has to tell the others at the next tick.
    agreed          the sum of all ranks' reports at the last tick; None before the first, and where there are no peers.
    """

    def __init__(
        self, speculator: object, config: LearningSettings | None = None, *, peers: Peers = SOLO
    ) -> None:
        """speculator: anything with `split` and `drafter`, the same drafter on all ranks.

        Raises ValueError for settings that do not fit it.
        """
        self.config = config = config or LearningSettings()
        even_part = -(-config.blocks_per_step // peers.num_ranks)
        self.blocks_here = min(config.blocks_per_step, max(even_part, SMALLEST_PART))
        self._split, self._live, self._peers = speculator.split, speculator.drafter, peers
        self._student = build_student(self._split, self._live, config, peers=peers)
        self._replay = ReplayBuffer(
            capacity_positions=config.replay_positions, hidden_size=self._split.hidden_size, max_block=config.block_len,
            dtype=self._split.dtype, device=self._split.device, reservoir_fraction=config.reservoir_fraction,
            seed=config.seed + peers.rank,
        )
        self.schedule = LossSchedule(
            config.schedule, by=config.switch_by, warmup_steps=config.warmup_steps, ramp_steps=config.ramp_steps
        )
        self.baseline = RewardBaseline(MAX_DEPTH, device=self._split.device)
        self.trend = AcceptanceTrend(patience=config.settle_rounds, wakes=config.drift_wakeup)
        self.budget = TimeBudget(
            config.budget, rounds_per_step=config.rounds_per_step * self.part_here, now_s=time.perf_counter()
        )
        self.token_counts_V = torch.zeros(self._split.vocab_size, dtype=torch.int64, device=self._split.device)
        self._generator = torch.Generator().manual_seed(config.seed + peers.rank)
        self.num_steps = self.num_skipped = self.num_rollbacks = self.num_noop_swaps = 0
        self.train_s = 0.0
        self.last_report: UpdateReport | None = None
        self._unstored: list[Transitions] = []  # observed, and not in the replay yet
        self._num_unstored = 0
        self._work: Pieces[UpdateReport | None] | None = None  # the tick, and the step, in progress
        self._work_s = 0.0
        self._batch: ReplayBatch | None = None  # for the next step, with reports said of it
        self.notices, self.agreed = Notices(), None
        self.follows_rounds, self.must_step = True, False
        self._has_woken = self._has_waived = self._is_waiting = self._is_agreed = False
        self._ticked_s = -math.inf
        self._unreported: UpdateReport | None = None
        self._version = self._live.version
        self._tokens_counted = self._drafted_since_step = self._accepted_since_step = 0
        self._history = VersionHistory(Snapshot(self._student.copy_state(), step=0))
        # An adapter that has learnt before goes on from its version.
        self._history.add(self._version, self._history.best, "resume" if self._version else "initial")

    @property
    def part_here(self) -> float:
        """Of the experience that owes a step, what this rank must have had before it owes one: 1 when alone."""
        return self.blocks_here / self.config.blocks_per_step

    def restart_clock(self) -> None:
        """Forgets saved-up training time: after a pause in which nothing was served, or a resume."""
        self.budget.restart(time.perf_counter())

    @property
    def drafter(self) -> nn.Module:
        """The learner's copy, ahead of the one that serves. Another one once the head is trimmed."""
        return self._student.drafter

    # Learner protocol

    def __repr__(self) -> str:
        return (
            f"OnlineTrainer({self.num_steps} steps in {self.train_s:.1f} s, {self.config.schedule}, lr "
            f"{self.config.lr:g}, {len(self._replay):,} positions stored, drafter v{self._version})"
        )

    def observe(self, transitions: list[Transitions]) -> None:
        """Stores the experience of one round (or prefill) and follows the acceptance; its time counts as training's."""
        start_s = time.perf_counter()
        self._unstored += transitions
        self._num_unstored += sum(len(s) for s in transitions)
        if self._num_unstored >= STORED_AT_ONCE:
            self._store()
        num_drafted = sum(s.num_drafted for s in transitions)
        # What a lossy rule lets pass is no merit of the drafter's, and no sign of drift.
        num_accepted = sum(s.num_accepted - s.num_waived for s in transitions)
        self._has_waived |= not all(s.is_honest for s in transitions)
        if self.follows_rounds and any(not s.is_prefill for s in transitions):
            self.budget.owe_round(part=self._wanted_part)
        self._drafted_since_step += num_drafted
        self._accepted_since_step += num_accepted
        self._has_woken |= self.trend.observe(num_drafted, num_accepted)
        seconds = time.perf_counter() - start_s
        self.train_s += seconds
        self.budget.charge(seconds)

    def end_request(self, request_id: int) -> None:
        """Nothing more comes of this request."""
        self.replay.end(request_id)

    @property
    def replay(self) -> ReplayBuffer:
        """All experience observed so far."""
        self._store()
        return self._replay

    def _store(self) -> None:
        """Stores what was observed since the last time: its cost is mostly that of the calls, not of the positions."""
        stretches, self._unstored, self._num_unstored = self._unstored, [], 0
        generated = [s.token_ids_W for s in stretches if not s.is_prefill]
        if generated:
            token_ids_N = torch.cat(generated)
            # Not bincount: on a GPU it waits for the device.
            self.token_counts_V.index_add_(0, token_ids_N, torch.ones_like(token_ids_N))
            self._tokens_counted += len(token_ids_N)
        if not self.config.learn_from_prompts:
            # The last prompt position stays: it is the anchor of the first round's drafts.
            stretches = [_tail(s) if s.is_prefill else s for s in stretches]
        self._replay.add(*stretches)

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        """One piece of an optimizer step, or without slices a whole one, if a step is owed and there is time for it.

        Returns the report of the step that this call finished. While is_idle the time costs nothing, see TimeBudget.
        With peers it also does its part in the ticks; while is_idle and waiting for them it sleeps a little.
        Raises PeerLostError, again and again, once another rank is lost.
        """
        now_s = time.perf_counter()
        has_time = self.budget.allows(now_s, is_idle=is_idle, part=self._wanted_part)
        report, self._unreported = self._unreported, None
        if self._work is None and not self._is_turn(now_s, has_time):
            self._rest(is_idle)
            return report
        if has_time or self._is_waiting or self._work is None:
            before_s = self.train_s
            # Both at once there cannot be: the first piece of a step is not its last.
            report = self._do_pieces() or report
            if not is_idle:
                self.budget.charge(self.train_s - before_s)
        if self._is_waiting:
            self._rest(is_idle)
        return report

    def _is_turn(self, now_s: float, has_time: bool) -> bool:
        """Whether a tick, and with it maybe a step, is to begin."""
        if self._peers.is_alone:
            return has_time and self._wants_step
        return (has_time and self._wants_step) or now_s - self._ticked_s >= TICK_S

    def _rest(self, is_idle: bool) -> None:
        if is_idle and not self._peers.is_alone:
            time.sleep(IDLE_S)

    @property
    def _wanted_part(self) -> float:
        """How much of the learning that there could be is worth its time now, in 0..1."""
        return SETTLED_PART if self.trend.is_settled else 1.0

    @property
    def _wants_step(self) -> bool:
        is_owed = self.must_step or self.budget.is_step_owed
        return is_owed and self._has_data and not self.notices.is_resting

    @property
    def _has_data(self) -> bool:
        """Enough of it that a batch does not repeat itself."""
        return len(self._replay) + self._num_unstored >= MIN_POSITIONS_PER_BLOCK * self.blocks_here

    @property
    def is_busy(self) -> bool:
        """Whether a step is in progress, or is owed and there is enough experience for it. With peers always."""
        return self._work is not None or self._wants_step or not self._peers.is_alone

    def versions(self) -> list[DrafterVersion]:
        """The latest published versions, oldest first; the last one is live."""
        return self._history.records()

    def rollback(self, version: int | None = None) -> DrafterVersion:
        """Publishes the weights of a kept version again, under a new number; None is the best so far.

        Learning goes on from them, with an optimizer that starts afresh, and they are the best so far from now on:
        what was fled from can only be learnt again. Drops the step in progress.
        Raises ValueError for a version that is not kept, and when the live weights are those already.
        """
        if not self._peers.is_first:
            raise ValueError(f"a rollback holds for all ranks and is rank 0's to ask for, got rank {self._peers.rank}")
        snapshot = self._history.best if version is None else self._history.snapshot(version)
        if self._serves(snapshot.state):
            raise ValueError(
                f"version must have other weights than the live version {self._version}, "
                f"got {'the best so far' if version is None else version}, which has the same"
            )
        code = BEST if version is None else version + 1
        if self._peers.is_alone:
            self._work = self._batch = None
            self._roll_back(code)
            return self.versions()[-1]
        self.finish_tick()  # its step may lead back to the best by itself
        num_before = self.num_rollbacks
        self.notices.rollback = code
        while self.num_rollbacks == num_before:
            self._unreported = self._do_pieces(is_whole=True) or self._unreported
            if self._is_waiting:
                time.sleep(IDLE_S)
        self.notices.rollback = 0
        return self.versions()[-1]

    def _roll_back(self, code: int) -> None:
        """See `Notices.rollback`."""
        snapshot = self._history.best if code == BEST else self._history.snapshot(code - 1)
        self._history.best = snapshot
        self._return_to_best()
        self._publish(snapshot, "rollback")

    def publish_now(self) -> DrafterVersion:
        """Publishes the learner's weights out of turn, unless they serve already; the version that is live then.

        Finishes the step in progress; the next `step_if_due` reports it.
        """
        self.finish_tick()
        snapshot = Snapshot(self._student.copy_state(), self.num_steps)
        if not self._serves(snapshot.state):
            self._publish(snapshot, "learner")
        return self.versions()[-1]

    def forget(self, tenant: str) -> int:
        """Drops and wipes all stored experience of one API key; returns the number of positions dropped.

        Drops the step in progress too: its batch may hold some; with peers, who take part in it, it is finished first.
        What the weights have learnt stays in them.
        """
        if self._peers.is_alone:
            self._work = None
        self.finish_tick()
        self._batch = None
        return self.replay.forget_tenant(tenant)

    def stats(self) -> dict[str, float]:
        """Counts, seconds, bytes and positions, for metrics."""
        return {
            "steps": float(self.num_steps),
            "skipped": float(self.num_skipped),
            "rollbacks": float(self.num_rollbacks),
            "noop_swaps": float(self.num_noop_swaps),
            "train_s": self.train_s,
            "steps_owed": self.budget.rounds_owed / self.budget.rounds_per_step,
            "replay_positions": float(len(self.replay)),
            "replay_capacity": float(self.replay.capacity),
            "replay_bytes": float(self.replay.num_bytes),
            "replay_tenants": float(self.replay.num_tenants),
            "refused_positions": float(self.replay.num_refused),
            "acceptance_trend": self.trend.fast,
            "drifts": float(self.trend.num_drifts),
            "is_settled": float(self.trend.is_settled),
        }

    # Learning

    def step(self) -> UpdateReport:
        """A whole optimizer step on a sample of the replay, or the rest of the one in progress.

        With peers it waits until one of them, or this rank, owes a step that all can make.
        """
        while (report := self._do_pieces(is_whole=True)) is None:
            if self._is_waiting:
                time.sleep(IDLE_S)
        return report

    def finish_tick(self) -> None:
        """Works the tick in progress off, and the step that it may have led to; the next call reports that one."""
        while self._work is not None:
            self._unreported = self._do_pieces(is_whole=True) or self._unreported
            if self._is_waiting:
                time.sleep(IDLE_S)

    def _do_pieces(self, *, is_whole: bool = False) -> UpdateReport | None:
        """Works on the tick or step in progress, or on a new one, up to the end of a piece; the report when it is done.

        is_whole, or a step that is not sliced: up to its end, or until it has to wait for other ranks. After a wait,
        which takes no time that counts, whether there is time to go on is for the caller to see.
        """
        while True:
            has_waited = self._is_waiting
            start_s = time.perf_counter()
            if self._work is None:
                self._work_s = 0.0
            # Not kept meanwhile: a step that raises is over.
            work, self._work = self._work or self._tick(), None
            report, self._is_waiting = None, False
            try:
                self._is_waiting = next(work) is Progress.WAITS
                self._work = work
            except StopIteration as end:
                report = end.value
            except PeerLostError as error:
                self._work = _raising(error)
                raise
            seconds = time.perf_counter() - start_s
            self.train_s += seconds
            self._work_s += seconds
            if report is not None:
                report.seconds = self._work_s
                self.last_report = report
            if self._is_waiting and self._is_agreed and not self.budget.has_limit:
                time.sleep(POLL_S)  # steps are to follow rounds, whatever time they take: also the others'
                continue
            is_piece = (has_waited and self.budget.has_limit) or self.config.blocks_per_slice
            if self._work is None or self._is_waiting or (is_piece and not is_whole):
                return report

    def _tick(self) -> Pieces[UpdateReport | None]:
        """Says its rank report, and makes the step that was agreed on, if one was; its report.

        Without peers what this rank wants is agreed on at once.
        """
        self._store()
        batch = self._batch = self._batch or self._next_batch()
        mine = RankReport(
            **vars(self.notices), wants_step=self._peers.is_alone or self._wants_step,
            num_drafted=self._drafted_since_step, num_accepted=self._accepted_since_step,
            num_tokens=self._tokens_counted, has_woken=self._has_woken, has_waived=self._has_waived,
        )  # fmt: skip
        self._is_agreed = False
        agreed, totals = yield from self._agree(mine, BatchTotals.of(batch))
        self._is_agreed = True
        self._has_waived |= bool(agreed.has_waived)
        if agreed.has_woken:
            self.schedule.reset(self.num_steps)
            self._has_woken = False
        if agreed.rollback:
            self._roll_back(int(agreed.rollback))
        if not agreed.wants_step or agreed.wants_save or agreed.is_resting:
            return None
        if self._is_trim_due(agreed.num_tokens):
            counts_V = yield from self._peers.total(self.token_counts_V.clone())
            self._trim(choose_draft_tokens(counts_V, self._live.config.draft_vocab_size))
            return (yield from self._tick())
        self._batch = None
        self.budget.pay_step()
        self._drafted_since_step -= mine.num_drafted
        self._accepted_since_step -= mine.num_accepted
        acceptance = agreed.num_accepted / agreed.num_drafted if agreed.num_drafted else None
        return (yield from self._step_in_pieces(batch, totals, acceptance))

    def _agree(self, mine: RankReport, totals: BatchTotals) -> Pieces[tuple[RankReport, BatchTotals]]:
        """The sums of all ranks' reports and totals."""
        if self._peers.is_alone:
            return mine, totals
        # One device sync: what the ranks say goes through the CPU.
        message = torch.cat([mine.tensor(), totals.values_K.cpu()])
        yield from self._peers.total(message)
        self._ticked_s = time.perf_counter()
        self.agreed = RankReport.of(message[: rank_report.SIZE])
        yield Progress.WORKED
        return self.agreed, BatchTotals(message[rank_report.SIZE :].to(totals.values_K.device))

    def _step_in_pieces(
        self, batch: ReplayBatch, totals: BatchTotals, acceptance: float | None
    ) -> Pieces[UpdateReport]:
        """An optimizer step on the batches of all ranks; its report. Published when its turn has come.

        Nothing that serves is touched before the last piece, which finds out whether all went well and publishes in
        one go. A step dropped before that was not counted; it may have moved the learner's own copy.
        """
        config, student = self.config, self._student
        weights = self.schedule.weights(self.num_steps, acceptance)
        student.clear_gradient()
        total, values = torch.zeros((), device=self._split.device), Counter()
        parts = list(self._slices(batch))
        for index, part in enumerate(parts):
            part_total, part_values = student.add_gradient(
                part, totals=totals, weights=weights, baseline=self.baseline, is_last=index == len(parts) - 1
            )
            total += part_total
            values.update(part_values)
            yield Progress.WORKED
        losses = torch.stack([total, *values.values()]).double().cpu()
        # Under way together with the gradient: each wait costs rounds.
        work = None if self._peers.is_alone else self._peers.begin_total(losses)
        yield from student.sum_gradient()
        if work is not None:
            yield from self._peers.arrival(work)
        total, *means = losses.tolist()
        grad_norm, skipped, scores = student.clip_gradient(), None, None
        if math.isfinite(total) and math.isfinite(grad_norm):
            student.update()
            self.baseline.update(totals)
            if (self.num_steps + 1) % config.steps_per_canary == 0:
                scores = yield from self._canary()
            yield Progress.WORKED
            if not student.is_finite():
                skipped = "weights or moments not finite after the step"
        else:
            skipped = "loss or gradient not finite"
        self.num_steps += 1
        if skipped is not None:
            self.num_skipped += 1
            self._return_to_best()
        is_published = skipped is None and self._settle(scores)
        return UpdateReport(
            step=self.num_steps, drafter_version=self._version, phase=self.schedule.phase(self.num_steps - 1),
            losses=dict(zip(values, means, strict=True)), weights=weights, grad_norm=grad_norm,
            num_positions=int(totals.num_positions), seconds=0.0, published=is_published, skipped_reason=skipped,
        )

    def _sample(self, num_blocks: int, generator: torch.Generator) -> ReplayBatch:
        """Blocks with the actions as draft ids; their tensors are copies, whatever becomes of the replay."""
        batch = self.replay.sample(
            num_blocks, self.config.block_len, current_version=self._version, generator=generator,
            max_tenant_share=self.config.max_tenant_share,
        )
        self._student.map_actions(batch)
        return batch

    def _next_batch(self) -> ReplayBatch:
        """A step's blocks of this rank."""
        if self._peers.is_alone or self._has_data:
            return self._sample(self.blocks_here, self._generator)
        return self._empty_batch()

    def _empty_batch(self) -> ReplayBatch:
        """A block of nothing, for the part that a rank without experience has in a step."""
        split, shape = self._split, (1, self.config.block_len)
        hidden_NTD = torch.zeros(*shape, split.hidden_size, dtype=split.dtype, device=split.device)
        count_NT = torch.zeros(shape, dtype=torch.int64, device=split.device)
        no_NT, real_NT = count_NT.bool(), count_NT.float()
        return ReplayBatch(
            anchor_ND=hidden_NTD[:, 0], hidden_NTD=hidden_NTD, target_hidden_NTD=hidden_NTD, token_ids_NT=count_NT,
            mask_NT=no_NT, action_NT=count_NT, reward_NT=real_NT, has_reward_NT=no_NT, behaviour_log_probs_NT=real_NT,
            staleness_N=count_NT[:, 0],
        )  # fmt: skip

    def _slices(self, batch: ReplayBatch) -> Iterator[ReplayBatch]:
        """The batch in parts of blocks_per_slice blocks, or the whole of it."""
        num_blocks = len(batch.mask_NT)
        size = self.config.blocks_per_slice or num_blocks
        for first in range(0, num_blocks, size):
            yield ReplayBatch(**{name: tensor[first : first + size] for name, tensor in vars(batch).items()})

    # Canary

    def _canary(self) -> Pieces[tuple[float, float]]:
        """Scores of the learner's drafter and of the best so far on the same stored blocks, a piece at a time.

        The score is the expected accepted prefix of a block: sum over depths of the product of agreements so far. The
        blocks are those of all ranks that have some.
        """
        totals = torch.zeros(3, dtype=torch.int64, device=self._split.device)
        if self._has_data:
            totals[2] = num_blocks = -(-CANARY_BLOCKS // self._peers.num_ranks)
            batch = self._sample(num_blocks, torch.Generator().manual_seed(self.num_steps + 1))
            for part in self._slices(batch):
                yield Progress.WORKED
                totals[:2] += self._student.accepted_prefixes(part, self._history.best.state)
        learner, best, num_all = (yield from self._peers.total(totals.cpu())).tolist()
        return learner / num_all, best / num_all

    def _settle(self, scores: tuple[float, float] | None) -> bool:
        """Ends a finite step: back to the best after a canary that was lost, else published when its turn has come.

        scores: what `_canary` gave, None when it was not its turn. Returns whether the step's weights were published.
        """
        config, history = self.config, self._history
        candidate, best = (None, None) if scores is None else scores
        if scores is not None and candidate < best * (1 - config.canary_tolerance):
            self._return_to_best()
            if not self._serves(history.best.state):
                history.best = dataclasses.replace(history.best, canary_score=best)
                self._publish(history.best, "rollback")
            return False
        is_turn = self.num_steps % config.steps_per_publish == 0
        is_best = scores is not None and candidate >= best
        if not (is_turn or is_best):
            return False
        snapshot = Snapshot(self._student.copy_state(), self.num_steps, candidate)
        if is_best:
            history.best = snapshot
        if is_turn and self._serves(snapshot.state):
            self.num_noop_swaps += 1
            return False
        if is_turn:
            self._publish(snapshot, "learner")
        return is_turn

    def _is_trim_due(self, num_tokens: float) -> bool:
        is_whole = self._live.draft_head.draft_token_ids_V is None
        is_wanted = 0 < self._live.config.draft_vocab_size < self._split.vocab_size
        return is_wanted and is_whole and num_tokens >= self.config.tokens_before_trim

    def _trim(self, token_ids_V: Tensor) -> None:
        """Trims the head of every copy to these tokens; learning goes on from the best weights, cut down."""
        self._batch = None  # its actions are ids of the old head
        self._student.restart_from(self._history.best.state)
        self._student.trim(token_ids_V)
        self._live.draft_head.trim(token_ids_V)
        self._history.drop_weights()
        self._history.best = Snapshot(self._student.copy_state(), self.num_steps)
        self._publish(self._history.best, "learner")

    def _serves(self, state: State) -> bool:
        """Whether the serving drafter has these weights."""
        live = self._live.state_dict()
        return all(torch.equal(live[name], tensor) for name, tensor in state.items())

    def _publish(self, snapshot: Snapshot, source: str) -> None:
        """Makes the learner's weights serve under a new number. snapshot: a copy of them."""
        self._version += 1
        self._live.publish(self.drafter, self._version)
        self._live.has_learnt_lossy |= self._has_waived
        self._history.add(self._version, snapshot, source)

    def _return_to_best(self) -> None:
        """The learner's copy goes back to the best weights; what serves does not change."""
        self.num_rollbacks += 1
        self._student.restart_from(self._history.best.state)

    # Saving

    def state_dict(self) -> dict[str, object]:
        """Everything an exact continuation needs, as nested dicts of tensors and plain numbers.

        Finishes the step in progress; the next `step_if_due` reports it. Of the versions' weights it holds the live
        ones and the best: the others are no longer kept after a resume. All but OWN is the same on all ranks.
        """
        self.finish_tick()
        return {
            **self._student.state_dict(),
            "live": copy_state(self._live),
            "replay": self.replay.state_dict(),
            "versions": self._history.state_dict(),
            "schedule": self.schedule.state_dict(),
            "baseline": self.baseline.state_dict(),
            "trend": self.trend.state_dict(),
            "token_counts": self.token_counts_V,
            "generator": self._generator.get_state(),
            "rounds_owed": self.budget.rounds_owed,
            "counts": {name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues where `state_dict` was taken, the serving drafter included. The time budget starts afresh.

        Raises ValueError, before anything has changed, for counts that no run comes to and weights that are not finite.
        """
        check_counts(state["counts"], where="the learner's counts")
        check_counts({"rounds_owed": state["rounds_owed"]}, where="the learner's budget")
        for name, tensor in state["live"].items():
            if not tensor.isfinite().all():
                raise ValueError(f"the saved drafter's {name} holds NaN or infinity; resume from the checkpoint before")
        self._work = self._unreported = self._batch = None
        token_ids_V = state["drafter"].get("draft_head.draft_token_ids_V")
        if token_ids_V is not None and self._live.draft_head.draft_token_ids_V is None:
            self._trim(token_ids_V.to(self._split.device))
        self._unstored, self._num_unstored = [], 0
        self.token_counts_V.copy_(state["token_counts"])
        self._student.load_state_dict(state)
        self.replay.load_state_dict(state["replay"])
        self.schedule.load_state_dict(state["schedule"])
        self.baseline.load_state_dict(state["baseline"])
        self.trend.load_state_dict(state["trend"])
        self._generator.set_state(state["generator"])
        self.budget.rounds_owed = state["rounds_owed"]
        for name, value in state["counts"].items():
            setattr(self, name, value)
        self._live.load_state_dict(state["live"])
        self._history.load_state_dict(state["versions"], copy_state(self._live))
        self._live.publish(self._live, self._version)
        self._live.has_learnt_lossy |= self._has_waived
        self.restart_clock()

    def take_over(self, states: list[dict[str, object]]) -> None:
        """Goes on with the counts of these saved ranks as its own, and draws afresh.

        For a rank that has loaded what all have alike and its share of the replays, in a job of other ranks than the
        one that was saved. states: as of `state_dict`, each taken over by one rank.
        """
        self.token_counts_V.zero_()
        for state in states:
            self.token_counts_V += state["token_counts"].to(self.token_counts_V.device)
        for name in _SUMMED:
            setattr(self, name, sum(state["counts"][name] for state in states))
        self._generator.manual_seed(self.config.seed + self._peers.rank)


def _raising(error: PeerLostError) -> Pieces[None]:
    """What is in progress for ever once a rank is lost."""
    raise error
    yield


# Of a saved state what each rank has of its own.
OWN = ("replay", "trend", "token_counts", "generator", "rounds_owed", "counts")
_SUMMED = ("_drafted_since_step", "_accepted_since_step", "_tokens_counted")
_COUNTS = (
    "num_steps", "num_skipped", "num_rollbacks", "num_noop_swaps", "train_s", "_version", *_SUMMED, "_has_woken",
    "_has_waived",
)


_COLUMNS = ("token_ids_W", "hidden_WD", "target_hidden_WD", "draft_token_ids_W", "draft_log_probs_W")


def _tail(stretch: Transitions) -> Transitions:
    """The last position of a stretch without drafts."""
    columns = {name: getattr(stretch, name)[-1:] for name in _COLUMNS}
    return dataclasses.replace(stretch, start_position=stretch.start_position + len(stretch) - 1, **columns)
