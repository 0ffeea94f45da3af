"""Layers whose weights are packed elsewhere give them up, and have them back before anybody could notice."""

from __future__ import annotations

import copy

import pytest
import torch

from dvi.model.gguf import read_model
from dvi.model.native import library
from dvi.model.split import SplitModel
from tests.support.gguf_files import NAMES, write_gguf
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
IDS = torch.arange(12)[None]


def model_of(weights: str, folder) -> torch.nn.Module:
    if weights in ("float32", "bfloat16"):
        return tiny_model("qwen2", num_layers=3, head_dim=32, dtype=getattr(torch, weights))
    path = folder / "tiny.gguf"
    sizes = {"num_layers": 3, "hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
    write_gguf(path, kinds=dict.fromkeys(NAMES.values(), weights) | {"norm": "F32"}, **sizes)
    return read_model(path, dtype=torch.bfloat16, with_blocks=True)


def is_whole(model: torch.nn.Module) -> bool:
    return not any(parameter.isnan().any() for parameter in model.parameters())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "Q4_0", "Q4_1", "Q8_0"])
@torch.no_grad()
def test_weights_that_were_given_up_come_back_to_the_bit(weights, tmp_path):
    model = model_of(weights, tmp_path)
    split = SplitModel(model, split_layer=1, path="native")
    before, fingerprint = model(IDS).logits, split.fingerprint()
    split.give_up_weights()
    assert not is_whole(model)
    assert torch.equal(model(IDS).logits, before) and is_whole(model)  # through the forward
    split.give_up_weights()
    assert split.fingerprint() == fingerprint and is_whole(model)  # through the state dict


@torch.no_grad()
def test_giving_up_weights_changes_no_bit_of_what_is_decoded():
    split = SplitModel(tiny_model("llama", head_dim=32, dtype=torch.float32), split_layer=1, path="native")

    def logits() -> torch.Tensor:
        cache = split.make_cache(1, 12)
        place = cache.place(offset=0, width=12)
        return split.head(split.deep(split.shallow(IDS, cache, place), IDS, cache, place))

    before = logits()
    split.give_up_weights()
    assert torch.equal(logits(), before)
    assert not is_whole(split.model)  # decoding wants none of them


@torch.no_grad()
def test_a_hollow_model_can_be_copied_and_split_again():
    model = tiny_model("llama", head_dim=32, dtype=torch.float32)
    before = model(IDS).logits
    split = SplitModel(model, split_layer=1, path="native")
    split.give_up_weights()
    assert torch.equal(copy.deepcopy(model)(IDS).logits, before)
    assert not is_whole(model)  # the copy alone is
    assert SplitModel(model, split_layer=2, path="direct").split_layer == 2


@torch.no_grad()
def test_a_model_cut_at_another_layer_shares_what_is_packed():
    split = SplitModel(tiny_model("llama", head_dim=32, dtype=torch.float32), split_layer=1, path="native")
    split.give_up_weights()
    other = split.cut_at(2)
    other.self_check()
    assert (split.split_layer, other.split_layer, split._path.split_layer) == (1, 2, 1)
    views = SplitModel(tiny_model("llama"), split_layer=1, path="views").cut_at(3)
    assert (views.path, views.split_layer) == ("views", 3)
