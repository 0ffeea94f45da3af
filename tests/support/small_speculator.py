"""A small speculator in float64, and drafters, batches and requests for it."""

from __future__ import annotations

import functools

from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import LengthPolicy
from dvi.records import SamplingParams
from tests.support.drafter_doubles import MemoryDrafter, plain_text, small_config
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64
PROMPTS = [[5, 9, 33], [7], [1, 2, 3, 4, 50, 6, 7], [60, 60], [11, 12, 13, 14], [3], [40, 2, 21], [8, 30, 9, 31, 10]]


@functools.cache
def speculator_of(path: str = "direct") -> SelfSpeculator:
    model = tiny_model("llama", num_layers=3, hidden_size=16, vocab_size=VOCAB_SIZE, seed=3)
    return SelfSpeculator(model, None, split_layer=1, drafter=small_config(), path=path)


def with_drafter(drafter: object, path: str = "direct") -> SelfSpeculator:
    speculator = speculator_of(path)
    speculator.drafter = drafter
    return speculator


def greedy(max_new_tokens: int = 16, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **{"ignore_eos": True, **options})


def knowing(prompts: list[list[int]], params: SamplingParams, *, path: str = "direct", **options) -> MemoryDrafter:
    """A drafter that knows the texts that follow these prompts."""
    speculator = speculator_of(path)
    return MemoryDrafter(speculator.split, [plain_text(speculator, p, params)[1] for p in prompts], **options)


def batch_of(speculator: SelfSpeculator, policy: LengthPolicy, *, max_rows: int) -> DecodingBatch:
    return DecodingBatch(
        speculator.split, speculator.drafter, max_rows=max_rows, capacity=0, policy=policy, rule=StrictRule(),
        wants_transitions=True,
    )  # fmt: skip


def sequence_of(index: int, prompt: list[int], params: SamplingParams) -> Sequence:
    return Sequence(index, prompt, params, lambda _token: None, params.max_new_tokens)
