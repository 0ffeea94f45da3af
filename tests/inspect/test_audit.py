"""The audit passes what is right, finds what is wrong, and does not call a wrong token rounding.

In float64, whose noise of 1e-14 lies far below every gap: whether float32 turns a token depends on the processor.
"""

import dataclasses
import functools

import pytest
import torch

import dvi.inspect.audit
from dvi.decode.host_row import HostRow
from dvi.decode.speculator import SelfSpeculator
from dvi.inspect.audit import audit, divergence_table, logits_in_blocks
from dvi.model.drafter import DrafterConfig
from tests.support.exact_doubles import needs_kernels, self_check_left_out
from tests.support.paths import STORIES
from tests.support.tiny_models import tiny_model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def load():
    @functools.cache
    def of_mode(mode="fast"):
        with self_check_left_out():
            return SelfSpeculator.from_pretrained(
                STORIES, drafter=DrafterConfig(kind="lora_head", lora_rank=2), mode=mode, dtype="float64", split_layer=3
            )

    return of_mode


def run(speculator, **options):
    prompts = [speculator.encode(PROMPT), speculator.encode("The dog")]
    return audit(speculator, prompts, max_new_tokens=24, **options)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_right_decoding_matches_and_has_really_drafted(load, mode):
    """Catches an audit that compares plain decoding with itself."""
    report = run(load(mode), against_huggingface=True)
    assert (report.num_prompts, report.num_matches, report.num_huggingface_matches) == (2, 2, 2)
    assert report.num_drafted > report.num_accepted > 0 and report.num_tokens == 48
    assert report.divergences == [] and report.num_unexplained == 0
    # Two ways to the same logits. Of the model's own forward it is not asked: that takes rotary angles in float32.
    assert report.noise < 1e-10


def test_lookups_are_audited_as_they_serve(load):
    speculator = load().afresh(source="lookup")
    report = audit(speculator, [[5, 6, 7, 5, 6, 7, 5, 6]], max_new_tokens=24)
    assert report.num_matches == report.num_prompts == 1 and report.num_drafted > 0


def test_noise_is_the_difference_between_passes_of_one_row_and_of_a_block(load, monkeypatch):
    """Catches noise that is never measured, or is not what the report calls by that name."""
    honest = dvi.inspect.audit.logits_in_blocks

    def rounding(split, ids, *, start, width):
        return honest(split, ids, start=start, width=width) + (1e-3 if width > 1 else 0.0)

    monkeypatch.setattr("dvi.inspect.audit.logits_in_blocks", rounding)
    assert run(load()).noise == pytest.approx(1e-3, rel=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_native_path_there_is_no_noise(dtype):
    """Catches a promise of bits that the audit's own two ways to the logits do not bear out."""
    model = tiny_model("llama", num_layers=3, head_dim=32, dtype=dtype)
    report = audit(SelfSpeculator(model, None), [[5, 9, 33], list(range(40))], max_new_tokens=24)
    assert (report.mode, report.num_matches, report.noise) == ("exact", 2, 0.0) and report.num_drafted > 0


def accepting_everything(draft, target_ids_BU, final_sum_B):
    """A broken verifier: every draft is kept, whatever the target says."""
    columns = (draft.token_ids_BT, draft.num_drafted_B, target_ids_BU)
    return [
        HostRow(draft_ids, None, True, target_ids[count], num_waived=0, num_accepted=count, num_drafted=count)
        for draft_ids, count, target_ids in zip(*(column.tolist() for column in columns), strict=True)
    ]


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_verifier_that_accepts_everything_is_found_and_not_explained(load, mode, monkeypatch):
    """Catches an audit that explains every difference by noise, and one that looks at counts only."""
    monkeypatch.setattr("dvi.decode.round.judged_on_host", accepting_everything)
    report = run(load(mode))
    assert report.num_matches == 0 and report.num_unexplained == 2
    for divergence in report.divergences:
        assert divergence.gap >= divergence.top_gap > 0 and divergence.gap > 2 * divergence.noise
        assert divergence.plain_token != divergence.other_token
    assert divergence_table(report.divergences).row_count == 2


def test_a_difference_within_the_noise_is_explained_in_fast_mode_and_never_in_exact(load, monkeypatch):
    """Catches rounding reported as a bug, and the excuse of rounding where bits are promised."""
    monkeypatch.setattr("dvi.decode.round.judged_on_host", accepting_everything)
    monkeypatch.setattr("dvi.inspect.audit._noise", lambda split, ids, start, other: (torch.arange(512.0), 1e6))
    assert run(load("fast")).num_unexplained == 0
    assert run(load("exact")).num_unexplained == 2


def test_a_text_that_only_ends_earlier_is_never_explained(load, monkeypatch):
    """Catches a lost token passed off as rounding, and an infinite gap that JSON cannot hold."""
    decode = dvi.inspect.audit._decode

    def losing_the_last(*args, num_draft_tokens):
        ids, stats = decode(*args, num_draft_tokens=num_draft_tokens)
        return ids[: len(ids) - (num_draft_tokens > 0)], stats

    monkeypatch.setattr("dvi.inspect.audit._decode", losing_the_last)
    (first, _) = run(load()).divergences
    assert (first.position, first.other_token, first.gap, first.is_explained) == (23, None, None, False)


def test_the_audits_own_logits_are_the_models(load):
    """Catches noise and gaps measured at the wrong positions."""
    speculator = load()
    ids = speculator.encode("Once upon a time there was a dog")
    expected_SV = speculator.model(input_ids=torch.tensor([ids])).logits[0]
    for start, width in ((0, 1), (3, 1), (3, 4), (len(ids) - 1, 5)):
        actual_SV = logits_in_blocks(speculator.split, ids, start=start, width=width)
        # 1e-5: the model takes its rotary angles in float32, whatever its own precision.
        torch.testing.assert_close(actual_SV, expected_SV[start:].detach(), rtol=0, atol=1e-5)


def test_a_report_is_plain_data(load):
    """Catches a tensor that JSON refuses."""
    import json

    json.dumps(dataclasses.asdict(run(load())), allow_nan=False)
