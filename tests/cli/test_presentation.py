"""What a user sees who asks Python: help, completion, types and representations."""

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dvi
import trainers
from dvi.decode.speculator import SelfSpeculator
from dvi.records import Draft, GenerationResult, ReplayBatch, RoundStats, SamplingParams, Transitions, Verdict
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_model
from trainers import OnlineTrainer


def test_help_shows_the_public_classes_and_how_they_go_together():
    """Catches lazy names that help(dvi) does not see, and a docstring that names a class there is not."""
    text = pydoc.render_doc(dvi, renderer=pydoc.plaintext)
    for name in set(dvi.__all__) - {"__version__"}:
        assert f"    class {name}(" in text and name in dvi.__doc__
    assert "from_pretrained" in text and dvi.__version__ in text
    assert "class OnlineTrainer" in pydoc.render_doc(trainers, renderer=pydoc.plaintext)


def test_names_are_known_before_they_are_imported():
    """Catches completion that misses the classes, and one that imports torch to find them."""
    code = "import dvi, sys; print(sorted(set(dvi.__all__) - set(dir(dvi))), 'torch' in sys.modules, dvi.__doc__[:3])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False DVI"
    assert set(dvi.__all__) <= set(dir(dvi)) and all(getattr(dvi, name) for name in dvi.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Speculator'"):
        _ = dvi.Speculator


def test_both_packages_say_that_they_are_typed():
    """Catches annotations that type checkers ignore."""
    assert all((Path(package.__file__).parent / "py.typed").is_file() for package in (dvi, trainers))


def test_a_speculator_and_its_parts_say_in_a_line_what_they_are():
    """Catches an address, a page of modules, or a description of something else."""
    speculator = SelfSpeculator(tiny_model("llama"), None, split_layer=1, num_draft_tokens=3, policy="fixed")
    trainer = OnlineTrainer(speculator)
    for part in (speculator, speculator.split, speculator.drafter, trainer, trainer.replay):
        assert repr(part).startswith(type(part).__name__ + "(") and "\n" not in repr(part) and "0x" not in repr(part)
    assert repr(speculator) == (
        "SelfSpeculator(LlamaForCausalLM, 1 of 4 layers draft, float64 on cpu, "
        "anchored drafter v0, fixed policy, at most 3 drafts, fast mode)"
    )
    assert repr(speculator.split) == "SplitModel(LlamaForCausalLM, 1 of 4 layers shallow, direct, dense float64 on cpu)"
    assert "AnchoredDrafter(v0, hidden 1024, rank 32, " in repr(speculator.drafter)
    assert repr(trainer).startswith("OnlineTrainer(0 steps in ") and "0 positions stored, drafter v0)" in repr(trainer)
    assert repr(trainer.replay) == "ReplayBuffer(0 of 16,384 positions)"


def test_records_say_their_counts_and_leave_their_tensors_out():
    """Catches a result whose repr is pages of hidden states, and settings that hide what is not the default."""
    assert repr(SamplingParams()) == "SamplingParams(temperature=0.0, max_new_tokens=128)"
    params = SamplingParams(temperature=0.5, seed=3, stop_strings=("x",))
    assert eval(repr(params)) == params
    stats = RoundStats(decode_s=2.0)
    for _ in range(4):
        stats.count_round(num_drafted=3, num_accepted=2)
    assert repr(stats) == "RoundStats(12 tokens in 4 rounds, 8 of 12 drafts accepted, MAT 3.00, 6.0 tokens/s)"
    result = GenerationResult(1, 7, "word " * 50, [1] * 50, "length", stats, 2, "fast")
    line = repr(result)
    assert line.startswith("GenerationResult(1: 'word word") and "...', 50 tokens, length, MAT 3.00, drafter v2" in line
    assert len(line) < 120


def test_records_of_tensors_show_shapes_alone():
    """Catches a repr that copies hidden states from the device to print them."""
    B, U, D = 2, 5, 8
    ids, hidden = torch.zeros(B, 4, dtype=torch.int64), torch.zeros(B, U, D)
    draft = Draft(ids, ids[:, 0], hidden, None, None, None, 3)
    assert repr(draft) == (
        "Draft(token_ids_BT=int64[2, 4], num_drafted_B=int64[2], hidden_BUD=float32[2, 5, 8], num_positions=None, "
        "probs_BTV=None, log_probs_BT=None, drafter_version=3)"
    )
    assert repr(Verdict(ids[:, 0], ids[:, 0])) == "Verdict(num_accepted_B=int64[2], next_token_B=int64[2])"
    stretch = Transitions(1, 4, ids[0], hidden[0], hidden[0], 4, 3, ids[0], hidden[0, 0], 2, tenant="a")
    assert "hidden_WD=float32[5, 8]" in repr(stretch) and repr(stretch).endswith("drafter_version=2, tenant=a)")
    batch = ReplayBatch(*[hidden] * 10)
    assert repr(batch).startswith("ReplayBatch(anchor_ND=float32[2, 5, 8], ") and "tensor(" not in repr(batch)
