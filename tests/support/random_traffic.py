"""A learner beside random tensors: traffic, a frozen head and a serving drafter, without any model."""
# D hidden, V vocabulary, W positions of a stretch.

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvi.model.drafter import build_drafter
from dvi.records import Transitions
from dvi.settings import LearningSettings
from tests.support.drafter_doubles import small_config
from trainers.learning.online import OnlineTrainer

HIDDEN, VOCAB_SIZE, WIDTH = 12, 30, 4
SETTINGS = LearningSettings(
    lr=0.01, blocks_per_step=16, rounds_per_step=1, budget=1.0, steps_per_publish=2, steps_per_canary=1000,
    replay_positions=1024, schedule="kl_rl", warmup_steps=20, ramp_steps=20,
)  # fmt: skip


def serving(kind: str = "anchored", *, draft_vocab_size: int = 0) -> SimpleNamespace:
    """What a trainer asks of a speculator: a frozen head and a published drafter, without any model."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(VOCAB_SIZE, HIDDEN, generator=generator)
    split = SimpleNamespace(
        head_weight_VD=weight_VD, head_bias_V=None, final_norm=nn.LayerNorm(HIDDEN), post_head=lambda logits: logits,
        head=lambda hidden: F.linear(hidden, weight_VD), hidden_size=HIDDEN, vocab_size=VOCAB_SIZE,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    torch.manual_seed(0)
    drafter = build_drafter(split, small_config(kind, draft_vocab_size=draft_vocab_size))
    drafter.publish(drafter, 0)
    return SimpleNamespace(split=split, drafter=drafter.requires_grad_(False))


def stretch(
    round_index: int, *, num_accepted: int = WIDTH - 1, width: int = WIDTH, tenant: str = ""
) -> Transitions:
    """One round of request 0. h_L is a fixed function of h_k, so that there is something to learn."""
    generator = torch.Generator().manual_seed(round_index)
    hidden_WD = torch.randn(width, HIDDEN, generator=generator)
    mix_DD = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99))
    return Transitions(
        request_id=0, start_position=round_index * width, hidden_WD=hidden_WD, target_hidden_WD=hidden_WD @ mix_DD / 2,
        token_ids_W=torch.randint(VOCAB_SIZE // 3, (width,), generator=generator), num_drafted=width,
        num_accepted=num_accepted, draft_token_ids_W=torch.randint(VOCAB_SIZE // 3, (width,), generator=generator),
        draft_log_probs_W=torch.full((width,), -1.0), drafter_version=0, tenant=tenant,
    )  # fmt: skip


def trainer_of(speculator: SimpleNamespace, **changes) -> OnlineTrainer:
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, **changes))
    trainer.observe([stretch(i) for i in range(40)])
    return trainer


def state_of(drafter: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*drafter.state_dict().values(), drafter.draft_head.published_buffer)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def is_finite(drafter: nn.Module) -> bool:
    return all(t.isfinite().all() for t in state_of(drafter))
