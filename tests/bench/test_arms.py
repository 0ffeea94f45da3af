"""Our own arms: one model under all of them, equal answers, and learners that begin anew with every build."""

from __future__ import annotations

import copy
import dataclasses
import time

import pytest
import torch

import dvi.decode.speculator
from dvi import SelfSpeculator
from dvi.bench.arms import OUR_ARMS, ArmOptions, plans_of_ours
from dvi.bench.records import ArmPlan
from dvi.model.drafter import DrafterConfig
from dvi.model.padded import PaddedSplit
from dvi.settings import LearningSettings
from tests.support.exact_doubles import self_check_left_out
from tests.support.paths import STORIES
from tests.support.tiny_models import tiny_model
from trainers import OnlineTrainer

OPTIONS = ArmOptions(max_new_tokens=16, num_draft_tokens=3)
PROMPTS = [[5, 9, 13, 7], [40, 3, 3, 21, 8, 60, 11, 17], [50, 4]]
# No limit in time, so that two runs learn alike.
EAGER = LearningSettings(budget=1.0, rounds_per_step=4, blocks_per_step=4, steps_per_publish=1, lr=1e-2)


def eager_learner(speculator: SelfSpeculator) -> OnlineTrainer:
    return OnlineTrainer(speculator, EAGER)


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator(
        tiny_model("llama"), None, split_layer=1, drafter=DrafterConfig(lora_rank=4, anchor_hidden=16)
    )


@pytest.fixture(autouse=True)
def padded_passes_on_any_processor():
    with self_check_left_out():
        yield


def plans(speculator: SelfSpeculator, options: ArmOptions = OPTIONS, **changed: object) -> dict[str, ArmPlan]:
    found = plans_of_ours(speculator, options, **{"make_learner": eager_learner} | changed)
    return {plan.name: plan for plan in found}


@pytest.mark.parametrize("name", OUR_ARMS)
def test_every_arm_gives_the_greedy_tokens_of_plain_and_counts_its_rounds(speculator, name):
    """Catches an arm on another split, drafts that slip through, and rounds that do not sum to the tokens."""
    plain, arm = (plans(speculator)[n].build() for n in ("plain", name))
    for prompt in PROMPTS:
        (expected,), (answer,) = (a.answer([prompt], seed=0) for a in (plain, arm))
        assert answer.token_ids == expected.token_ids
        assert sum(answer.accept_lengths) == len(answer.token_ids) == answer.stats.new_tokens
        assert len(answer.accept_lengths) == answer.stats.num_rounds


def test_arms_agree_on_a_real_model():
    """Catches end tokens and contexts that arms understand differently."""
    speculator = SelfSpeculator.from_pretrained(STORIES, split_layer=1, dtype="float64")
    prompt = speculator.encode("Lily and Tom went to the park")
    found = plans(speculator, ArmOptions(max_new_tokens=16))
    answers = {name: plan.build().answer([prompt], seed=0)[0].token_ids for name, plan in found.items()}
    assert list(answers) == list(OUR_ARMS)
    assert len({tuple(token_ids) for token_ids in answers.values()}) == 1


@pytest.mark.parametrize("name", ["plain", "plain_padded"])
def test_plain_arms_give_one_token_a_round(speculator, name):
    """Catches a plain arm that drafts."""
    (answer,) = plans(speculator)[name].build().answer(PROMPTS[:1], seed=0)
    assert set(answer.accept_lengths) == {1}
    assert answer.stats.num_drafted == 0


@pytest.mark.parametrize("name", ["plain", "speculative", "online"])
def test_a_batch_answers_in_the_order_of_its_prompts(speculator, name):
    """Catches answers in the order they finish."""
    plain = plans(speculator)["plain"].build()
    alone = [plain.answer([prompt], seed=0)[0].token_ids for prompt in PROMPTS]
    together = plans(speculator)[name].build().answer(PROMPTS, seed=0)
    assert [answer.token_ids for answer in together] == alone


@pytest.mark.parametrize("name", ["plain", "speculative", "online"])
def test_sampled_answers_repeat_with_their_seed(speculator, name):
    """Catches a seed that is not passed on."""
    plan = plans(speculator, ArmOptions(max_new_tokens=16, temperature=1.0))[name]
    first, again, other = (plan.build().answer(PROMPTS[:1], seed=seed)[0].token_ids for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("name", ["online", "online_untrained"])
def test_a_learners_version_rises_over_answers_and_a_fresh_build_starts_again(speculator, name):
    """Catches a drafter or a learner shared between repetitions, and one that never learns."""
    plan = plans(speculator)[name]
    assert plan.is_learning

    def run() -> tuple[list[int], list[list[int]]]:
        arm = plan.build()
        versions, lengths = [arm.speculator.drafter.version], []
        for prompt in PROMPTS:
            lengths.append(arm.answer([prompt], seed=0)[0].accept_lengths)
            versions.append(arm.speculator.drafter.version)
        return versions, lengths

    first, second = run(), run()
    versions = first[0]
    assert versions[0] == 0 and versions == sorted(versions) and versions[-1] > versions[1]
    assert first == second


def test_learning_leaves_the_speculator_and_the_other_arms_as_they_were(speculator):
    """Catches one drafter under a frozen arm and a learning one."""
    drafter = speculator.drafter
    before = copy.deepcopy(drafter.state_dict())
    found = plans(speculator)
    frozen, learning = found["speculative"].build(), found["online"].build()
    learning.answer(PROMPTS, seed=0)
    assert speculator.drafter is frozen.speculator.drafter is drafter
    assert learning.learner.num_steps > 0 and drafter.version == 0
    assert all(before[name].equal(tensor) for name, tensor in drafter.state_dict().items())


def test_online_begins_with_the_adapter_and_untrained_with_nothing(speculator, tmp_path):
    """Catches an online arm that forgets what the adapter knew."""
    teacher = plans(speculator)["online"].build()
    teacher.answer(PROMPTS, seed=0)
    teacher.speculator.save_drafter(tmp_path / "adapter")
    version = teacher.speculator.drafter.version
    found = plans(speculator, adapter=tmp_path / "adapter")
    drafters = {n: found[n].build().speculator.drafter for n in ("speculative", "online", "online_untrained")}
    assert [d.version for d in drafters.values()] == [version, version, 0]
    assert [found[n].facts["drafter_version"] for n in drafters] == [version, version, 0]
    weights = {n: d.state_dict()["to_hidden.weight"] for n, d in drafters.items()}
    assert weights["online"].equal(weights["speculative"])
    assert not weights["online_untrained"].any() and weights["online"].any()


def test_a_trimmed_adapter_goes_on_trimmed_while_it_learns(speculator, tmp_path):
    """Catches a copy of the drafter with the full vocabulary, whose tensors have other shapes."""
    trimmed = copy.copy(speculator)
    trimmed.drafter = plans(speculator)["online"].build().speculator.drafter
    trimmed.drafter.draft_head.trim(torch.arange(0, 64, 2))
    trimmed.drafter.publish(trimmed.drafter, version=3)
    arm = plans(trimmed)["online"].build()
    assert arm.speculator.drafter.draft_head.vocab_size == 32
    assert arm.answer(PROMPTS[:1], seed=0)[0].token_ids == plans(speculator)["plain"].build().answer(
        PROMPTS[:1], seed=0)[0].token_ids


def test_arms_share_one_split(speculator):
    """Catches weights held once for each arm."""
    arms = [plan.build() for plan in plans(speculator).values()]
    assert {id(arm.speculator.split) for arm in arms} == {id(speculator.split)}
    assert speculator.passes is speculator.split and speculator.mode == "fast"


def test_padded_passes_are_not_offered_in_half_precision():
    """Catches an arm that fails at every question instead of saying why."""
    half = SelfSpeculator(tiny_model("llama", dtype=torch.bfloat16), None, split_layer=1)
    plan = plans(half)["plain_padded"]
    assert plan.build is None and "float32 or float64" in plan.na_reason


def test_padded_passes_are_not_offered_where_the_self_check_refuses_them(speculator, monkeypatch):
    """Catches an arm that ends the run of all others on a machine whose kernels look at a row's index."""

    def refuse(split: PaddedSplit) -> None:
        raise ValueError("exact mode is not possible for torch.float32 on this machine")

    monkeypatch.setattr(PaddedSplit, "self_check", refuse)
    found = plans(speculator)
    assert [name for name, plan in found.items() if plan.build is None] == ["plain_padded"]
    assert found["plain_padded"].na_reason == "exact mode is not possible for torch.float32 on this machine"


def test_without_a_learner_the_learning_arms_say_so(speculator):
    """Catches an online arm that runs frozen."""
    found = plans(speculator, make_learner=None)
    assert [name for name, plan in found.items() if plan.build is None] == ["online", "online_untrained"]
    assert found["online"].na_reason == "no learner given"


def test_time_in_which_other_arms_answered_is_not_the_learners(speculator):
    """Catches training time saved up between two answers, which would all be spent inside the next one."""
    small = dataclasses.replace(EAGER, budget=1e-5)  # observing alone overdraws it
    arm = plans(speculator, make_learner=lambda s: OnlineTrainer(s, small))["online"].build()
    arm.learner.budget.restart(time.perf_counter() - 1e6)
    arm.answer(PROMPTS[:1], seed=0)
    assert arm.learner.num_steps == 0


def test_costs_of_the_goodput_rule_are_measured_by_the_build(speculator, monkeypatch):
    """Catches seconds of measuring inside the first timed answer, and one rule's memory under two arms."""
    measured, measure = [], dvi.decode.speculator.measure_costs
    monkeypatch.setattr(
        dvi.decode.speculator, "measure_costs",
        lambda *args, rows, **options: measured.append(rows) or measure(*args, rows=rows, budget_s=0.0, **options),
    )
    plan = plans(speculator, ArmOptions(max_new_tokens=16, policy="goodput", batch_size=3))["speculative"]
    arm = plan.build()
    assert measured == [(1, 2, 3)]
    arm.answer(PROMPTS, seed=0)
    assert len(measured) == 1 and plan.build()._policy is not arm._policy


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_draft_tokens", 0), ("num_draft_tokens", 9), ("policy", "best"), ("batch_size", 0), ("temperature", -1.0)],
)
def test_options_out_of_bounds_are_refused_by_name(field, value):
    """Catches a setting that fails only after minutes of decoding."""
    with pytest.raises(ValueError, match=f"{field} must be"):
        ArmOptions(**{field: value})


def test_unknown_arms_are_refused_with_the_choices(speculator):
    """Catches a misspelt arm that is left out in silence."""
    with pytest.raises(ValueError, match="plain_padded, speculative, online, online_untrained, got 'fast'"):
        plans(speculator, names=["plain", "fast"])
