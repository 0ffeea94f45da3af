"""The learner's own copy of the drafter, with its optimizer: gradients from batches, updates, scores, snapshots.

Knows batches, losses and weights; knows nothing of replay, versions or serving.
"""
# N blocks, T positions of a block, D hidden, V draft vocabulary.

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from dvi import losses
from dvi.drafter import build_drafter
from dvi.losses import RewardBaseline
from dvi.records import LossWeights, ReplayBatch
from dvi.settings import LearningSettings
from trainers.versions import State


class Student:
    """A trainable copy of a drafter beside the same frozen head."""

    def __init__(self, split: object, drafter: nn.Module, config: LearningSettings) -> None:
        self._split, self._config = split, config
        copied = build_drafter(split, drafter.config, draft_token_ids_V=drafter.draft_head.draft_token_ids_V)
        copied.load_state_dict(drafter.state_dict())
        self._accelerator = Accelerator(cpu=split.device.type == "cpu")
        self._prepare(copied)

    def _prepare(self, drafter: nn.Module) -> None:
        config = self._config
        optimizer = torch.optim.AdamW(drafter.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self._model, self.optimizer = self._accelerator.prepare(drafter, optimizer)

    @property
    def drafter(self) -> nn.Module:
        return self._accelerator.unwrap_model(self._model)

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
        moments = (m for state in self.optimizer.state.values() for m in state.values() if torch.is_tensor(m))
        tensors = [*self.drafter.parameters(), *moments]
        return bool(torch.stack([t.detach().sum().to(self._split.device) for t in tensors]).isfinite().all())

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
        self, batch: ReplayBatch, *, whole: ReplayBatch, weights: LossWeights, baseline: RewardBaseline
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of the batch's part in the loss of `whole`; that part and its terms, detached."""
        total, values = losses.compute(
            self._model(batch.hidden_NTD, batch.anchor_ND), self._target_logits(batch), batch, weights=weights,
            baseline_T=baseline.values_T, target_temperature=self._config.target_temperature,
            normalise_advantage=self._config.normalise_advantage, whole=whole,
        )
        self._accelerator.backward(total)
        return total.detach(), values

    def clip_gradient(self) -> float:
        """Scales the gradient down to clip_norm; its norm before."""
        return float(self._accelerator.clip_grad_norm_(self._model.parameters(), self._config.clip_norm))

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
