"""OnlineTrainer: learns a drafter from the verdicts of serving, a little at a time, and publishes it between rounds.

Knows when a step is due and how one is made; knows nothing of decoding, so it is tested with random tensors. What was
observed is `Experience`'s, what learns is a copy, the `Student`, and what of it serves is the `PublishGate`'s to say.

On several ranks each has experience of its own, and all make the same steps on the sum of their gradients: at a `Tick`
every rank hears the same, whether a step is made and all that it depends on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor, nn

from dvi.distributed import SOLO, Peers, Pieces, Progress
from dvi.learner import Learner
from dvi.model.drafter import MAX_DEPTH, choose_draft_tokens
from dvi.records import DrafterVersion, ReplayBatch, Transitions, UpdateReport
from dvi.settings import LearningSettings
from trainers.learning.budget import TimeBudget
from trainers.learning.checkpoint import check_counts
from trainers.learning.experience import Experience
from trainers.learning.loss_schedule import LossSchedule
from trainers.learning.losses import BatchTotals, RewardBaseline
from trainers.learning.publish_gate import PublishGate
from trainers.learning.rank_report import BEST, RankReport
from trainers.learning.replay import ReplayBuffer
from trainers.learning.student import copy_state
from trainers.learning.tick import Tick
from trainers.learning.zero_student import build_student

SETTLED_PART = 0.1  # of the steps, and of the time for them, that remains once acceptance has settled
# Blocks: what a step costs besides its blocks, and its messages, must not become most of it.
SMALLEST_PART = 8


class OnlineTrainer(Learner):
    """A `Learner` for the drafter of one speculator.

    drafter         the learner's copy, ahead of the one that serves. Another one once the head is trimmed.
    replay          all experience observed so far; trend, token_counts_V: see `Experience`.
    num_steps       optimizer steps made; num_skipped those whose loss, gradient or weights were not finite.
    num_rollbacks   returns to earlier weights, by the trainer or by `rollback`.
    num_noop_swaps  publishes left out because the weights served already.
    train_s         seconds spent in observing and in steps, publishing and canaries included.
    last_report     the newest step's UpdateReport; None before the first.
    blocks_here     of a step's blocks those of this rank: a step of many ranks has no more than one of a single rank,
                    as long as each has SMALLEST_PART, and where it has more it is made after as many more rounds.
    follows_rounds  rounds observed owe steps; False where somebody else says when one is due, by must_step.
    notices         what this rank's job has to tell the others at the next tick.
    agreed          the sum of all ranks' reports at the last tick; None before the first, and where there are no peers.
    """

    COUNTS: ClassVar = {"num_steps": "num_steps", "num_skipped": "num_skipped"}

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
        self._gate = PublishGate(self._split, self._live, self._student, config, peers=peers)
        self._experience = Experience(self._split, config, rank=peers.rank, num_blocks=self.blocks_here)
        self.schedule = LossSchedule(
            config.schedule, by=config.switch_by, warmup_steps=config.warmup_steps, ramp_steps=config.ramp_steps
        )
        self.baseline = RewardBaseline(MAX_DEPTH, device=self._split.device)
        self.budget = TimeBudget(
            config.budget, rounds_per_step=config.rounds_per_step * self.part_here, now_s=time.perf_counter()
        )
        self._tick = Tick(self._pieces, peers=peers, budget=self.budget, is_sliced=bool(config.blocks_per_slice))
        self._batch: ReplayBatch | None = None  # for the next step, with reports said of it
        self.trend, self.token_counts_V = self._experience.trend, self._experience.token_counts_V
        self.notices = self._tick.notices
        self.num_steps = self.num_skipped = 0
        self.follows_rounds, self.must_step = True, False

    @property
    def part_here(self) -> float:
        """Of the experience that owes a step, what this rank must have had before it owes one: 1 when alone."""
        return self.blocks_here / self.config.blocks_per_step

    def restart_clock(self) -> None:
        """Forgets saved-up training time: after a pause in which nothing was served, or a resume."""
        self.budget.restart(time.perf_counter())

    # What its parts keep; see the class's docstring.
    drafter: nn.Module = property(attrgetter("_student.drafter"))
    replay: ReplayBuffer = property(attrgetter("_experience.replay"))
    num_rollbacks: int = property(attrgetter("_gate.num_rollbacks"))
    num_noop_swaps: int = property(attrgetter("_gate.num_noop_swaps"))
    train_s: float = property(attrgetter("_tick.train_s"))
    last_report: UpdateReport | None = property(attrgetter("_tick.last_report"))
    agreed: RankReport | None = property(attrgetter("_tick.agreed"))

    # Learner protocol

    def __repr__(self) -> str:
        return (
            f"OnlineTrainer({self.num_steps} steps in {self.train_s:.1f} s, {self.config.schedule}, lr "
            f"{self.config.lr:g}, {len(self._experience):,} positions stored, drafter v{self._gate.version})"
        )

    def observe(self, transitions: list[Transitions]) -> None:
        """Stores the experience of one round (or prefill) and follows the acceptance; its time counts as training's."""
        start_s = time.perf_counter()
        self._gate.has_waived |= not all(s.is_honest for s in transitions)
        if self.follows_rounds and any(not s.is_prefill for s in transitions):
            self.budget.owe_round(part=self._wanted_part)
        self._experience.observe(transitions)
        seconds = time.perf_counter() - start_s
        self._tick.train_s += seconds
        self.budget.charge(seconds)

    def end_request(self, request_id: int) -> None:
        """Nothing more comes of this request."""
        self.replay.end(request_id)

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        """One piece of an optimizer step, or without slices a whole one, if a step is owed and there is time for it.

        Returns the report of the step that this call finished. While is_idle the time costs nothing, see TimeBudget.
        With peers it also does its part in the ticks; while is_idle and waiting for them it sleeps a little.
        Raises PeerLostError, again and again, once another rank is lost.
        """
        now_s = time.perf_counter()
        has_time = self.budget.allows(now_s, is_idle=is_idle, part=self._wanted_part)
        tick = self._tick
        report = tick.take_report()
        if not tick.is_open and not (has_time and self._wants_step) and not tick.is_overdue(now_s):
            tick.rest(is_idle=is_idle)
            return report
        if has_time or tick.is_waiting or not tick.is_open:
            before_s = self.train_s
            # Both at once there cannot be: the first piece of a step is not its last.
            report = tick.advance() or report
            if not is_idle:
                self.budget.charge(self.train_s - before_s)
        if tick.is_waiting:
            tick.rest(is_idle=is_idle)
        return report

    @property
    def _wanted_part(self) -> float:
        """How much of the learning that there could be is worth its time now, in 0..1."""
        return SETTLED_PART if self.trend.is_settled else 1.0

    @property
    def _wants_step(self) -> bool:
        is_owed = self.must_step or self.budget.is_step_owed
        return is_owed and self._experience.is_enough and not self.notices.is_resting

    @property
    def is_busy(self) -> bool:
        """Whether a step is in progress, or is owed and there is enough experience for it. With peers always."""
        return self._tick.is_open or self._wants_step or not self._peers.is_alone

    def versions(self) -> list[DrafterVersion]:
        """The latest published versions, oldest first; the last one is live."""
        return self._gate.history.records()

    def rollback(self, version: int | None = None) -> DrafterVersion:
        """Publishes the weights of a kept version again, under a new number; None is the best so far.

        Learning goes on from them, with an optimizer that starts afresh, and they are the best so far from now on:
        what was fled from can only be learnt again. Drops the step in progress.
        Raises ValueError for a version that is not kept, and when the live weights are those already.
        """
        if not self._peers.is_first:
            raise ValueError(f"a rollback holds for all ranks and is rank 0's to ask for, got rank {self._peers.rank}")
        self._gate.check_rollback(version)
        if self._peers.is_alone:
            self._tick.drop()
            self._batch = None
            self._gate.roll_back(version)
            return self.versions()[-1]
        self._tick.finish()  # its step may lead back to the best by itself
        num_before = self.num_rollbacks
        self.notices.rollback = BEST if version is None else version + 1
        self._tick.work_while(lambda: self.num_rollbacks == num_before)
        self.notices.rollback = 0
        return self.versions()[-1]

    def publish_now(self) -> DrafterVersion:
        """Publishes the learner's weights out of turn, unless they serve already; the version that is live then.

        Finishes the step in progress; the next `step_if_due` reports it.
        """
        self.finish_tick()
        return self._gate.publish_now(self.num_steps)

    def forget(self, tenant: str) -> int:
        """Drops and wipes all stored experience of one API key; returns the number of positions dropped.

        Drops the step in progress too: its batch may hold some; with peers, who take part in it, it is finished first.
        What the weights have learnt stays in them.
        """
        if self._peers.is_alone:
            self._tick.drop()
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
            **self._experience.stats(),
        }

    # Learning

    def step(self) -> UpdateReport:
        """A whole optimizer step on a sample of the replay, or the rest of the one in progress.

        With peers it waits until one of them, or this rank, owes a step that all can make.
        """
        return self._tick.next_report()

    def hear(self, agreed: RankReport) -> None:
        """Takes the ranks' sum from whoever had them add up their reports outside a tick."""
        self._tick.agreed = agreed

    def finish_tick(self) -> None:
        """Works the tick in progress off, and the step that it may have led to; the next call reports that one."""
        self._tick.finish()

    def _pieces(self) -> Pieces[UpdateReport | None]:
        """Says its rank report, and makes the step that was agreed on, if one was; its report.

        Without peers what this rank wants is agreed on at once.
        """
        seen, gate = self._experience, self._gate
        seen.store()
        batch = self._batch = self._batch or self._next_batch()
        mine = RankReport(
            **vars(self.notices), wants_step=self._peers.is_alone or self._wants_step,
            num_drafted=seen.num_drafted, num_accepted=seen.num_accepted, num_tokens=seen.num_tokens,
            has_woken=seen.has_woken, has_waived=gate.has_waived,
        )  # fmt: skip
        agreed, totals = yield from self._tick.agree(mine, BatchTotals.of(batch))
        gate.has_waived |= bool(agreed.has_waived)
        if agreed.has_woken:
            self.schedule.reset(self.num_steps)
            seen.has_woken = False
        if agreed.rollback:
            gate.roll_back(None if agreed.rollback == BEST else int(agreed.rollback) - 1)
        if not agreed.wants_step or agreed.wants_save or agreed.is_resting:
            return None
        if gate.is_trim_due(agreed.num_tokens):
            counts_V = yield from self._peers.total(self.token_counts_V.clone())
            self._trim(choose_draft_tokens(counts_V, self._live.config.draft_vocab_size))
            return (yield from self._pieces())
        self._batch = None
        self.budget.pay_step()
        seen.num_drafted -= mine.num_drafted
        seen.num_accepted -= mine.num_accepted
        acceptance = agreed.num_accepted / agreed.num_drafted if agreed.num_drafted else None
        return (yield from self._step_in_pieces(batch, totals, acceptance))

    def _step_in_pieces(
        self, batch: ReplayBatch, totals: BatchTotals, acceptance: float | None
    ) -> Pieces[UpdateReport]:
        """An optimizer step on the batches of all ranks; its report. Published when its turn has come.

        Nothing that serves is touched before the last piece, which finds out whether all went well and publishes in
        one go. A step dropped before that was not counted; it may have moved the learner's own copy.
        """
        student, weights = self._student, self.schedule.weights(self.num_steps, acceptance)
        gradient = yield from student.gradient(
            list(self._experience.slices(batch)), totals=totals, weights=weights, baseline=self.baseline
        )
        skipped = scores = None
        if gradient.is_finite:
            student.update()
            self.baseline.update(totals)
            if (self.num_steps + 1) % self.config.steps_per_canary == 0:
                scores = yield from self._gate.canary(self._canary_blocks)
            yield Progress.WORKED
            if not student.is_finite():
                skipped = "weights or moments not finite after the step"
        else:
            skipped = "loss or gradient not finite"
        self.num_steps += 1
        if skipped is not None:
            self.num_skipped += 1
            self._gate.return_to_best()
        is_published = skipped is None and self._gate.settle(self.num_steps, scores)
        return UpdateReport(
            step=self.num_steps, drafter_version=self._gate.version, phase=self.schedule.phase(self.num_steps - 1),
            losses=gradient.losses, weights=weights, grad_norm=gradient.norm,
            num_positions=gradient.num_positions, seconds=0.0, published=is_published, skipped_reason=skipped,
        )

    def _next_batch(self) -> ReplayBatch:
        """A step's blocks of this rank."""
        if self._peers.is_alone or self._experience.is_enough:
            return self._sample(self.blocks_here)
        return self._experience.empty_batch()

    def _canary_blocks(self, num_blocks: int) -> Iterator[ReplayBatch]:
        """Blocks of this rank to compare weights on, in parts; none where it has not enough."""
        if self._experience.is_enough:
            batch = self._sample(num_blocks, torch.Generator().manual_seed(self.num_steps + 1))
            yield from self._experience.slices(batch)

    def _sample(self, num_blocks: int, generator: torch.Generator | None = None) -> ReplayBatch:
        """Blocks with the actions as draft ids; their tensors are copies, whatever becomes of the replay."""
        batch = self._experience.sample(num_blocks, version=self._gate.version, generator=generator)
        self._student.map_actions(batch)
        return batch

    def _trim(self, token_ids_V: Tensor) -> None:
        """Trims the head of every copy to these tokens; learning goes on from the best weights, cut down."""
        self._batch = None  # its actions are ids of the old head
        self._gate.trim(token_ids_V, self.num_steps)

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
            **self._experience.state_dict(),
            "versions": self._gate.history.state_dict(),
            "schedule": self.schedule.state_dict(),
            "baseline": self.baseline.state_dict(),
            "rounds_owed": self.budget.rounds_owed,
            "counts": {name: getattr(*place) for name, place in self._places.items()},
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
        self._tick.drop()
        self._tick.take_report()
        self._batch = None
        token_ids_V = state["drafter"].get("draft_head.draft_token_ids_V")
        if token_ids_V is not None and self._live.draft_head.draft_token_ids_V is None:
            self._trim(token_ids_V.to(self._split.device))
        self._student.load_state_dict(state)
        self._experience.load_state_dict(state)
        self.schedule.load_state_dict(state["schedule"])
        self.baseline.load_state_dict(state["baseline"])
        self.budget.rounds_owed = state["rounds_owed"]
        for name, value in state["counts"].items():
            setattr(*self._places[name], value)
        self._gate.load(state["versions"], state["live"])
        self.restart_clock()

    def take_over(self, states: list[dict[str, object]]) -> None:
        """Goes on with the counts of these saved ranks as its own, and draws afresh.

        For a rank that has loaded what all have alike and its share of the replays, in a job of other ranks than the
        one that was saved. states: as of `state_dict`, each taken over by one rank.
        """
        self._experience.take_over(states)

    @property
    def _places(self) -> dict[str, tuple[object, str]]:
        """By the name that a count has in a saved state: whose attribute it is, and which."""
        owners = (self, self._tick, self._gate, self._experience)
        return {saved: (owner, name) for owner in owners for saved, name in owner.COUNTS.items()}


# Of a saved state what each rank has of its own.
OWN = ("replay", "trend", "token_counts", "generator", "rounds_owed", "counts")
