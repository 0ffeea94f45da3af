"""Law 1: no trainable parameter is upstream of a verifier logit or of any key or value that the verifier reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import FixedLength
from dvi.model.drafter import DRAFTER_KINDS
from dvi.records import SamplingParams
from dvi.settings import LearningSettings
from tests.support.drafter_doubles import random_drafter, randomise, small_config
from tests.support.tiny_models import tiny_model
from trainers.learning.online import OnlineTrainer

KINDS = list(DRAFTER_KINDS)
PROMPT = [5, 9, 33, 2, 17]


def speculator_of(kind: str, *, tied: bool = True, path: str = "auto") -> SelfSpeculator:
    model = tiny_model("llama", num_layers=2, hidden_size=16, dtype=torch.float32, tied=tied)
    return SelfSpeculator(model, None, drafter=small_config(kind), path=path)


def serve_one_round(speculator: SelfSpeculator) -> tuple[Tensor, list[Tensor]]:
    """The verifier's final hidden states of a drafted round and the cache that it read, committed positions only."""
    batch = DecodingBatch(
        speculator.split, speculator.drafter, max_rows=1, capacity=64, policy=FixedLength(0), rule=StrictRule(),
        wants_transitions=True,
    )  # fmt: skip
    batch.admit(Sequence(0, PROMPT, SamplingParams(), lambda _token: None, max_new_tokens=16))
    states = [stretch.target_hidden_WD for _ in range(3) for stretch in batch.round()]
    length = batch.cache.lengths[0]
    cached = [t[:, :, :length].clone() for layer in range(2) for t in batch.cache._buffers[layer]]
    return speculator.split.head(torch.cat(states)), cached


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_finds_no_way_from_a_verifier_logit_to_a_trainable_parameter(kind):
    """Catches an adapter inside a layer that the verifier runs. The draft logits do reach the parameters."""
    speculator = speculator_of(kind, path="views")  # the packed path writes in place, which autograd refuses to follow
    split, drafter = speculator.split, random_drafter(speculator.split, kind, seed=0).requires_grad_(True)
    # The input takes gradients, so that there is a graph to search at all.
    speculator.model.get_input_embeddings().weight.requires_grad_(True)
    ids_1S = torch.tensor([PROMPT])
    cache = split.make_cache(1, 16)
    place = cache.place(offset=0, width=len(PROMPT))
    hidden_1SD = split.shallow(ids_1S, cache, place)
    final_1SD = split.deep(hidden_1SD, ids_1S, cache, place)
    parameters = list(drafter.parameters())
    verifier_sum = split.head(final_1SD).square().sum()
    assert verifier_sum.requires_grad
    assert all(g is None for g in torch.autograd.grad(verifier_sum, parameters, allow_unused=True, retain_graph=True))
    draft_sum = drafter(hidden_1SD, final_1SD[:, 0]).square().sum()
    assert all(g is not None for g in torch.autograd.grad(draft_sum, parameters))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_no_parameter_of_the_drafter_is_one_of_the_model(kind, tied):
    """Catches a head or norm taken by reference and then trained; neither is written to a drafter's file."""
    speculator = speculator_of(kind, tied=tied)
    of_model = {t.data_ptr() for t in speculator.model.state_dict().values()}
    of_drafter = {t.data_ptr() for t in speculator.drafter.state_dict().values() if t.numel()}
    assert of_drafter and not of_model & of_drafter
    assert not any(p.requires_grad for p in speculator.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_verifier_logits_and_caches_are_equal_in_every_bit_under_a_hundred_random_drafters(kind):
    """Catches an adapter merged into the live (tied) head, and hooks that a drafter might leave on shared modules."""
    speculator = speculator_of(kind)
    logits, cached = serve_one_round(speculator)
    for seed in range(100):
        randomise(speculator.drafter, seed=seed, scale=1.0)
        found_logits, found_cached = serve_one_round(speculator)
        assert torch.equal(found_logits, logits)
        assert all(torch.equal(a, b) for a, b in zip(found_cached, cached, strict=True))


def test_the_backbone_is_the_same_after_a_thousand_updates():
    """Catches an optimizer that holds one of the model's tensors, at whatever step it may first move."""
    speculator = speculator_of("anchored")
    settings = LearningSettings(
        lr=0.01, blocks_per_step=4, rounds_per_step=1, budget=1.0, replay_positions=512, warmup_steps=10, ramp_steps=10,
        learn_from_prompts=True, steps_per_canary=100,
    )  # fmt: skip
    trainer = OnlineTrainer(speculator, settings)
    before, untrained = speculator.split.fingerprint(), speculator.drafter.draft_head.lora_A.clone()
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    list(speculator.generate([PROMPT, PROMPT[::-1]], params, policy=FixedLength(3), learner=trainer))
    for _ in range(1000):
        trainer.step()
    assert trainer.num_skipped == 0 and speculator.drafter.version > 100
    assert not torch.equal(speculator.drafter.draft_head.lora_A, untrained)
    assert speculator.split.fingerprint() == before
