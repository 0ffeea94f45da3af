"""Faults planted in a learner that works in pieces: what serves stays finite and good, and learning goes on."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import trainers.learning.publish_gate
import trainers.learning.student
from dvi.records import Transitions
from tests.support.random_traffic import VOCAB_SIZE, WIDTH, is_finite, serving, state_of, stretch, trainer_of
from trainers.learning.online import OnlineTrainer

# As a server has it: in pieces, and nothing published that no canary has seen.
SERVED = {"blocks_per_slice": 4, "steps_per_publish": 2, "steps_per_canary": 2, "warmup_steps": 5, "ramp_steps": 5}
NUM_FAULTS = 4
STEPS_BETWEEN = 3


@pytest.fixture(autouse=True)
def small_canary(monkeypatch):
    """Enough for these drafters, and a quarter of the time."""
    monkeypatch.setattr(trainers.learning.publish_gate, "CANARY_BLOCKS", 64)


def spoil(tensor: torch.Tensor, value: float, dice: random.Random) -> None:
    """Puts the value at a random place."""
    with torch.no_grad():
        tensor.view(-1)[dice.randrange(tensor.numel())] = value


def bad_loss(trainer: OnlineTrainer, value: float, dice: random.Random, patch: pytest.MonkeyPatch) -> None:
    compute = trainers.learning.student.losses.compute

    def spoilt_compute(*args: object, **options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, terms = compute(*args, **options)
        return total * value, terms

    patch.setattr(trainers.learning.student.losses, "compute", spoilt_compute)


def bad_gradient(trainer: OnlineTrainer, value: float, dice: random.Random, patch: pytest.MonkeyPatch) -> None:
    clip = trainer._student.clip_gradient

    def spoilt_clip() -> float:
        spoil(dice.choice([p.grad for p in trainer.drafter.parameters() if p.grad is not None]), value, dice)
        return clip()

    patch.setattr(trainer._student, "clip_gradient", spoilt_clip)


def bad_weights(trainer: OnlineTrainer, value: float, dice: random.Random, patch: pytest.MonkeyPatch) -> None:
    spoil(dice.choice(list(trainer.drafter.parameters())), value, dice)


def bad_moments(trainer: OnlineTrainer, value: float, dice: random.Random, patch: pytest.MonkeyPatch) -> None:
    update = trainer._student.update

    def spoilt_update() -> None:
        update()
        state = dice.choice(list(trainer._student.optimizer.state.values()))
        spoil(state[dice.choice(["exp_avg", "exp_avg_sq"])], value, dice)

    patch.setattr(trainer._student, "update", spoilt_update)


def bad_memory(trainer: OnlineTrainer, value: float, dice: random.Random, patch: pytest.MonkeyPatch) -> None:
    name = dice.choice(["hidden", "target_hidden"])
    patch.setitem(trainer.replay._segments.fields, name, torch.full_like(trainer.replay._segments.fields[name], value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fault", [bad_loss, bad_gradient, bad_weights, bad_moments, bad_memory])
def test_a_number_that_is_not_finite_costs_one_step_and_is_never_published(fault, value):
    """Catches a check that looks at the loss alone, or only before the optimizer, or once before the last piece."""
    speculator, dice = serving(), random.Random(f"{fault.__name__} {value}")
    trainer = trainer_of(speculator, **SERVED, canary_tolerance=1.0)  # no canary is lost: all else is counted exactly
    for index in range(NUM_FAULTS):
        for _ in range(dice.randrange(1, STEPS_BETWEEN + 1)):
            assert trainer.step().skipped_reason is None
        for _ in range(dice.randrange(0, 4)):  # in the middle of a step
            trainer.observe([stretch(40 + index)])
            assert trainer.step_if_due() is None
        before, version = state_of(speculator.drafter), speculator.drafter.version
        with pytest.MonkeyPatch.context() as patch:
            fault(trainer, value, dice, patch)
            if fault is bad_memory:
                trainer._tick.drop()  # whose batch was drawn before
            report = trainer.step()
        assert report.skipped_reason is not None and not report.published
        assert trainer.num_skipped == trainer.num_rollbacks == index + 1
        assert speculator.drafter.version == version
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(speculator.drafter), strict=True))
        assert trainer._student.is_finite()
    versions = speculator.drafter.version
    assert [trainer.step().skipped_reason for _ in range(4)] == [None] * 4
    assert speculator.drafter.version == versions + 2 and is_finite(speculator.drafter)


def test_weights_spoilt_after_the_canary_has_begun_are_not_published():
    """Catches a check that is over before the last piece."""
    speculator = serving()
    trainer = trainer_of(speculator, **SERVED)
    trainer.step()
    trainer.observe([stretch(50)])
    for _ in range(10):  # the gradients take 4 pieces, the update one, the canary 16
        trainer.observe([stretch(50)])
        assert trainer.step_if_due() is None
    assert trainer._student.optimizer.state and trainer.num_steps == 1
    with torch.no_grad():
        trainer.drafter.draft_head.lora_A[0, 0] = torch.nan
    assert trainer.step().skipped_reason is not None
    assert speculator.drafter.version == 0 and is_finite(speculator.drafter)


def test_transitions_that_are_not_finite_never_reach_a_step():
    """Catches one broken forward pass of the verifier that spoils every later step."""
    trainer, dice = trainer_of(serving(), **SERVED), random.Random(0)
    for index in range(20):
        bad = stretch(500 + index)
        name = dice.choice(["hidden_WD", "target_hidden_WD", "draft_log_probs_W"])
        spoil(getattr(bad, name), dice.choice([math.nan, math.inf, -math.inf]), dice)
        trainer.observe([bad])
        assert trainer.step().skipped_reason is None
    assert trainer.stats()["refused_positions"] == 20 and trainer.stats()["skipped"] == 0


def scaled(drafter: nn.Module) -> None:
    for parameter in drafter.parameters():
        parameter.mul_(50.0)


def flipped(drafter: nn.Module) -> None:
    for parameter in drafter.parameters():
        parameter.neg_()


@pytest.mark.parametrize("spoil_weights", [scaled, flipped])
def test_a_bad_update_is_stopped_by_the_canary_and_the_best_weights_come_back(spoil_weights):
    """Catches weights that serve before they are judged, and a judgement without consequence."""
    speculator = serving()
    trainer = trainer_of(speculator, **SERVED | {"schedule": "kl_only"})
    for _ in range(40):
        trainer.step()
    served = []
    publish = speculator.drafter.publish

    def watched_publish(source: nn.Module, version: int) -> None:
        served.append([t.clone() for t in source.state_dict().values()])
        publish(source, version)

    speculator.drafter.publish = watched_publish
    for _ in range(3):
        best, num_rollbacks = [t.clone() for t in trainer._gate.history.best.state.values()], trainer.num_rollbacks
        served.clear()
        with torch.no_grad():
            spoil_weights(trainer.drafter)
        trainer.step()
        report = trainer.step()
        assert not report.published and report.skipped_reason is None
        assert trainer.num_rollbacks == num_rollbacks + 1
        # If anything was published it was the best there is.
        for state in [*served, list(trainer.drafter.state_dict().values())]:
            assert all(torch.equal(a, b) for a, b in zip(state, best, strict=True))
        for _ in range(4):
            trainer.step()


def ordinary(index: int) -> Transitions:
    return stretch(index, num_accepted=index % WIDTH, width=index % WIDTH + 1)


def all_accepted(index: int) -> Transitions:
    return stretch(index, num_accepted=WIDTH)


def all_rejected(index: int) -> Transitions:
    return stretch(index, num_accepted=0, width=1)


def one_token(index: int) -> Transitions:
    ids_W = torch.full((WIDTH,), VOCAB_SIZE - 1)
    state_WD = torch.ones_like(stretch(0).hidden_WD)
    return dataclasses.replace(
        stretch(index), token_ids_W=ids_W, draft_token_ids_W=ids_W, hidden_WD=state_WD, target_hidden_WD=state_WD
    )


def wrong_labels(index: int) -> Transitions:
    drawn_WD = torch.randn(WIDTH, stretch(0).hidden_WD.shape[1], generator=torch.Generator().manual_seed(index))
    return dataclasses.replace(stretch(index), target_hidden_WD=10 * drawn_WD)


@pytest.mark.parametrize("lr", [0.01, 10.0])
@pytest.mark.parametrize("traffic", [ordinary, all_accepted, all_rejected, one_token, wrong_labels])
def test_no_traffic_and_no_learning_rate_raises_or_serves_what_is_not_finite(
    traffic: Callable[[int], Transitions], lr: float
):
    """Catches a division by a count that is 0, and an optimizer that runs away into what serves."""
    speculator = serving()
    trainer = OnlineTrainer(speculator, dataclasses.replace(trainer_of(serving()).config, **SERVED, lr=lr))
    for index in range(70):
        trainer.observe([traffic(index)])
        if index >= 40:
            trainer.step()
        assert is_finite(speculator.drafter)
    assert trainer.num_steps == 30
    assert all(math.isfinite(value) for value in trainer.stats().values())
