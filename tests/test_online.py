"""The learner beside serving, on random tensors: it learns, keeps its budget, survives bad numbers, resumes exactly."""
# D hidden, V vocabulary, W positions of a stretch.

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainers.online
from dvi.config import LearningSettings
from dvi.draft_length import FixedLength
from dvi.drafter import DRAFTER_KINDS, build_drafter
from dvi.records import SamplingParams, Transitions
from dvi.speculator import SelfSpeculator
from tests.drafter_doubles import small_config
from trainers.checkpoint import CheckpointStore
from trainers.drift import AcceptanceTrend
from trainers.online import OnlineTrainer

STORIES = Path(__file__).parent / "stories260k"
HIDDEN, VOCAB_SIZE, WIDTH = 12, 30, 4
SETTINGS = LearningSettings(
    lr=0.01, blocks_per_step=16, rounds_per_step=1, budget=1.0, steps_per_publish=2, steps_per_canary=1000,
    replay_positions=1024, warmup_steps=20, ramp_steps=20,
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


def stretch(round_index: int, *, num_accepted: int = WIDTH - 1, width: int = WIDTH) -> Transitions:
    """One round of request 0. h_L is a fixed function of h_k, so that there is something to learn."""
    generator = torch.Generator().manual_seed(round_index)
    hidden_WD = torch.randn(width, HIDDEN, generator=generator)
    mix_DD = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99))
    return Transitions(
        request_id=0, start_position=round_index * width, hidden_WD=hidden_WD, target_hidden_WD=hidden_WD @ mix_DD / 2,
        token_ids_W=torch.randint(VOCAB_SIZE // 3, (width,), generator=generator), num_drafted=width,
        num_accepted=num_accepted, draft_token_ids_W=torch.randint(VOCAB_SIZE // 3, (width,), generator=generator),
        draft_log_probs_W=torch.full((width,), -1.0), drafter_version=0,
    )  # fmt: skip


def trainer_of(speculator: SimpleNamespace, **changes) -> OnlineTrainer:
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, **changes))
    trainer.observe([stretch(i) for i in range(40)])
    return trainer


def state_of(drafter: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*drafter.state_dict().values(), drafter.draft_head._published_DV)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def is_finite(drafter: nn.Module) -> bool:
    return all(t.isfinite().all() for t in state_of(drafter))


# Learning


@pytest.mark.parametrize("draft_vocab_size", [0, 12])
@pytest.mark.parametrize("kind", list(DRAFTER_KINDS))
def test_the_loss_falls_and_versions_are_published(kind, draft_vocab_size):
    """Catches gradients that do not arrive, a learner that never publishes, a version that does not count publishes."""
    speculator = serving(kind, draft_vocab_size=draft_vocab_size)
    trainer = trainer_of(speculator, tokens_before_trim=1)
    reports = [trainer.step() for _ in range(80)]
    first, last = (sum(r.losses["forward_kl"] for r in some) / 5 for some in (reports[:5], reports[-5:]))
    assert last < 0.8 * first
    is_trimmed = draft_vocab_size > 0
    assert speculator.drafter.version == 40 + is_trimmed == reports[-1].drafter_version
    assert speculator.drafter.draft_head.vocab_size == (draft_vocab_size or VOCAB_SIZE)
    assert [r.published for r in reports] == [False, True] * 40
    assert {r.phase for r in reports} == {"kl", "ramp", "rl"}
    # What serves is what was learnt.
    hidden_NTD, anchor_ND = stretch(1).hidden_WD[None], stretch(2).hidden_WD[:1]
    state = speculator.drafter.begin(anchor_ND)
    torch.testing.assert_close(
        speculator.drafter.step(hidden_NTD[:, 0], state, 0), trainer._drafter(hidden_NTD, anchor_ND)[:, 0].detach(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_a_step_waits_for_data_and_for_its_turn():
    """Catches steps on an empty buffer, and a cadence counted in stretches or prefills instead of rounds."""
    trainer = OnlineTrainer(serving(), dataclasses.replace(SETTINGS, rounds_per_step=3))
    trainer.observe([])
    assert trainer.step_if_due() is None
    due = []
    for i in range(12):
        trainer.observe([stretch(3 * i + j) for j in range(3)])
        trainer.observe([dataclasses.replace(stretch(100 + i), is_prefill=True, num_drafted=0, num_accepted=0)])
        due.append(trainer.step_if_due() is not None)
    assert due == [False, False, True] * 4


def test_training_takes_no_more_than_its_share_of_the_time(monkeypatch):
    """Catches a budget that is measured but not kept, and credit that grows without bound in a quiet hour."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainers.online, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = trainer_of(serving(), budget=0.1)
    loss = trainer._loss

    def slow_loss(*args):
        clock.now += 0.5
        return loss(*args)

    monkeypatch.setattr(trainer, "_loss", slow_loss)
    for i in range(3000):
        clock.now += 0.01
        trainer.observe([stretch(40 + i % 9)])
        trainer.step_if_due()
    assert trainer.num_steps > 0
    assert 0.07 < trainer.train_s / clock.now <= 0.1 + 0.5 / clock.now
    clock.now += 36000.0
    before = trainer.train_s
    for _ in range(100):
        trainer.observe([stretch(0)])
        trainer.step_if_due()
    assert trainer.train_s - before <= trainers.online.CREDIT_CAP_S / 0.9 + 0.5


# Bad numbers


def poison_loss(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    compute = trainers.online.losses.compute
    patch.setattr(trainers.online.losses, "compute", lambda *a, **k: (compute(*a, **k)[0] * torch.nan, {}))


def poison_gradient(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    compute = trainers.online.losses.compute
    weight = trainer._drafter.draft_head.lora_A
    # sqrt at 0: a finite loss whose gradient is infinite.
    patch.setattr(
        trainers.online.losses, "compute",
        lambda *a, **k: ((lambda total, values: (total + (0 * weight.sum()).sqrt(), values))(*compute(*a, **k))),
    )  # fmt: skip


def poison_weights(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        with torch.no_grad():
            trainer._drafter.draft_head.lora_B[0, 0] = torch.inf

    patch.setattr(trainer._optimizer, "step", step)


def poison_buffer(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    field = trainer.replay._fields["hidden"]
    patch.setitem(trainer.replay._fields, "hidden", torch.full_like(field, torch.nan))


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient, poison_weights, poison_buffer])
def test_numbers_that_are_not_finite_are_never_published_and_undone(poison):
    """Catches one NaN that ends all learning, or worse, is served."""
    speculator = serving()
    trainer = trainer_of(speculator, steps_per_publish=1)
    for _ in range(5):
        trainer.step()
    before, version = state_of(speculator.drafter), speculator.drafter.version
    with pytest.MonkeyPatch.context() as patch:
        poison(trainer, patch)
        reports = [trainer.step() for _ in range(3)]
    assert all(r.skipped_reason and not r.published for r in reports)
    assert trainer.num_skipped == 3
    assert_same(state_of(speculator.drafter), before)
    assert speculator.drafter.version == version
    after = [trainer.step() for _ in range(5)]
    assert all(r.skipped_reason is None and r.published for r in after)
    assert is_finite(speculator.drafter)


def test_experience_that_is_not_finite_is_refused_at_the_door():
    """A verifier gone NaN for one request must not reach the buffer that all requests share."""
    trainer = trainer_of(serving())
    stored = len(trainer.replay)
    for name in ("hidden_WD", "target_hidden_WD", "draft_log_probs_W"):
        bad = stretch(500)
        getattr(bad, name)[1] = torch.nan
        trainer.observe([bad])
    assert trainer.replay.num_refused == 3 and len(trainer.replay) == stored + 3 * (WIDTH - 1)
    assert trainer.step().skipped_reason is None


def test_the_canary_returns_to_the_best_drafter_when_the_learner_got_worse():
    """A learning rate gone mad: what it made is not served, and the learner does not go on from there."""
    speculator = serving()
    trainer = trainer_of(speculator, steps_per_canary=10, steps_per_publish=5)
    for _ in range(40):
        trainer.step()
    assert trainer.num_rollbacks == 0
    best = [t.clone() for t in trainer._best_state.values()]
    for group in trainer._optimizer.param_groups:
        group["lr"] = 30.0
    reports = [trainer.step() for _ in range(10)]
    assert trainer.num_rollbacks == 1 and all(r.skipped_reason is None for r in reports)
    assert_same(list(speculator.drafter.state_dict().values()), best)
    assert_same(list(trainer._drafter.state_dict().values()), best)
    assert speculator.drafter.version == trainer._version


# Going on


@pytest.mark.parametrize(("kind", "draft_vocab_size"), [("anchored", 0), ("recurrent", 0), ("anchored", 12)])
def test_a_resumed_learner_goes_on_bit_for_bit(kind, draft_vocab_size, tmp_path):
    """Catches any state left out: moments, draws, schedule, baseline, replay, best drafter, versions, counts."""

    def go_on(trainer: OnlineTrainer) -> list[Tensor]:
        for i in range(25):
            trainer.observe([stretch(60 + i, num_accepted=i % WIDTH)])
            trainer.step_if_due()
        return [*state_of(trainer._live), *trainer._drafter.state_dict().values(), trainer.baseline.values_T]

    changes = {"steps_per_canary": 7, "tokens_before_trim": 170, "schedule": "kl_rl"}
    straight = trainer_of(serving(kind, draft_vocab_size=draft_vocab_size), **changes)
    for i in range(15):
        straight.observe([stretch(40 + i, num_accepted=i % WIDTH)])
        straight.step_if_due()
    with CheckpointStore(tmp_path) as store:
        store.save(straight.state_dict(), straight.num_steps)
        state, step = store.load_latest()
    resumed = OnlineTrainer(serving(kind, draft_vocab_size=draft_vocab_size), straight.config)
    resumed.load_state_dict(state)
    assert step == resumed.num_steps == 15 and resumed._live.version == straight._live.version
    assert_same(state_of(resumed._live), state_of(straight._live))
    assert_same(go_on(resumed), go_on(straight))
    assert resumed.num_steps == straight.num_steps == 40


def test_a_settled_trend_wakes_when_acceptance_falls():
    """Catches a learner that idles through a change of traffic, and one that takes noise for a change."""
    trend = AcceptanceTrend(patience=300)
    generator = torch.Generator().manual_seed(0)

    def observe(rate: float, rounds: int) -> int:
        accepted = torch.binomial(torch.full((rounds,), 8.0), torch.tensor(rate), generator=generator)
        return sum(trend.observe(8, int(a)) for a in accepted)

    assert observe(0.7, 1500) == 0 and trend.is_settled
    assert not trend.observe(0, 0) and trend.is_settled  # a round without drafts says nothing
    assert observe(0.3, 600) >= 1 and not trend.is_settled
    assert observe(0.3, 1500) == 0 and trend.is_settled


def test_drift_takes_the_schedule_back_to_its_warm_up():
    trainer = trainer_of(serving(), warmup_steps=3, ramp_steps=3)
    for _ in range(10):
        trainer.step()
    assert trainer.last_report.phase == "rl"
    for i in range(450):
        trainer.observe([stretch(200 + i, num_accepted=WIDTH - 1)])
    for i in range(700):
        trainer.observe([stretch(700 + i, num_accepted=0, width=1)])
    assert trainer.trend.num_drifts >= 1
    assert trainer.step().phase == "kl"


def test_the_head_is_trimmed_to_the_traffics_tokens_once_and_a_resume_trims_alike():
    """Catches copies with different vocabularies, old drafts mapped to wrong ids, and a resume into other shapes."""
    speculator = serving(draft_vocab_size=VOCAB_SIZE // 2)
    trainer = trainer_of(speculator, tokens_before_trim=40 * WIDTH + 1, schedule="kl_rl", warmup_steps=0, ramp_steps=0)
    trainer.step()
    assert speculator.drafter.draft_head.draft_token_ids_V is None
    trainer.observe([stretch(40)])
    version = speculator.drafter.version
    reports = [trainer.step() for _ in range(4)]
    ids_V = speculator.drafter.draft_head.draft_token_ids_V
    assert len(ids_V) == VOCAB_SIZE // 2 == trainer._drafter.draft_head.vocab_size
    assert speculator.drafter.version > version
    assert torch.isin(trainer.token_counts_V.nonzero()[:, 0], ids_V).all()
    assert all(report.skipped_reason is None for report in reports)
    resumed = trainer_of(serving(draft_vocab_size=VOCAB_SIZE // 2))
    resumed.load_state_dict(trainer.state_dict())
    assert_same(state_of(resumed._live), state_of(speculator.drafter))


# In service


def acceptance(speculator: SelfSpeculator, prompts: list[str], params: SamplingParams) -> float:
    results = list(speculator.generate(prompts, params, policy=FixedLength(3), keep_transitions=False))
    return sum(r.stats.num_accepted for r in results) / sum(r.stats.num_drafted for r in results)


@pytest.mark.parametrize("form", ["learner", "coarse"])
def test_acceptance_rises_on_traffic_that_repeats_itself(form):
    """The whole circle on a trained model: draft, verify, learn, publish, draft better. Both forms of the loop."""
    speculator = SelfSpeculator.from_pretrained(STORIES, drafter=small_config())
    settings = LearningSettings(
        lr=5e-3, blocks_per_step=32, rounds_per_step=1, budget=1.0, steps_per_publish=1, schedule="kl_only",
        replay_positions=2048,
    )  # fmt: skip
    trainer = OnlineTrainer(speculator, settings)
    prompts = ["Once upon a time", "Tom and Lily", "The dog was", "One day a bird"]
    params = SamplingParams(max_new_tokens=40)
    before = acceptance(speculator, prompts, params)
    learner = trainer if form == "learner" else None
    for _ in range(3 if form == "learner" else 15):
        for result in speculator.generate(prompts, params, batch_size=2, policy=FixedLength(3), learner=learner):
            if learner is None:
                trainer.observe(result.transitions)
                trainer.step_if_due()
    assert speculator.drafter.version == trainer.num_steps > 30
    assert acceptance(speculator, prompts, params) > before + 0.15
