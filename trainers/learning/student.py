"""The learner's own copy of the drafter, with its optimizer: gradients from batches, updates, scores, snapshots.

Knows batches, losses and weights; knows nothing of replay, versions or serving. On several ranks the copies stay equal:
they start equal, and each takes the sum of all ranks' gradients.
"""
# N blocks, T positions of a block, D hidden, V draft vocabulary.

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.func import functional_call

from dvi.distributed import SOLO, Peers, Pieces, Progress
from dvi.model.drafter import build_drafter
from dvi.model.transfers import to_host
from dvi.records import LossWeights, ReplayBatch
from dvi.settings import LearningSettings
from trainers.learning import losses
from trainers.learning.losses import BatchTotals, RewardBaseline
from trainers.learning.versions import State

# One bucket for all gradients: each message costs its latency, and none is large.
BUCKET_MB = 4096


@dataclass(frozen=True)
class Gradient:
    """Of a step, as it is in the parameters: the loss that it is of, its terms unweighted, and its norm unclipped.

    num_positions: of the blocks that it was taken over.
    """

    total: float
    losses: dict[str, float]
    num_positions: int
    norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.norm)


class Student:
    """A trainable copy of a drafter beside the same frozen head.

    Where there are peers, every method that says so, and `trim`, is to be called by all of them.
    """

    def __init__(self, split: object, drafter: nn.Module, config: LearningSettings, *, peers: Peers = SOLO) -> None:
        self._split, self._config, self._peers = split, config, peers
        copied = build_drafter(split, drafter.config, draft_token_ids_V=drafter.draft_head.draft_token_ids_V)
        copied.load_state_dict(drafter.state_dict())
        self._accelerator = self._accelerate()
        # One that learns alone may be among processes of which the others do not.
        if not peers.is_alone and self._accelerator.num_processes != peers.num_ranks:
            raise ValueError(
                f"accelerate sees {self._accelerator.num_processes} processes where the job has {peers.num_ranks}; "
                "unset ACCELERATE_* variables of another launch"
            )
        self._sums: list[tuple[dist.Work, Tensor, Tensor]] = []  # begun: the work, its message, where it goes
        self._prepare(copied)

    def _accelerate(self) -> Accelerator:
        # Buffers are the same on all ranks; DDP would send them again with every batch.
        options = DistributedDataParallelKwargs(
            broadcast_buffers=False, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
        )
        # The copy is where the split is, wherever that may be.
        return Accelerator(
            device_placement=False, cpu=self._split.device.type == "cpu", mixed_precision="no",
            kwargs_handlers=[options],
        )  # fmt: skip

    def _prepare(self, drafter: nn.Module) -> None:
        config = self._config
        self.drafter = drafter
        optimizer = torch.optim.AdamW(drafter.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        with self._peers.in_library(), warnings.catch_warnings():
            # torch 2.13 has another name for it, which torch 2.11 and accelerate do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # "Evaluation" is its word for a model without DDP around it.
            self._model = self._accelerator.prepare_model(drafter, evaluation_mode=self._peers.is_alone)
        self.optimizer = self._accelerator.prepare_optimizer(optimizer)
        if not self._peers.is_alone:
            self._model.register_comm_hook(None, self._begin_sum)

    # Without annotations: DDP wants them to be types, and here they would be strings.
    def _begin_sum(self, _state, bucket):
        """DDP's hook for a full bucket: begins to sum it over the ranks and lets backward end without the result."""
        gradient_P = bucket.buffer()
        dtype = torch.bfloat16 if self._config.compress_gradient else gradient_P.dtype
        message_P = gradient_P.to(dtype, copy=True)
        self._sums.append((self._peers.begin_total(message_P), message_P, gradient_P))
        own = torch.futures.Future()
        own.set_result(gradient_P)
        return own

    # Weights

    def copy_state(self) -> State:
        return copy_state(self.drafter)

    def restart_from(self, state: State) -> None:
        """Takes these weights, with an optimizer that has forgotten how it came to others."""
        self.drafter.load_state_dict(state)
        self.optimizer.optimizer.state.clear()

    def trim(self, token_ids_V: Tensor) -> None:
        """Trims the head to these tokens; the optimizer starts afresh, its moments had other shapes."""
        drafter = self.drafter
        drafter.draft_head.trim(token_ids_V)
        self._prepare(drafter)

    def is_finite(self) -> bool:
        """Whether the weights and the optimizer's moments are: an infinite moment would freeze its weight."""
        # The count of steps is the host's: sent to the device it would be a wait for every parameter.
        moments = (
            m for state in self.optimizer.state.values() for name, m in state.items()
            if torch.is_tensor(m) and name != "step"
        )  # fmt: skip
        tensors = [*self.drafter.parameters(), *moments]
        sums = torch.stack([t.detach().sum().to(self._split.device) for t in tensors])
        return to_host(sums.isfinite().all()).item()

    # Learning

    def clear_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def map_actions(self, batch: ReplayBatch) -> None:
        """Makes the batch's actions draft ids, in place."""
        draft_head = self.drafter.draft_head
        # What was drafted before the head was trimmed may be out of its reach by now.
        batch.has_reward_NT &= draft_head.can_draft(batch.action_NT)
        batch.action_NT = draft_head.to_draft_ids(batch.action_NT).where(batch.has_reward_NT, 0)

    def add_gradient(
        self, batch: ReplayBatch, *, totals: BatchTotals, weights: LossWeights, baseline: RewardBaseline, is_last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of the batch's part in the loss over `totals`; that part and its terms, detached.

        is_last: of a step's batches; its gradient goes out to the other ranks.
        """
        is_kept = not is_last and not self._peers.is_alone
        with self._model.no_sync() if is_kept else contextlib.nullcontext():
            total, values = self._loss(batch, totals=totals, weights=weights, baseline=baseline)
            self._accelerator.backward(total)
        return total.detach(), values

    def _loss(
        self, batch: ReplayBatch, *, totals: BatchTotals, weights: LossWeights, baseline: RewardBaseline
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.compute(
            self._model(batch.hidden_NTD, batch.anchor_ND), self._target_logits(batch), batch, weights=weights,
            baseline_T=baseline.values_T, target_temperature=self._config.target_temperature,
            normalise_advantage=self._config.normalise_advantage, totals=totals,
        )

    def gradient(
        self, parts: list[ReplayBatch], *, totals: BatchTotals, weights: LossWeights, baseline: RewardBaseline
    ) -> Pieces[Gradient]:
        """The gradient over the batches of all ranks, this one's in parts; clipped. A piece for each part."""
        self.clear_gradient()
        total, values = torch.zeros((), device=self._split.device), Counter()
        for index, part in enumerate(parts):
            part_total, part_values = self.add_gradient(
                part, totals=totals, weights=weights, baseline=baseline, is_last=index == len(parts) - 1
            )
            total += part_total
            values.update(part_values)
            yield Progress.WORKED
        num_positions = torch.stack([part.mask_NT.sum() for part in parts]).sum()
        losses = to_host(torch.stack([number.double() for number in (total, *values.values(), num_positions)]))
        # Under way together with the gradient: each wait costs rounds.
        work = None if self._peers.is_alone else self._peers.begin_total(losses)
        yield from self.sum_gradient()
        if work is not None:
            yield from self._peers.arrival(work)
        total, *means, num_positions = losses.tolist()
        return Gradient(total, dict(zip(values, means, strict=True)), int(num_positions), self.clip_gradient())

    def sum_gradient(self) -> Pieces[None]:
        """Takes the sum of all ranks' gradients for its own."""
        while self._sums:
            work, message_P, gradient_P = self._sums[0]
            yield from self._peers.arrival(work)
            gradient_P.copy_(message_P)
            del self._sums[0]

    def clip_gradient(self) -> float:
        """Scales the gradient down to clip_norm; its norm before."""
        return to_host(self._accelerator.clip_grad_norm_(self._model.parameters(), self._config.clip_norm)).item()

    def update(self) -> None:
        """One step of the optimizer along the gradient."""
        self.optimizer.step()

    @torch.no_grad()
    def accepted_prefixes(self, batch: ReplayBatch, rival: State) -> Tensor:
        """int64 [2]: positions that this drafter, and one with the weights `rival`, would get accepted greedily.

        Over all blocks, the prefix on which drafter and verifier agree.
        """
        target_NT = self._target_logits(batch).argmax(-1)
        inputs = (batch.hidden_NTD, batch.anchor_ND)
        drafts = (self.drafter(*inputs), functional_call(self.drafter, rival, inputs))
        return torch.stack(
            [((logits_NTV.argmax(-1) == target_NT) & batch.mask_NT).long().cumprod(1).sum() for logits_NTV in drafts]
        )

    @torch.no_grad()
    def _target_logits(self, batch: ReplayBatch) -> Tensor:
        return self.drafter.draft_head.frozen_logits(batch.target_hidden_NTD)

    # Saving

    def state_dict(self) -> dict[str, object]:
        return {"drafter": self.copy_state(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes what `state_dict` gave; raises when the head is trimmed otherwise. Other keys are ignored."""
        self.drafter.load_state_dict(state["drafter"])
        self.optimizer.load_state_dict(state["optimizer"])


def copy_state(module: nn.Module) -> State:
    return copy.deepcopy(module.state_dict())
