"""Padded passes on a machine whose kernels cannot promise exactness.

Which results come out alike at every index of a pass depends on the processor: the model of `stories260k` is refused in
float32 by machines with AVX-512, and in float64 by some of them. A test that needs exact mode and compares tokens
leaves the self-check out and runs in float64, where rounding lies ten decades below the gap between two tokens. A test
that compares bits needs the self-check. The native path needs neither: its rows have one order of operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dvi.decode.speculator import SelfSpeculator
from dvi.model.native import library
from dvi.model.padded import PaddedSplit
from dvi.records import SamplingParams

needs_kernels = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")


@contextmanager
def self_check_left_out() -> Iterator[None]:
    """Inside, passes are padded without asking whether a result depends on its index in the pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PaddedSplit, "self_check", lambda self: None)
        yield


def need_self_check(passes: PaddedSplit) -> None:
    """Skips a test of bits, with the reason, where the self-check refuses: what it promises holds where it passes."""
    try:
        passes.self_check()
    except ValueError as refusal:
        pytest.skip(str(refusal))


def states_by_index(
    speculator: SelfSpeculator, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], **options
) -> dict[int, tuple[list[int], Tensor]]:
    """Token ids and hidden states (h_k, h_L) [2, S, D] of every position, by prompt."""
    found = {}
    for result in speculator.generate(prompts, params, **options):
        stretches = result.transitions
        states = torch.stack(
            [torch.cat([s.hidden_WD for s in stretches]), torch.cat([s.target_hidden_WD for s in stretches])]
        )
        found[result.index] = (result.token_ids, states)
        assert states.shape[1] == len(prompts[result.index]) + len(result.token_ids) - 1
    return found
