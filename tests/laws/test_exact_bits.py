"""Bits at full speed: on the native path a request has the tokens and the hidden states that plain decoding gives it
alone, to the last bit and in bfloat16 too, whatever drafts, in whatever company, however its prompt is cut.

Greedy requests and sampled ones with shared Gumbel noise, penalties and filters among them: of these the tokens are a
function of the text. The padded passes of other paths have tests/model/test_padded.py.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

from dvi.decode import speculator as speculator_module
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import ConfidenceStop, FixedLength, LengthPolicy
from dvi.records import SamplingParams
from tests.support.drafter_doubles import (
    MemoryDrafter,
    RaggedLength,
    broken_drafter,
    plain_text,
    random_drafter,
    small_config,
)
from tests.support.exact_doubles import needs_kernels, states_by_index
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64
# arch, split layer, dtype
MODELS = {
    "llama, bfloat16": ("llama", 1, torch.bfloat16),
    "llama, float32": ("llama", 1, torch.float32),
    "mistral from the embedding, bfloat16": ("mistral", 0, torch.bfloat16),
    "qwen3, bfloat16": ("qwen3", 2, torch.bfloat16),
}
SETTINGS = (
    {}, {"temperature": 0.8}, {"temperature": 1.3, "top_p": 0.9}, {"temperature": 1.0, "top_k": 9, "min_p": 0.02},
    {"repetition_penalty": 1.3}, {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
)  # fmt: skip
DRAFTERS = ("right", "wrong at 2", "anchored", "trimmed", "nan", "lookup")


@functools.cache
def speculator_of(model: str) -> SelfSpeculator:
    arch, split_layer, dtype = MODELS[model]
    network = tiny_model(arch, num_layers=3, head_dim=32, vocab_size=VOCAB_SIZE, dtype=dtype, seed=1)
    speculator = SelfSpeculator(network, None, split_layer=split_layer, drafter=small_config())
    assert (speculator.split.path, speculator.mode) == ("native", "exact")
    return speculator


@functools.cache
def requests_of(model: str) -> list[tuple[list[int], SamplingParams, tuple, tuple]]:
    """Prompt, params, what plain decoding alone gives, and what a MemoryDrafter needs of it; past several blocks."""
    speculator, generator, found = speculator_of(model), random.Random(7), []
    for seed, setting in enumerate(SETTINGS * 2):
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(generator.choice((1, 2, 15, 16, 17, 33, 64, 70)))]
        params = SamplingParams(
            max_new_tokens=generator.randint(1, 24), seed=seed, coupling="gumbel", ignore_eos=True, **setting
        )
        (alone,) = states_by_index(speculator, [prompt], [params], policy=PLAIN, batch_size=1).values()
        found.append((prompt, params, alone, plain_text(speculator, prompt, params)[1]))
    return found


def drafting_by(name: str, model: str) -> SelfSpeculator:
    """With another drafter, or with a lookup in its place whose nodes are verified as a tree."""
    speculator = speculator_of(model)
    if name == "lookup":
        return speculator.afresh(source="lookup", policy="fixed")
    return speculator.afresh(drafter=drafter_of(name, model))


def drafter_of(name: str, model: str):
    split = speculator_of(model).split
    if name in ("right", "wrong at 2"):
        texts = [text for *_, text in requests_of(model)]
        return MemoryDrafter(split, texts, wrong_depths=(2,) if name == "wrong at 2" else ())
    return {
        "anchored": lambda: random_drafter(split, seed=2, scale=0.02),
        "trimmed": lambda: random_drafter(split, seed=2, scale=0.02, draft_vocab_size=20),
        "nan": lambda: broken_drafter(split, float("nan")),
    }[name]()


def policy_of(generator: random.Random) -> LengthPolicy:
    longest = generator.randint(1, 8)
    return generator.choice((
        FixedLength(longest), RaggedLength(longest, seed=longest), ConfidenceStop(longest, threshold=0.3)
    ))  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("model", MODELS)
def test_no_bit_of_a_request_depends_on_drafts_company_or_cuts(model, drafter, monkeypatch):
    """Catches whatever a round does to a row otherwise than plain decoding alone: rows left out of a pass, another
    cache, a penalty or a softmax that sees its neighbours, a prefill cut elsewhere."""
    requests, generator = requests_of(model), random.Random(f"{model}{drafter}")
    speculator, is_lookup = drafting_by(drafter, model), drafter == "lookup"
    num_drafted = num_accepted = 0
    for _ in range(3):
        chosen = generator.sample(range(len(requests)), generator.randint(2, 8))
        monkeypatch.setattr(speculator_module, "PREFILL_CHUNK", generator.choice((1, 7, 16, 33, 512)))
        prompts, params = ([requests[i][part] for i in chosen] for part in (0, 1))
        together = states_by_index(
            speculator, prompts, params, policy=None if is_lookup else policy_of(generator),
            batch_size=generator.randint(1, 5),
        )
        for index, request in enumerate(chosen):
            token_ids, states = requests[request][2]
            assert together[index][0] == token_ids
            assert torch.equal(together[index][1], states)
        results = list(speculator.generate(prompts, params, policy=None if is_lookup else FixedLength(3), batch_size=3))
        num_drafted += sum(result.stats.num_drafted for result in results)
        num_accepted += sum(result.stats.num_accepted for result in results)
    assert num_drafted > 0 and (num_accepted > 0 or drafter == "nan")


@needs_kernels
@pytest.mark.parametrize("model", MODELS)
def test_what_a_request_asks_for_more_changes_no_bit_of_what_it_had(model):
    """Catches a capacity in the arithmetic: with padded passes the promise is for equal requests only."""
    speculator = speculator_of(model)
    prompt, params, (token_ids, states), _ = max(requests_of(model), key=lambda request: len(request[0]))
    longer = dataclasses.replace(params, max_new_tokens=200)
    (found,) = states_by_index(speculator, [prompt], [longer], policy=PLAIN, batch_size=1).values()
    assert found[0][: len(token_ids)] == token_ids
    assert torch.equal(found[1][:, : states.shape[1]], states)


@needs_kernels
@pytest.mark.parametrize("model", MODELS)
def test_the_number_of_threads_changes_no_bit(model):
    """Catches a sum that threads share."""
    speculator, before = speculator_of(model), torch.get_num_threads()
    prompt, params, alone, _ = requests_of(model)[3]
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            (found,) = states_by_index(speculator, [prompt], [params], policy=PLAIN, batch_size=1).values()
            assert found[0] == alone[0] and torch.equal(found[1], alone[1])
    finally:
        torch.set_num_threads(before)
