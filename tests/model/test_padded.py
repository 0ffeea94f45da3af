"""Padded passes: neither the draft length nor the batch changes one bit, and a machine that cannot promise it is found.

What kernels do with a row's index is the processor's affair: bits are compared where the self-check passes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.model.padded import PaddedSplit
from dvi.model.split import SplitModel
from dvi.records import SamplingParams
from tests.support.drafter_doubles import MemoryDrafter, RaggedLength, plain_text, small_config
from tests.support.exact_doubles import need_self_check, self_check_left_out, states_by_index
from tests.support.tiny_models import tiny_model

PROMPTS = [[5, 9, 33], [7], list(range(1, 20)), [60, 60]]
PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)


@functools.cache
def speculator_of(arch: str, dtype: torch.dtype) -> SelfSpeculator:
    model = tiny_model(arch, num_layers=2, hidden_size=16, dtype=dtype)
    with self_check_left_out():
        return SelfSpeculator(model, None, drafter=small_config(), mode="exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])
def test_draft_length_and_batch_mates_change_no_bit_of_any_hidden_state(arch, dtype):
    """Catches a pass whose shape follows T, the batch, the policy's reach or the chunk of a prefill."""
    speculator = speculator_of(arch, dtype)
    need_self_check(speculator.passes)
    alone = {i: states_by_index(speculator, [p], PARAMS, policy=PLAIN)[0] for i, p in enumerate(PROMPTS)}
    texts = [plain_text(speculator, p, PARAMS)[1] for p in PROMPTS]
    speculator.drafter = MemoryDrafter(speculator.split, texts, wrong_depths=(3,))
    for policy, batch_size in ((FixedLength(1), 1), (FixedLength(8), 3), (RaggedLength(8, seed=0), 4)):
        together = states_by_index(speculator, PROMPTS, PARAMS, policy=policy, batch_size=batch_size)
        for index, (token_ids, states) in alone.items():
            assert together[index][0] == token_ids
            assert torch.equal(together[index][1], states)


def test_every_pass_of_a_request_has_one_shape_whatever_the_policy_and_the_batch(monkeypatch):
    """Equal bits on this machine might be luck; equal shapes are why. Catches a cache whose capacity follows T."""
    speculator = speculator_of("llama", torch.float32)
    shapes = set()
    for part in ("shallow", "deep"):
        original = getattr(speculator.split, part)

        def record(*args, original=original) -> Tensor:
            shapes.add((*args[0].shape[:2], args[-1].visible))
            return original(*args)

        monkeypatch.setattr(speculator.split, part, record)
    for policy in (PLAIN, FixedLength(1), FixedLength(8)):
        list(speculator.generate([PROMPTS[0], PROMPTS[3]], PARAMS, policy=policy))
    assert len(shapes) == 1


def test_half_precision_is_refused():
    """Its matrix products round by shape on every machine: no self-check of a few positions could promise anything."""
    split = SplitModel(tiny_model("llama", num_layers=2, hidden_size=16, dtype=torch.bfloat16), split_layer=1)
    with pytest.raises(ValueError, match=r"padded in float32 or float64, got torch\.bfloat16; use mode=fast"):
        PaddedSplit(split)


class Elementwise:
    """A split model of one rounded operation for each number: no kernel can make it depend on a row's index."""

    dtype, device, vocab_size = torch.float32, torch.device("cpu"), 64

    def shallow(self, token_ids_BQ: Tensor, *_: object) -> Tensor:
        return token_ids_BQ[..., None] / torch.arange(1.0, 9.0)

    def deep(self, hidden_BQD: Tensor, *_: object) -> Tensor:
        return hidden_BQD / 3

    def head(self, final_hidden_BQD: Tensor) -> Tensor:
        return final_hidden_BQD / 7


def test_the_self_check_passes_where_no_result_depends_on_its_index():
    """Catches a check that refuses every machine, and with it every test of bits."""
    PaddedSplit(Elementwise())


@pytest.mark.parametrize("part", ["shallow", "deep", "head"])
def test_a_result_that_depends_on_its_index_in_the_pass_is_refused(monkeypatch, part):
    """The self-check's own test: one last bit, at one index, in one of the three parts."""
    split = Elementwise()
    honest = getattr(split, part)

    def biased(*args) -> Tensor:
        output_BQ = honest(*args).clone()
        output_BQ[:, 5] = torch.nextafter(output_BQ[:, 5], torch.tensor(torch.inf))
        return output_BQ

    monkeypatch.setattr(split, part, biased)
    with pytest.raises(ValueError, match=r"exact mode is not possible.* between index 0 and 5"):
        PaddedSplit(split)
