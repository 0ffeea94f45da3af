"""Drafters: what serves equals what learns, at fixed addresses, and an untrained one is the model's own head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dvi.model.drafter import DRAFTER_KINDS, DrafterConfig, build_drafter, choose_draft_tokens, trainable_copy_of_norm
from dvi.model.split import SplitModel
from tests.support.drafter_doubles import random_drafter, small_config
from tests.support.tiny_models import tiny_model

KINDS = list(DRAFTER_KINDS)
HIDDEN, VOCAB_SIZE, DEPTH = 16, 64, 5


def split_of(arch: str = "llama", **options) -> SplitModel:
    model = tiny_model(arch, num_layers=2, hidden_size=HIDDEN, vocab_size=VOCAB_SIZE, dtype=torch.float32, **options)
    return SplitModel(model, split_layer=1)


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def stepped(drafter: nn.Module, hidden_NTD: Tensor, anchor_ND: Tensor) -> Tensor:
    """Draft logits [N, T, V] by begin and step, as a round takes them."""
    state = drafter.begin(anchor_ND)
    return torch.stack([drafter.step(hidden_NTD[:, t], state, t) for t in range(hidden_NTD.shape[1])], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("draft_vocab_size", [0, 20])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "granite"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_step_gives_what_the_learner_computes_for_that_depth(kind, arch, draft_vocab_size):
    """Catches a depth off by one, a forgotten correction or logit scale, a carried state of another depth: a drafter
    would then be trained for something that it never does."""
    drafter = random_drafter(split_of(arch), kind, seed=1, draft_vocab_size=draft_vocab_size)
    hidden_NTD, anchor_ND = states(3, DEPTH), states(3, seed=1)
    logits_NTV = drafter(hidden_NTD, anchor_ND)
    torch.testing.assert_close(stepped(drafter, hidden_NTD, anchor_ND), logits_NTV, rtol=1e-4, atol=1e-4)
    assert logits_NTV.shape == (3, DEPTH, draft_vocab_size or VOCAB_SIZE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["anchored", "recurrent"])
def test_anchor_and_depth_matter_to_an_anchored_drafter(kind):
    """Catches an anchor that is read but multiplied away: the promised context would be absent."""
    drafter = random_drafter(split_of(), kind, seed=1)
    hidden_NTD, anchor_ND = states(1, 1).expand(1, DEPTH, -1), states(1, seed=1)
    logits_TV = drafter(hidden_NTD, anchor_ND)[0]
    assert not torch.allclose(drafter(hidden_NTD, 2 * anchor_ND.flip(1))[0, 0], logits_TV[0], atol=1e-2)
    assert not torch.allclose(logits_TV[0], logits_TV[1], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_publishing_changes_what_serves_in_place_and_not_before(kind):
    """Catches learning that leaks into a running version, and buffers that move under a captured graph."""
    split = split_of()
    live, learner = random_drafter(split, kind, seed=1), random_drafter(split, kind, seed=2)
    hidden_NTD, anchor_ND = states(2, DEPTH), states(2, seed=1)
    before = stepped(live, hidden_NTD, anchor_ND)
    addresses = [t.data_ptr() for t in (*live.parameters(), live.draft_head.published_buffer)]
    for parameter in learner.parameters():
        parameter.mul_(1.5)
    assert torch.equal(stepped(live, hidden_NTD, anchor_ND), before)
    live.publish(learner, 7)
    assert live.version == 7
    assert addresses == [t.data_ptr() for t in (*live.parameters(), live.draft_head.published_buffer)]
    torch.testing.assert_close(
        stepped(live, hidden_NTD, anchor_ND), learner(hidden_NTD, anchor_ND), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("kind", ["lora_head", "anchored"])
def test_an_untrained_drafter_is_the_frozen_head_over_the_normed_state(kind, arch):
    """Catches B or the MLP not starting at zero, and a head whose scale or soft cap was left out."""
    split = split_of(arch)
    drafter = build_drafter(split, small_config(kind))
    drafter.publish(drafter, 0)
    hidden_NTD = states(2, 3)
    expected = split.head(split.final_norm(hidden_NTD))
    torch.testing.assert_close(drafter(hidden_NTD, states(2)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stepped(drafter, hidden_NTD, states(2)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2", "cohere", "olmo2"])
def test_the_norms_copy_gives_the_norms_values_and_shares_nothing_with_it(arch):
    """Catches Gemma's gain of 1 + w, LayerNorm's bias and mean taken for an RMS norm's, and training by reference."""
    norm = split_of(arch).final_norm
    copied = trainable_copy_of_norm(norm, HIDDEN)
    x = 3 * states(4) + 1
    torch.testing.assert_close(copied(x), norm(x).float(), rtol=1e-5, atol=1e-5)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in norm.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in copied.parameters())


@torch.no_grad()
def test_a_draft_vocabulary_is_what_was_seen_most_filled_up_with_the_first_ids():
    counts_V = torch.zeros(60_000, dtype=torch.int64)  # large: topk gives any of the tokens that were not seen
    counts_V[[59_999, 500, 3]] = torch.tensor([9, 2, 2])
    assert choose_draft_tokens(counts_V, 1).tolist() == [59_999]
    assert sorted(choose_draft_tokens(counts_V, 2).tolist()) == [3, 59_999]
    assert sorted(choose_draft_tokens(counts_V, 2000).tolist()) == [*range(1999), 59_999]


def test_a_trimmed_vocabulary_maps_its_ids_both_ways_and_drafts_like_the_full_one():
    """Catches ids of the draft vocabulary taken for tokens, and columns of the head in another order than the map."""
    split = split_of()
    token_ids_V = torch.tensor([40, 3, 17, 63, 0])
    trimmed = build_drafter(split, small_config("lora_head"), draft_token_ids_V=token_ids_V)
    full = build_drafter(split, small_config("lora_head"))
    kept_V = token_ids_V.sort().values
    head = trimmed.draft_head
    assert torch.equal(head.to_token_ids(torch.arange(5)), kept_V)
    assert torch.equal(head.to_draft_ids(kept_V), torch.arange(5))
    full_logits_NTV = full(states(2, 3), states(2))
    logits_NTV = trimmed(states(2, 3), states(2))
    torch.testing.assert_close(logits_NTV, full_logits_NTV[..., kept_V])
    assert torch.equal(head.gather_logits(full_logits_NTV), full_logits_NTV[..., kept_V])
    for drafter in (trimmed, full):  # what a learner distils: the verifier's own logits, of what can be drafted
        target_logits_NTV = drafter.draft_head.gather_logits(split.head(states(2, 3)))
        torch.testing.assert_close(drafter.draft_head.frozen_logits(states(2, 3)), target_logits_NTV)
    scattered_NTV = head.scatter_logits(logits_NTV, VOCAB_SIZE)
    assert torch.equal(scattered_NTV[..., kept_V], logits_NTV)
    assert torch.isneginf(scattered_NTV).sum() == (VOCAB_SIZE - 5) * 6


@torch.no_grad()
def test_trimming_a_trained_head_keeps_the_logits_of_what_it_keeps():
    """Catches a correction whose rows were not trimmed with the head's, and a second trim over the first's ids."""
    drafter = random_drafter(split_of(), seed=3)
    full_logits_NTV = drafter(states(2, 3), states(2))
    kept_V = torch.tensor([5, 60, 9])
    drafter.draft_head.trim(kept_V)
    expected = full_logits_NTV[..., [5, 9, 60]]
    torch.testing.assert_close(drafter(states(2, 3), states(2)), expected)
    drafter.publish(drafter, 9)
    torch.testing.assert_close(stepped(drafter, states(2, 3), states(2)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="trimmed to 3 tokens already"):
        drafter.draft_head.trim(kept_V)


def test_impossible_shapes_are_refused_with_the_bound():
    with pytest.raises(ValueError, match="one of anchored, recurrent, lora_head"):
        DrafterConfig(kind="eagle")
    with pytest.raises(ValueError, match=r"lora_rank must be in 1\.\.4096, got 0"):
        DrafterConfig(lora_rank=0)


def test_a_draft_vocabulary_beyond_the_models_keeps_all():
    """Catches a default that refuses every model with a smaller vocabulary."""
    assert build_drafter(split_of(), DrafterConfig(draft_vocab_size=65)).draft_head.vocab_size == 64
