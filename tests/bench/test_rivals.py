"""Other people's decoders as arms: they decode what ours decodes, are counted alike and leave the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dvi.bench.rivals
from dvi import SelfSpeculator
from dvi.bench.arms import ArmOptions, plans_of_ours
from dvi.bench.records import ArmAnswer, ArmPlan
from dvi.bench.rivals import RIVAL_ARMS, _checked_early_exit, layer_calls, rival_plans
from dvi.model.drafter import DrafterConfig
from dvi.model.standalone_model import export_standalone
from tests.support.paths import STORIES
from tests.support.tiny_models import tiny_model

OPTIONS = ArmOptions(max_new_tokens=16, num_draft_tokens=3)
ASSISTED = ("hf_early_exit", "hf_prompt_lookup", "hf_assistant")
RUNNING = ("hf_generate", *ASSISTED)
# The last one repeats itself, so that prompt lookup has something to copy.
PROMPTS = [[5, 9, 13, 7], [40, 3, 3, 21, 8, 60, 11, 17], [50], [4, 5, 6, 7, 4, 5, 6, 7, 4, 5]]


@pytest.fixture(scope="module")
def draft_checkpoint(tmp_path_factory) -> Path:
    """The first two layers of the tiny Llama with its own head, as a model by itself."""
    folder = tmp_path_factory.mktemp("draft") / "model"
    speculator = tiny_speculator()
    export_standalone(folder, speculator.drafter, speculator.split)
    return folder


def tiny_speculator(**config: object) -> SelfSpeculator:
    return SelfSpeculator(
        tiny_model("llama", **config), None, split_layer=2, drafter=DrafterConfig(kind="lora_head", lora_rank=2)
    )


def rivals(
    speculator: SelfSpeculator, options: ArmOptions = OPTIONS, *, names=RUNNING, draft_checkpoint: Path | None = None
) -> dict[str, ArmPlan]:
    plans = rival_plans(
        speculator.model, speculator.tokenizer, options, split_layer=speculator.split.split_layer, names=names,
        draft_checkpoint=draft_checkpoint,
    )
    return {plan.name: plan for plan in plans}


def plain_answers(speculator: SelfSpeculator, prompts: list[list[int]] = PROMPTS, **changed: object) -> list[list[int]]:
    (plan,) = plans_of_ours(speculator, ArmOptions(max_new_tokens=16, **changed), names=["plain"])
    return [answer.token_ids for answer in plan.build().answer(prompts, seed=0)]


@pytest.mark.parametrize("name", RUNNING)
def test_a_rival_decodes_what_our_plain_arm_does_and_its_steps_sum_to_the_tokens(name, draft_checkpoint):
    """Catches a rival that samples, stops elsewhere or counts its own way."""
    speculator = tiny_speculator()
    arm = rivals(speculator, draft_checkpoint=draft_checkpoint)[name].build()
    for prompt, expected in zip(PROMPTS, plain_answers(speculator), strict=True):
        (answer,) = arm.answer([prompt], seed=0)
        assert answer.token_ids == expected
        assert sum(answer.accept_lengths) == len(expected)
        assert min(answer.accept_lengths) >= 1


def test_rivals_decode_a_real_model_as_we_do():
    """Catches a pad or end token taken from the tokenizer where the model says otherwise."""
    speculator = SelfSpeculator.from_pretrained(STORIES, split_layer=1)
    prompts = [speculator.encode(text) for text in ("Once upon a time", "Lily and Tom went to the park. Lily and")]
    plans = rivals(speculator, names=("hf_generate", "hf_early_exit", "hf_prompt_lookup"))
    for plan in plans.values():
        arm = plan.build()
        assert [arm.answer([p], seed=0)[0].token_ids for p in prompts] == plain_answers(speculator, prompts)


@pytest.mark.parametrize("name", ASSISTED)
def test_accept_lengths_count_each_forward_of_the_target_once(name, draft_checkpoint):
    """Catches steps of the assistant counted as the target's, and steps that go uncounted."""
    speculator, answers = tiny_speculator(), []
    arm = rivals(speculator, draft_checkpoint=draft_checkpoint)[name].build()
    last_layer = layer_calls(speculator.model, lambda: answers.extend(arm.answer([PROMPTS[3]], seed=0)))[-1]
    assert len(answers[0].accept_lengths) == last_layer
    assert max(answers[0].accept_lengths) > 1 or name != "hf_prompt_lookup"


@pytest.mark.parametrize("name", RUNNING)
def test_answers_end_with_the_first_end_token_of_the_model(name, draft_checkpoint):
    """Catches drafts accepted beyond the end, and padding taken for tokens."""
    speculator = tiny_speculator()
    end = plain_answers(speculator)[0][5]
    speculator.model.generation_config.eos_token_id = [end, 63]
    answer = rivals(speculator, draft_checkpoint=draft_checkpoint)[name].build().answer(PROMPTS[:1], seed=0)[0]
    assert answer.token_ids == plain_answers(speculator)[0]
    assert answer.token_ids[-1] == end and end not in answer.token_ids[:-1]
    assert sum(answer.accept_lengths) == len(answer.token_ids) < OPTIONS.max_new_tokens


@pytest.mark.parametrize("name", RUNNING)
def test_a_rival_stops_at_the_models_context_as_we_do(name, draft_checkpoint):
    """Catches positions beyond those the model knows."""
    speculator = tiny_speculator(max_position_embeddings=24)
    prompt = [3 + i % 7 for i in range(16)]
    answer = rivals(speculator, draft_checkpoint=draft_checkpoint)[name].build().answer([prompt], seed=0)[0]
    assert answer.token_ids == plain_answers(speculator, [prompt])[0]
    assert len(answer.token_ids) == 8


def test_a_batch_by_generate_equals_one_prompt_at_a_time():
    """Catches padding that is attended to, and answers in another order."""
    speculator = tiny_speculator()
    plain = plain_answers(speculator)
    speculator.model.generation_config.eos_token_id = plain[1][4]  # so that one answer ends early
    arm = rivals(speculator)["hf_generate"].build()
    together = [answer.token_ids for answer in arm.answer(PROMPTS, seed=0)]
    assert together == [arm.answer([prompt], seed=0)[0].token_ids for prompt in PROMPTS]
    assert len({len(token_ids) for token_ids in together}) > 1


def test_only_generate_itself_takes_batches(draft_checkpoint):
    """Catches an assisted arm planned for batches, which transformers refuses."""
    plans = rivals(tiny_speculator(), draft_checkpoint=draft_checkpoint)
    assert [name for name, plan in plans.items() if not plan.batch_one] == ["hf_generate"]


@pytest.mark.parametrize("name", RUNNING)
def test_what_the_model_says_about_generation_neither_counts_nor_changes(name, draft_checkpoint):
    """Catches penalties of the model's own that only rivals obey, and settings that an arm leaves behind."""
    speculator = tiny_speculator()
    expected, model = plain_answers(speculator)[0], speculator.model
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, num_assistant_tokens=9, max_new_tokens=2)
    before, config = copy.deepcopy(own.to_dict()), copy.deepcopy(model.config.to_dict())
    arm = rivals(speculator, draft_checkpoint=draft_checkpoint)[name].build()
    assert arm.answer(PROMPTS[:1], seed=0)[0].token_ids == expected
    assert model.generation_config is own
    assert (own.to_dict(), model.config.to_dict()) == (before, config)


def test_early_exit_drafts_as_many_tokens_as_ours_through_the_first_layers_alone():
    """Catches transformers' own default of 20 drafts, which arguments of generate do not change."""
    speculator = tiny_speculator()
    plan = rivals(speculator)["hf_early_exit"]
    counts, num_steps = plan.facts["layer_calls"], plan.facts["target_forwards"]
    assert counts[2:] == [num_steps] * 2
    assert num_steps < counts[0] == counts[1] <= num_steps * (1 + OPTIONS.num_draft_tokens)


@pytest.mark.parametrize("arch", ["gpt_neox", "gpt2"])
def test_early_exit_is_not_offered_where_the_layers_are_not_cut_and_leaves_the_config_whole(arch):
    """Catches a model that stays cut to its first layers after a draft that raised."""
    speculator = SelfSpeculator(tiny_model(arch), None, split_layer=2)
    before, expected = copy.deepcopy(speculator.model.config.to_dict()), plain_answers(speculator)
    plan = rivals(speculator, names=["hf_early_exit"])["hf_early_exit"]
    assert plan.build is None and "early exit" in plan.na_reason
    assert speculator.model.config.to_dict() == before
    assert [rivals(speculator, names=["hf_generate"])["hf_generate"].build().answer([p], seed=0)[0].token_ids
            for p in PROMPTS] == expected


def test_early_exit_is_not_offered_when_every_layer_runs_for_the_drafts():
    """Catches a verdict that looks at the answers alone, which are right all the same."""
    model = tiny_model("llama")

    class WholeModelDrafts:
        def answer(self, prompts, *, seed):
            for _ in range(6):
                model(input_ids=torch.tensor(prompts))
            return [ArmAnswer([1, 2, 3], [2, 1])]

    plan = ArmPlan("hf_early_exit", "", lambda: None, facts={"early_exit_layer": 2})
    checked = _checked_early_exit(plan, model, WholeModelDrafts())
    assert checked.build is None and "[6, 6, 6, 6]" in checked.na_reason


def test_split_layer_zero_exits_after_the_first_layer():
    """Catches an exit after no layer at all, of which transformers makes a whole pass."""
    speculator = SelfSpeculator(tiny_model("llama"), None, split_layer=0)
    plan = rivals(speculator)["hf_early_exit"]
    assert plan.facts["early_exit_layer"] == 1 and plan.build is not None


@pytest.mark.parametrize("name", RUNNING)
def test_sampled_answers_repeat_with_their_seed_and_leave_the_global_draws_alone(name, draft_checkpoint):
    """Catches draws that depend on the arm that ran before."""
    options = ArmOptions(max_new_tokens=16, num_draft_tokens=3, temperature=1.0)
    arm = rivals(tiny_speculator(), options, draft_checkpoint=draft_checkpoint)[name].build()
    state = torch.random.get_rng_state()
    first, again, other = (arm.answer(PROMPTS[:1], seed=seed)[0].token_ids for seed in (1, 1, 2))
    assert first == again != other
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("name", RUNNING)
def test_a_rival_tells_its_seconds_after_the_first_step_when_asked(name, draft_checkpoint, monkeypatch):
    """Catches a clock that starts with the prompt's own pass, or that every run pays for."""
    speculator = tiny_speculator()
    clock = itertools.count()  # read once at the end of the first step and once at the end of all
    monkeypatch.setattr(dvi.bench.rivals, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for tells, expected in ((True, 1), (False, None)):
        options = dataclasses.replace(OPTIONS, tells_decode_s=tells)
        arm = rivals(speculator, options, draft_checkpoint=draft_checkpoint)[name].build()
        assert arm.answer(PROMPTS[:1], seed=0)[0].decode_s == expected


def test_what_cannot_run_says_why():
    """Catches a rival that is left out in silence, or run by something else."""
    plans = rivals(tiny_speculator(), names=RIVAL_ARMS)
    missing = {name: plan.na_reason for name, plan in plans.items() if plan.build is None}
    assert list(missing) == ["hf_assistant", "medusa", "eagle"]
    assert "dvi export --standalone" in missing["hf_assistant"]
    assert "checkpoint" in missing["medusa"] and "checkpoint" in missing["eagle"]


def test_wrong_draft_checkpoints_and_names_are_refused(tmp_path):
    """Catches a draft model whose ids mean other tokens."""
    speculator = tiny_speculator()
    with pytest.raises(ValueError, match="must be a folder"):
        rivals(speculator, draft_checkpoint=tmp_path / "none")
    tiny_model("llama", vocab_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, got 32"):
        rivals(speculator, draft_checkpoint=tmp_path / "other")
    with pytest.raises(ValueError, match="medusa, eagle, got 'hf_magic'"):
        rivals(speculator, names=["hf_magic"])
