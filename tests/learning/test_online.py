"""The learner beside serving, on random tensors: it learns, keeps its budget, survives bad numbers, resumes exactly."""
# V vocabulary, W positions of a stretch.

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import trainers.learning.budget
import trainers.learning.online
import trainers.learning.publish_gate
import trainers.learning.student
from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.model.drafter import DRAFTER_KINDS
from dvi.records import SamplingParams
from dvi.settings import LearningSettings
from tests.support.drafter_doubles import small_config
from tests.support.paths import STORIES
from tests.support.random_traffic import (
    SETTINGS,
    VOCAB_SIZE,
    WIDTH,
    assert_same,
    is_finite,
    serving,
    state_of,
    stretch,
    trainer_of,
)
from trainers.learning.acceptance_trend import AcceptanceTrend
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OnlineTrainer

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
        speculator.drafter.step(hidden_NTD[:, 0], state, 0), trainer.drafter(hidden_NTD, anchor_ND)[:, 0].detach(),
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
    for module in (trainers.learning.online, trainers.learning.tick):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = trainer_of(serving(), budget=0.1)
    add_gradient = trainer._student.add_gradient

    def slow_gradient(*args, **kwargs):
        clock.now += 0.5
        return add_gradient(*args, **kwargs)

    monkeypatch.setattr(trainer._student, "add_gradient", slow_gradient)
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
    assert trainer.train_s - before <= trainers.learning.budget.CREDIT_CAP_S / 0.9 + 0.5


# In pieces


def pieces_of(trainer: OnlineTrainer) -> int:
    """Calls that the next step takes."""
    for count in range(1, 1000):
        trainer.observe([stretch(40 + count % 9)])
        if trainer.step_if_due() is not None:
            return count
    raise AssertionError("the step never ends")


@pytest.mark.parametrize("schedule", ["kl_rl", "kl_ce", "kl_pg", "pg_only"])
@pytest.mark.parametrize("kind", list(DRAFTER_KINDS))
def test_a_step_in_pieces_has_the_gradient_of_a_whole_one(kind, schedule):
    """Catches means of means: masks leave slices with unequal numbers of positions and rewards."""
    def rounds(trainer: OnlineTrainer) -> None:
        for i in range(40):
            trainer.observe([stretch(100 + i, num_accepted=i % WIDTH, width=i % WIDTH + 1)])

    changes = {"schedule": schedule, "warmup_steps": 0, "ramp_steps": 0, "steps_per_canary": 1}
    whole, sliced = (trainer_of(serving(kind), blocks_per_slice=size, **changes) for size in (0, 5))
    gradients = []
    for trainer in (whole, sliced):
        rounds(trainer)
        clip = trainer._student.clip_gradient

        def clip_gradient(trainer: OnlineTrainer = trainer, clip: Callable[[], float] = clip) -> float:
            gradients.append([p.grad.clone() for p in trainer.drafter.parameters() if p.grad is not None])
            return clip()

        trainer._student.clip_gradient = clip_gradient
    one, other = whole.step(), sliced.step()
    assert any(g.abs().max() > 1e-3 for g in gradients[0])
    for one_grad, other_grad in zip(*gradients, strict=True):
        # Of the largest entry: the others are sums of terms as large, and float32 sums in another order.
        assert (one_grad - other_grad).abs().max() <= 1e-5 * one_grad.abs().max()
    assert one.losses == pytest.approx(other.losses, abs=1e-5)  # float32 sums in another order
    assert one.num_positions == other.num_positions and one.published == other.published
    assert whole.baseline.values_T.equal(sliced.baseline.values_T)


def test_a_call_does_one_piece_and_nothing_that_serves_moves_before_the_last():
    """Catches a step that is done at once after all, an unsliced canary, and a publish in the middle of a step."""
    speculator = serving()
    trainer = trainer_of(speculator, blocks_per_slice=4, steps_per_publish=1, steps_per_canary=2)
    before = state_of(speculator.drafter)
    sizes = []
    forward = trainer.drafter.forward
    trainer.drafter.forward = lambda hidden, anchor: sizes.append(len(hidden)) or forward(hidden, anchor)
    num_slices = SETTINGS.blocks_per_step // 4
    num_calls = 0
    while trainer.step_if_due() is None:
        assert_same(state_of(speculator.drafter), before)
        trainer.observe([stretch(40 + num_calls % 9)])
        num_calls += 1
    assert num_calls == num_slices + 1  # the gradients, the update, and the call that publishes
    assert speculator.drafter.version == 1
    assert pieces_of(trainer) == num_slices + 1 + trainers.learning.publish_gate.CANARY_BLOCKS // 4 + 1
    assert set(sizes) == {4}


def test_a_step_in_progress_is_finished_before_it_is_saved_and_still_reported():
    """Catches a checkpoint of half a step, which no resume could finish, and an update that no metric sees."""
    changes = {"blocks_per_slice": 4, "steps_per_publish": 2, "steps_per_canary": 2}
    straight = trainer_of(serving(), **changes)
    for i in range(3):
        straight.observe([stretch(40 + i)])
        assert straight.step_if_due() is None
    state = copy.deepcopy(straight.state_dict())
    resumed = OnlineTrainer(serving(), straight.config)
    resumed.load_state_dict(state)
    assert straight.num_steps == resumed.num_steps == 1
    assert straight.step_if_due() is straight.last_report and resumed.step_if_due() is None
    for i in range(120):
        for trainer in (straight, resumed):
            trainer.observe([stretch(50 + i)])
            trainer.step_if_due()
    assert straight.num_steps == resumed.num_steps > 2
    assert_same(list(resumed.drafter.state_dict().values()), list(straight.drafter.state_dict().values()))
    assert_same(state_of(resumed._live), state_of(straight._live))


@pytest.mark.parametrize(
    ("name", "value"),
    [("_version", 2**53), ("_version", -1), ("num_steps", -1), ("train_s", float("nan")), ("train_s", float("inf"))],
)
def test_a_saved_count_that_no_run_comes_to_is_refused_before_anything_changes(name, value):
    """Catches a learner that dies in the middle of serving of a number it was given, as 2^63 in a struct of int64."""
    trainer = trainer_of(serving())
    trainer.step()
    state = copy.deepcopy(trainer.state_dict())
    state["counts"][name] = value
    resumed = OnlineTrainer(serving(), trainer.config)
    before = state_of(resumed._live)
    with pytest.raises(ValueError, match=f"the learner's counts: {name} must be finite, .*< 2\\^53, got"):
        resumed.load_state_dict(state)
    assert_same(state_of(resumed._live), before)
    assert resumed.num_steps == 0


def test_saved_weights_that_are_not_finite_are_refused():
    """Catches a server that goes on from a checkpoint and drafts nothing that is ever accepted."""
    trainer = trainer_of(serving())
    state = copy.deepcopy(trainer.state_dict())
    state["live"]["draft_head.lora_B"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the saved drafter's draft_head.lora_B holds NaN or infinity"):
        OnlineTrainer(serving(), trainer.config).load_state_dict(state)


def test_idle_time_catches_up_with_the_steps_owed_and_then_ends():
    """Catches a server that never rests, and one that forgets what a busy hour left to learn."""
    trainer = trainer_of(serving(), budget=0.05, blocks_per_slice=8, rounds_per_step=10)
    trainer.restart_clock()
    trainer.budget.charge(1000.0)  # nothing can be afforded while requests wait
    for i in range(59):  # and one before
        trainer.observe([stretch(100 + i)])
        assert trainer.step_if_due() is None
    num_steps = 0
    while trainer.is_busy:
        num_steps += trainer.step_if_due(is_idle=True) is not None
    assert num_steps == trainer.num_steps == 6
    assert trainer.step_if_due(is_idle=True) is None and trainer.stats()["steps_owed"] == 0


# Tenants


def test_what_a_tenant_brought_is_forgotten_in_the_middle_of_a_step():
    """Catches a batch that outlives the experience it was drawn from."""
    speculator = serving()
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, blocks_per_slice=4, steps_per_publish=1))
    trainer.observe([stretch(i, tenant="leaver") for i in range(20)] + [stretch(i) for i in range(20, 40)])
    assert trainer.step_if_due() is None and trainer.is_busy
    assert trainer.forget("leaver") == 20 * WIDTH and trainer.forget("nobody") == 0
    assert not trainer._tick.is_open and len(trainer.replay) == 20 * WIDTH
    trainer.observe([stretch(60)])
    assert trainer.step().published and trainer.num_steps == 1
    trainer.forget("")
    trainer.observe([])
    assert trainer.step_if_due() is None and not trainer.is_busy


def test_no_key_fills_more_than_its_share_of_a_step(monkeypatch):
    """Catches a share that is configured and never passed on."""
    trainer = OnlineTrainer(serving(), dataclasses.replace(SETTINGS, blocks_per_step=30, blocks_per_slice=7))
    for i in range(200):
        tenant = f"key {i % 20}" if i % 20 < 5 else "hostile"
        stretches = dataclasses.replace(stretch(i, tenant=tenant), request_id=i)
        stretches.token_ids_W[:] = VOCAB_SIZE - 1 if tenant == "hostile" else 0
        trainer.observe([stretches])
    batches = []
    monkeypatch.setattr(trainer._student, "map_actions", batches.append)
    for _ in range(20):
        trainer.step()
    for batch in batches:
        is_hostile_NT = batch.token_ids_NT == VOCAB_SIZE - 1
        assert (is_hostile_NT & batch.mask_NT).any(1).sum() <= 0.2 * batch.mask_NT.any(1).sum()


# Bad numbers


def poison_loss(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    compute = trainers.learning.student.losses.compute
    patch.setattr(trainers.learning.student.losses, "compute", lambda *a, **k: (compute(*a, **k)[0] * torch.nan, {}))


def poison_gradient(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    compute = trainers.learning.student.losses.compute
    weight = trainer.drafter.draft_head.lora_A
    # sqrt at 0: a finite loss whose gradient is infinite.
    patch.setattr(
        trainers.learning.student.losses, "compute",
        lambda *a, **k: ((lambda total, values: (total + (0 * weight.sum()).sqrt(), values))(*compute(*a, **k))),
    )  # fmt: skip


def poison_weights(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        with torch.no_grad():
            trainer.drafter.draft_head.lora_B[0, 0] = torch.inf

    patch.setattr(trainer._student.optimizer, "step", step)


def poison_buffer(trainer: OnlineTrainer, patch: pytest.MonkeyPatch) -> None:
    field = trainer.replay._segments.fields["hidden"]
    patch.setitem(trainer.replay._segments.fields, "hidden", torch.full_like(field, torch.nan))


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
    best = [t.clone() for t in trainer._gate.history.best.state.values()]
    for group in trainer._student.optimizer.param_groups:
        group["lr"] = 30.0
    reports = [trainer.step() for _ in range(10)]
    assert trainer.num_rollbacks == 1 and all(r.skipped_reason is None for r in reports)
    assert_same(list(speculator.drafter.state_dict().values()), best)
    assert_same(list(trainer.drafter.state_dict().values()), best)
    assert speculator.drafter.version == trainer._gate.version


# Going on


@pytest.mark.parametrize(("kind", "draft_vocab_size"), [("anchored", 0), ("recurrent", 0), ("anchored", 12)])
def test_a_resumed_learner_goes_on_bit_for_bit(kind, draft_vocab_size, tmp_path):
    """Catches any state left out: moments, draws, schedule, baseline, replay, best drafter, versions, counts."""

    def go_on(trainer: OnlineTrainer) -> list[Tensor]:
        for i in range(25):
            trainer.observe([stretch(60 + i, num_accepted=i % WIDTH)])
            trainer.step_if_due()
        return [*state_of(trainer._live), *trainer.drafter.state_dict().values(), trainer.baseline.values_T]

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


def test_lucky_first_rounds_do_not_settle_a_trend_that_rises():
    """Catches a best that the first round set and no average can reach: learning would stop while it helps."""
    trend = AcceptanceTrend(patience=300)
    trend.observe(4, 4)
    for i in range(2000):
        trend.observe(10_000, 1_000 + i)
        assert not trend.is_settled


def test_a_patience_of_0_never_settles():
    trend = AcceptanceTrend(patience=0)
    for _ in range(3000):
        trend.observe(8, 4)
    assert not trend.is_settled


@pytest.mark.parametrize("is_asleep", [False, True])
def test_a_settled_learner_makes_a_tenth_of_the_steps_until_it_wakes(is_asleep):
    """Catches a wake-up that changes nothing without a time limit, and a drift_wakeup of false that wakes."""
    settings = dataclasses.replace(
        SETTINGS, rounds_per_step=10, blocks_per_step=2, settle_rounds=300, drift_wakeup=not is_asleep
    )
    trainer = OnlineTrainer(serving(), settings)

    def steps(num_accepted: int, rounds: int) -> int:
        before, one = trainer.num_steps, stretch(0, num_accepted=num_accepted)
        for _ in range(rounds):
            trainer.observe([one])
            trainer.step_if_due()
        return trainer.num_steps - before

    assert steps(WIDTH - 1, 750) >= 50 and trainer.trend.is_settled
    assert steps(WIDTH - 1, 300) in (2, 3, 4)
    assert steps(0, 500) < 7 if is_asleep else steps(0, 500) > 10
    assert trainer.trend.is_settled == is_asleep == (trainer.trend.num_drifts == 0)
    if is_asleep:
        assert steps(WIDTH, 800) < 10 and trainer.trend.is_settled  # nor does a rise wake it


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
    assert len(ids_V) == VOCAB_SIZE // 2 == trainer.drafter.draft_head.vocab_size
    assert speculator.drafter.version > version
    assert torch.isin(trainer.token_counts_V.nonzero()[:, 0], ids_V).all()
    assert all(report.skipped_reason is None for report in reports)
    resumed = trainer_of(serving(draft_vocab_size=VOCAB_SIZE // 2))
    resumed.load_state_dict(trainer.state_dict())
    assert_same(state_of(resumed._live), state_of(speculator.drafter))


@pytest.mark.parametrize("steps_in_pieces", [0, 4])
def test_what_was_learnt_since_the_last_publish_serves_when_asked(steps_in_pieces):
    """Catches a last publish that never comes, one of weights that serve already, and a step cut off in the middle."""
    speculator = serving()
    trainer = trainer_of(speculator, steps_per_publish=1000, blocks_per_slice=steps_in_pieces)
    for _ in range(3):
        trainer.step()
    if steps_in_pieces:
        trainer.observe([stretch(50)])
        assert trainer.step_if_due() is None and trainer.is_busy
    assert speculator.drafter.version == 0
    version = trainer.publish_now()
    assert (version.version, version.step, version.source) == (1, 3 + (steps_in_pieces > 0), "learner")
    assert version == trainer.versions()[-1] and version.is_live and speculator.drafter.version == 1
    assert_same(list(speculator.drafter.state_dict().values()), list(trainer.drafter.state_dict().values()))
    assert trainer.publish_now().version == 1
    if steps_in_pieces:
        assert trainer.step_if_due().step == 4


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
