"""OnlineTrainer: learns a drafter from the verdicts of serving, a little at a time, and publishes it between rounds.

Knows transitions, replay, losses and the drafter's parameters; knows nothing of decoding, so it is tested with random
tensors. The learner owns a second copy of the drafter's parameters: what serves changes only in `_publish`.
"""
# N blocks, T positions of a block, D hidden, V draft vocabulary.

from __future__ import annotations

import copy
import dataclasses
import math
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dvi import losses
from dvi.config import LearningSettings
from dvi.drafter import MAX_DEPTH, build_drafter
from dvi.loss_schedule import LossSchedule
from dvi.losses import RewardBaseline
from dvi.records import ReplayBatch, Transitions, UpdateReport
from dvi.replay import ReplayBuffer
from trainers.drift import AcceptanceTrend

MIN_POSITIONS_PER_BLOCK = 2  # replay positions per sampled block before the first step: below it, batches repeat
CREDIT_CAP_S = 0.5  # unused training time that may be saved up: a quiet minute must not buy a stalled one
CANARY_BLOCKS = 256  # fewer, and the score's noise alone looks like a loss of a tenth
IDLE_SHARE = 0.1  # of the time budget that is still used once acceptance has settled


class OnlineTrainer:
    """A `Learner` for the drafter of one speculator.

    num_steps       optimizer steps made; num_skipped those whose loss or gradient was not finite; num_rollbacks the
                    returns to the best drafter so far.
    train_s         seconds spent in steps, publishing and canaries included.
    last_report     the newest step's UpdateReport; None before the first.
    """

    def __init__(self, speculator: object, config: LearningSettings | None = None) -> None:
        """speculator: anything with `split` and `drafter`. Raises ValueError for settings that do not fit it."""
        self.config = config = config or LearningSettings()
        self._split, self._live = speculator.split, speculator.drafter
        head = self._live.draft_head
        drafter = build_drafter(self._split, self._live.config, draft_token_ids_V=head.draft_token_ids_V)
        drafter.load_state_dict(self._live.state_dict())
        self.accelerator = Accelerator(cpu=self._split.device.type == "cpu")
        self._prepare(drafter)
        self.replay = ReplayBuffer(
            capacity_positions=config.replay_positions, hidden_size=self._split.hidden_size, max_block=config.block_len,
            dtype=self._split.dtype, device=self._split.device, reservoir_fraction=config.reservoir_fraction,
            seed=config.seed,
        )
        self.schedule = LossSchedule(
            config.schedule, by=config.switch_by, warmup_steps=config.warmup_steps, ramp_steps=config.ramp_steps
        )
        self.baseline = RewardBaseline(MAX_DEPTH, device=self._split.device)
        self.trend = AcceptanceTrend()
        self.token_counts_V = torch.zeros(self._split.vocab_size, dtype=torch.int64, device=self._split.device)
        self._generator = torch.Generator().manual_seed(config.seed)
        self.num_steps = self.num_skipped = self.num_rollbacks = 0
        self.train_s = 0.0
        self.last_report: UpdateReport | None = None
        self._version = self._live.version
        self._rounds_since_step = self._tokens_counted = 0
        self._drafted_since_step = self._accepted_since_step = 0
        self._best_state = _copy_state(self._drafter)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Forgets saved-up training time: after a pause in which nothing was served, or a resume."""
        self._credit_s, self._clock_s = 0.0, time.perf_counter()

    def _prepare(self, drafter: nn.Module) -> None:
        config = self.config
        optimizer = torch.optim.AdamW(drafter.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self._model, self._optimizer = self.accelerator.prepare(drafter, optimizer)

    @property
    def _drafter(self) -> nn.Module:
        return self.accelerator.unwrap_model(self._model)

    # Learner protocol

    def observe(self, transitions: list[Transitions]) -> None:
        """Stores the experience of one round (or prefill) and follows the acceptance; its time counts as training's."""
        start_s = time.perf_counter()
        stretches = transitions
        if not self.config.learn_from_prompts:
            # The last prompt position stays: it is the anchor of the first round's drafts.
            stretches = [_tail(s) if s.is_prefill else s for s in transitions]
        self.replay.add(*stretches)
        num_drafted = sum(s.num_drafted for s in transitions)
        num_accepted = sum(s.num_accepted for s in transitions)
        for stretch in transitions:
            if not stretch.is_prefill:
                # Not bincount: on a GPU it waits for the device.
                self.token_counts_V.index_add_(0, stretch.token_ids_W, torch.ones_like(stretch.token_ids_W))
                self._tokens_counted += len(stretch)
        self._rounds_since_step += any(not s.is_prefill for s in transitions)
        self._drafted_since_step += num_drafted
        self._accepted_since_step += num_accepted
        if self.trend.observe(num_drafted, num_accepted):
            self.schedule.reset(self.num_steps)
        seconds = time.perf_counter() - start_s
        self.train_s += seconds
        self._credit_s -= seconds

    def step_if_due(self) -> UpdateReport | None:
        """One optimizer step if enough rounds have passed and the time budget has room for it."""
        now = time.perf_counter()
        share = self.config.budget * (IDLE_SHARE if self.trend.is_settled else 1.0)
        self._credit_s = min(self._credit_s + share * (now - self._clock_s), CREDIT_CAP_S)
        self._clock_s = now
        if not self._is_due():
            return None
        report = self.step()
        self._clock_s = time.perf_counter()
        if self.config.budget < 1:  # a budget of 1 is no budget: steps follow rounds alone and can be reproduced
            self._credit_s -= report.seconds * (1 - share)
        return report

    def _is_due(self) -> bool:
        has_data = len(self.replay) >= MIN_POSITIONS_PER_BLOCK * self.config.blocks_per_step
        has_time = self.config.budget >= 1 or self._credit_s > 0
        return has_data and has_time and self._rounds_since_step >= self.config.rounds_per_step

    # Learning

    def step(self) -> UpdateReport:
        """One optimizer step on a sample of the replay, published when its turn has come."""
        start_s = time.perf_counter()
        config = self.config
        if self._is_trim_due():
            self._trim(self.token_counts_V.topk(self._live.config.draft_vocab_size).indices)
        acceptance = self._accepted_since_step / self._drafted_since_step if self._drafted_since_step else None
        weights = self.schedule.weights(self.num_steps, acceptance)
        batch = self.replay.sample(
            config.blocks_per_step, config.block_len, current_version=self._version, generator=self._generator
        )
        total, values = self._loss(batch, weights)
        self._optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        grad_norm = float(self.accelerator.clip_grad_norm_(self._model.parameters(), config.clip_norm))
        skipped = None
        if math.isfinite(float(total.detach())) and math.isfinite(grad_norm):
            self._optimizer.step()
            self.baseline.update(batch.reward_NT, batch.has_reward_NT)
            if not self._is_finite():
                skipped = "weights not finite after the step"
        else:
            skipped = "loss or gradient not finite"
        if skipped is not None:
            self.num_skipped += 1
            self._return_to_best()
        self.num_steps += 1
        self._rounds_since_step = self._drafted_since_step = self._accepted_since_step = 0
        is_published = skipped is None and self.num_steps % config.steps_per_publish == 0
        if skipped is None and self.num_steps % config.steps_per_canary == 0:
            is_published = self._passes_canary() and is_published
        if is_published:
            self._publish()
        seconds = time.perf_counter() - start_s
        self.train_s += seconds
        self.last_report = UpdateReport(
            step=self.num_steps, drafter_version=self._version, phase=self.schedule.phase(self.num_steps - 1),
            losses={name: float(value) for name, value in values.items()}, weights=weights, grad_norm=grad_norm,
            num_positions=int(batch.mask_NT.sum()), seconds=seconds, published=is_published, skipped_reason=skipped,
        )
        return self.last_report

    def _loss(self, batch: ReplayBatch, weights: object) -> tuple[Tensor, dict[str, Tensor]]:
        draft_head = self._drafter.draft_head
        draft_logits_NTV = self._model(batch.hidden_NTD, batch.anchor_ND)
        with torch.no_grad():
            target_logits_NTV = draft_head.gather_logits(self._split.head(batch.target_hidden_NTD))
        # What was drafted before the head was trimmed may be out of its reach by now.
        batch.has_reward_NT &= draft_head.can_draft(batch.action_NT)
        batch.action_NT = draft_head.to_draft_ids(batch.action_NT).where(batch.has_reward_NT, 0)
        return losses.compute(
            draft_logits_NTV, target_logits_NTV, batch, weights=weights, baseline_T=self.baseline.values_T,
            target_temperature=self.config.target_temperature,
        )

    def _is_trim_due(self) -> bool:
        is_whole = self._live.draft_head.draft_token_ids_V is None
        is_wanted = 0 < self._live.config.draft_vocab_size < self._split.vocab_size
        return is_wanted and is_whole and self._tokens_counted >= self.config.tokens_before_trim

    def _trim(self, token_ids_V: Tensor) -> None:
        """Trims the head of every copy to these tokens; the optimizer starts afresh, its moments had other shapes."""
        drafter = self._drafter
        drafter.load_state_dict(self._best_state)
        for module in (self._live, drafter):
            module.draft_head.trim(token_ids_V)
        self._prepare(drafter)
        self._best_state = _copy_state(drafter)
        self._publish()

    def _is_finite(self) -> bool:
        return bool(torch.stack([p.detach().sum() for p in self._drafter.parameters()]).isfinite().all())

    def _publish(self) -> None:
        self._version += 1
        self._live.publish(self._drafter, self._version)

    @torch.no_grad()
    def _passes_canary(self) -> bool:
        """Holds the learner's drafter against the best so far on the same stored blocks; returns to it after a loss.

        The score is the expected accepted prefix of a block: sum over depths of the product of agreements so far.
        """
        generator = torch.Generator().manual_seed(self.num_steps)
        batch = self.replay.sample(
            CANARY_BLOCKS, self.config.block_len, current_version=self._version, generator=generator
        )
        target_logits_NTV = self._drafter.draft_head.gather_logits(self._split.head(batch.target_hidden_NTD))
        target_NT = target_logits_NTV.argmax(-1)

        def score() -> float:
            agrees_NT = (self._drafter(batch.hidden_NTD, batch.anchor_ND).argmax(-1) == target_NT) & batch.mask_NT
            return float(agrees_NT.long().cumprod(1).sum(1).double().mean())

        candidate_state, candidate = _copy_state(self._drafter), score()
        self._drafter.load_state_dict(self._best_state)
        best = score()
        if candidate < best * (1 - self.config.canary_tolerance):
            self._return_to_best()
            self._publish()
            return False
        self._drafter.load_state_dict(candidate_state)
        if candidate >= best:
            self._best_state = candidate_state
        return True

    def _return_to_best(self) -> None:
        """Back to the best parameters, with an optimizer that has forgotten how it got away from them."""
        self.num_rollbacks += 1
        self._drafter.load_state_dict(self._best_state)
        self._optimizer.optimizer.state.clear()

    # Saving

    def state_dict(self) -> dict[str, object]:
        """Everything an exact continuation needs, as nested dicts of tensors and plain numbers."""
        return {
            "drafter": _copy_state(self._drafter),
            "best": self._best_state,
            "live": _copy_state(self._live),
            "optimizer": self._optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "schedule": self.schedule.state_dict(),
            "baseline": self.baseline.state_dict(),
            "trend": self.trend.state_dict(),
            "token_counts": self.token_counts_V,
            "generator": self._generator.get_state(),
            "counts": {name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues where `state_dict` was taken, the serving drafter included. The time budget starts afresh."""
        token_ids_V = state["drafter"].get("draft_head.draft_token_ids_V")
        if token_ids_V is not None and self._live.draft_head.draft_token_ids_V is None:
            self._trim(token_ids_V.to(self._split.device))
        self.token_counts_V.copy_(state["token_counts"])
        self._drafter.load_state_dict(state["drafter"])
        self._best_state = {name: tensor.clone() for name, tensor in state["best"].items()}
        self._optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])
        self.schedule.load_state_dict(state["schedule"])
        self.baseline.load_state_dict(state["baseline"])
        self.trend.load_state_dict(state["trend"])
        self._generator.set_state(state["generator"])
        for name, value in state["counts"].items():
            setattr(self, name, value)
        self._live.load_state_dict(state["live"])
        self._live.publish(self._live, self._version)
        self.restart_clock()


_COUNTS = (
    "num_steps", "num_skipped", "num_rollbacks", "train_s", "_version", "_rounds_since_step", "_drafted_since_step",
    "_accepted_since_step", "_tokens_counted",
)


_COLUMNS = ("token_ids_W", "hidden_WD", "target_hidden_WD", "draft_token_ids_W", "draft_log_probs_W")


def _copy_state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def _tail(stretch: Transitions) -> Transitions:
    """The last position of a stretch without drafts."""
    columns = {name: getattr(stretch, name)[-1:] for name in _COLUMNS}
    return dataclasses.replace(stretch, start_position=stretch.start_position + len(stretch) - 1, **columns)
