"""A step's cost: scripted drafts that do as the script says, time that goes to the right part, figures by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import dvi.bench.part_clock
from dvi import SelfSpeculator
from dvi.bench.arms import ArmOptions, plans_of_ours
from dvi.bench.part_clock import PartClock
from dvi.bench.rivals import rival_plans
from dvi.bench.round_parts import seconds_by_part
from dvi.bench.scripted import Script, ScriptedArm, settled_script
from dvi.bench.step import Sample, summary, trim
from dvi.bench.step_report import report_tables
from dvi.decode.speculator import PLAIN
from dvi.learner import Learner
from dvi.model.drafter import DrafterConfig
from dvi.records import SamplingParams
from tests.cli.test_main import STORIES, dvi_command
from tests.support.tiny_models import tiny_model

PROMPT = [5, 9, 13, 7]
OPTIONS = ArmOptions(max_new_tokens=40, num_draft_tokens=3, ignore_eos=True)


def make_speculator(**options: object) -> SelfSpeculator:
    return SelfSpeculator(
        tiny_model("llama", **options), None, split_layer=1, drafter=DrafterConfig(lora_rank=4, anchor_hidden=16)
    )


def plain_answer(speculator: SelfSpeculator) -> list[int]:
    (plan,) = plans_of_ours(speculator, OPTIONS, names=["plain"])
    return plan.build().answer([PROMPT], seed=0)[0].token_ids


def lengths_by_hand(is_right: list[bool], num_draft_tokens: int) -> list[int]:
    """Tokens of each round: the right drafts up to the first wrong one, and the verifier's own."""
    lengths, position = [], 0
    while position < len(is_right):
        drafts = is_right[position : min(position + num_draft_tokens, len(is_right) - 1)]
        num_accepted = (drafts + [False]).index(False)
        lengths.append(num_accepted + 1)
        position += num_accepted + 1
    return lengths


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_drafts_are_right_where_the_script_says_so_and_nowhere_else(acceptance):
    """Catches a script that is off by a place after a rejection, and drafts that change the answer."""
    speculator = make_speculator()
    expected = plain_answer(speculator)
    script = settled_script(speculator, PROMPT, expected, acceptance=acceptance, options=OPTIONS)
    (answer,) = ScriptedArm(speculator, script, OPTIONS).answer([PROMPT], seed=0)
    assert answer.token_ids == script.token_ids == expected
    is_right = [script._is_right[place] for place in range(len(expected))]
    assert answer.accept_lengths == lengths_by_hand(is_right, OPTIONS.num_draft_tokens)
    if acceptance in (0, 1):
        assert set(is_right) == {bool(acceptance)}


def test_a_token_outside_the_draft_vocabulary_is_never_right():
    """Catches a script that promises what the drafter cannot say, and a law that is then missed for no reason."""
    speculator = make_speculator()
    expected = plain_answer(speculator)
    drafter = speculator.drafter
    drafter.draft_head.trim(torch.tensor(sorted({*range(8)} - {expected[0]})))
    drafter.publish(drafter, drafter.version)
    script = Script(drafter, expected, acceptance=1.0)
    assert script._is_right == drafter.draft_head.can_draft(torch.tensor(expected)).tolist()
    (answer,) = ScriptedArm(speculator, script, OPTIONS).answer([PROMPT], seed=0)
    assert answer.token_ids == expected
    assert answer.accept_lengths == lengths_by_hand(script._is_right, OPTIONS.num_draft_tokens)


def test_a_trimmed_drafter_can_draft_what_it_has_seen():
    """Catches a trim that throws away the very tokens of the answer."""
    speculator = make_speculator()
    seen = [60, 61, 62, 60]
    trim(speculator.drafter, seen, 8)
    assert speculator.drafter.draft_head.vocab_size == 8
    assert speculator.drafter.draft_head.can_draft(torch.tensor(seen)).all()


def test_a_script_settles_on_what_the_verifier_gives(monkeypatch):
    """Catches a script of plain decoding's answer where scripted drafts lead to another, as rounding does."""
    speculator = make_speculator()
    expected = plain_answer(speculator)
    other = [*expected[:10], *(1 + (token_id + 1) % 60 for token_id in expected[10:])]
    script = settled_script(speculator, PROMPT, other, acceptance=1.0, options=OPTIONS)
    assert script.token_ids == expected


def test_a_call_s_time_is_its_own(monkeypatch):
    """Catches time that is counted twice, in a part and in the part around it, and wraps that stay."""
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(dvi.bench.part_clock.time, "perf_counter", lambda: next(now))

    class Owner:
        def outer(self) -> str:
            return self.inner(3)

        def inner(self, number: int) -> str:
            return "x" * number

    owner, clock = Owner(), PartClock()
    with clock.wrapping([(owner, "outer", "round"), (owner, "inner", "pass")]):
        assert owner.outer() == "xxx"
    assert clock.seconds == {"round": 1.0 + 4.0, "pass": 2.0}
    assert not vars(owner) and owner.inner(1) == "x"


def test_a_round_s_parts_are_all_there_and_leave_nothing_wrapped():
    """Catches a call that was renamed, whose time would go to the rest, and a round that stays timed."""
    speculator = make_speculator()
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    parts = seconds_by_part(speculator, PLAIN, Learner(), PROMPT, params)
    assert min(parts.values()) > 0
    assert "shallow" not in vars(speculator.passes) and "begin" not in vars(speculator.drafter)


def test_every_arm_goes_on_past_the_end_when_it_is_told_to():
    """Catches rates of answers that ended, one arm's sooner than another's."""
    speculator = make_speculator()
    ends = plain_answer(speculator)[:2]
    speculator.model.generation_config.eos_token_id = ends
    (ours,), (theirs,) = (
        plans_of_ours(speculator, OPTIONS, names=["plain"]),
        rival_plans(speculator.model, None, OPTIONS, split_layer=1, names=["hf_generate"]),
    )
    for plan in (ours, theirs):
        assert len(plan.build().answer([PROMPT], seed=0)[0].token_ids) == OPTIONS.max_new_tokens
    stopping = dataclasses.replace(OPTIONS, ignore_eos=False)
    (theirs,) = rival_plans(speculator.model, None, stopping, split_layer=1, names=["hf_generate"])
    assert len(theirs.build().answer([PROMPT], seed=0)[0].token_ids) == 1


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_step_reads_the_head_once_and_of_the_embedding_nothing(is_tied):
    """Catches a tied head counted twice, and an embedding counted that a step reads one row of."""
    model = tiny_model("llama")
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    speculator = SelfSpeculator(model, None, split_layer=1)
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())
    embedding_bytes = 0 if is_tied else model.model.embed_tokens.weight.nbytes
    assert speculator.split.num_weight_bytes == all_bytes - embedding_bytes


def sample(plain: float, scripted: float, hf: float) -> Sample:
    parts = {"deep layers and head": 0.9 * plain, "verdict": 0.1 * plain}
    return Sample(
        {"plain": plain, "scripted": scripted, "hf bfloat16": hf},
        {"v(1)": plain, "v(3)": 1.5 * plain, "draft step": 0.1 * plain, "copy": 1.0},
        {"plain": parts, "scripted": parts},
    )


def test_figures_are_those_worked_out_by_hand():
    """Catches ratios of medians for medians of ratios, a ratio of times for one of speeds, and a law without c."""
    samples = [sample(1.0, 0.8, 2.0), sample(2.0, 1.0, 3.0), sample(4.0, 4.0, 4.0)]
    found = summary(samples, num_draft_tokens=2, mean_accepted_tokens=2.0)
    assert found["token_s"] == {"plain": 2.0, "scripted": 1.0, "hf bfloat16": 3.0}
    assert found["speed_ratios"] == {"scripted / plain": 1.25, "plain / hf bfloat16": 1.5}
    # The law: (2 x .1 + 1.5) / 2 = .85 of a plain step a token.
    assert found["law"]["predicted_token_s"] == pytest.approx(1.7)
    assert found["law"]["measured_over_predicted"] == pytest.approx(0.85 / 0.8)
    assert found["parts_s"]["plain"]["verdict"] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def verb_run():
    code, facts, _, stderr = dvi_command(
        "bench", "step", "--model", STORIES, "--dtype", "float32", "--split-layer", 1, "--max-new-tokens", 12,
        "--repetitions", 2, "--draft-vocab-size", 64, "--num-draft-tokens", 3,
    )  # fmt: skip
    assert code == 0, stderr
    return facts, stderr


def test_the_verb_measures_every_arm_and_prints_what_it_measured(verb_run):
    """Catches an arm left out in silence, and a table without its last row."""
    facts, stderr = verb_run
    assert facts["command"] == "bench step"
    arms = {"plain", "scripted", "hf bfloat16", "hf float32"} | ({"exact"} - set(facts["na_reasons"]))
    assert set(facts["token_s"]) == arms and min(facts["token_s"].values()) > 0
    assert {"v(1)", "v(4)", "v(17)", "draft step", "shallow step", "copy"} <= set(facts["pass_s"])
    assert 1 <= facts["law"]["mean_accepted_tokens"] <= 4 and facts["peak_bytes"] >= facts["imported_bytes"] > 0
    assert list(facts["parts_s"]) == ["plain", "scripted"]
    for said in ("by the speed law", "transformers generate, bfloat16", "all but arithmetic", "copied by the machine"):
        assert said in stderr


def test_tables_say_why_an_arm_is_missing(verb_run):
    """Catches a report that fails where exact mode cannot run, as in half precision."""
    facts, _ = verb_run
    without = {name: value for name, value in facts["token_s"].items() if name != "exact"}
    ratios = {name: value for name, value in facts["speed_ratios"].items() if not name.startswith("exact")}
    changed = facts | {"token_s": without, "speed_ratios": ratios, "na_reasons": {"exact": "no exact bits here"}}
    (speeds, *_) = report_tables(changed)
    assert ["plain, exact", "n/a", "", "no exact bits here"] in speeds.rows
