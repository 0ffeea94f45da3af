"""The direct path computes what the views compute, which is what the model computes: packed or fused, row or batch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import dvi.model.llama_path
from dvi.model.kv_cache import RollbackCache
from dvi.model.llama_path import DirectPath
from dvi.model.split import SplitModel
from tests.support.tiny_models import tiny_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = {"one row": [6], "equal rows": [7, 7, 7], "ragged rows": [3, 9, 6]}
TOLERANCE = 1e-10


def norm_in_own_dtype(x: Tensor, norm: nn.Module) -> Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def with_norms_in_float64(model: nn.Module) -> nn.Module:
    """Models take norms in float32 whatever their dtype, which would hide any fault below 1e-5."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(norm_in_own_dtype, norm=module)
    return model


def path_of(arch: str, *, is_packed: bool, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> SplitModel:
    """A split on the direct path. Packed is for CPUs; fused is what other devices run."""
    model = tiny_model(arch, num_layers=3, dtype=dtype, seed=2)
    if not is_packed:
        monkeypatch.setattr(dvi.model.llama_path, "_PackedBlock", dvi.model.llama_path._FusedBlock)
    return SplitModel(model, split_layer=1, path="direct")


def prefill(split: SplitModel, cache: RollbackCache, lengths: list[int], ids_BS: Tensor) -> None:
    width = max(lengths)
    place = cache.place(offset=0, width=width)
    split.deep(split.shallow(ids_BS[:, :width], cache, place), ids_BS[:, :width], cache, place)
    cache.commit(lengths)


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pass_over_any_rows_equals_the_views(arch, lengths, width, is_packed, monkeypatch):
    """Catches a mask off by one, a window forgotten where one row is special-cased, biases and norms left out, and
    rows mixed where heads are folded. Lengths pass the sliding window of 5."""
    monkeypatch.setattr(dvi.model.llama_path, "rms_norm", norm_in_own_dtype)
    split = path_of(arch, is_packed=is_packed, monkeypatch=monkeypatch, dtype=torch.float64)
    model = with_norms_in_float64(tiny_model(arch, num_layers=3, dtype=torch.float64, seed=2))
    views = SplitModel(model, split_layer=1, path="views")
    ids_BS = torch.randint(64, (len(lengths), 16), generator=torch.Generator().manual_seed(0))
    found = []
    for one in (split, views):
        cache = one.make_cache(len(lengths), 20)
        prefill(one, cache, lengths, ids_BS)
        ids_BQ = ids_BS[:, -width:]
        place = cache.place(offset=0, width=width)
        hidden = one.shallow(ids_BQ, cache, place)
        final = one.deep(hidden, ids_BQ, cache, place)
        found.append((hidden, final, one.head(final)))
    for direct, expected in zip(*found, strict=True):
        torch.testing.assert_close(direct, expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_models_own_forward_still_works_after_fusing(arch, monkeypatch):
    """Its weights have become views of the fused ones: nothing stored twice, nothing changed."""
    plain = tiny_model(arch, num_layers=3, dtype=torch.float64, seed=2)
    ids_BS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(ids_BS)
    expected = plain(input_ids=ids_BS, attention_mask=ones, use_cache=False).logits
    model = path_of(arch, is_packed=False, monkeypatch=monkeypatch, dtype=torch.float64).model
    assert torch.equal(model(input_ids=ids_BS, attention_mask=ones, use_cache=False).logits, expected)
    attention = model.model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_takes_the_fused_path_and_agrees_as_well_as_it_rounds(arch):
    """SplitModel's self-check already compares it with the plain forward; here a ragged batch, beside the views."""
    logits = []
    ids_BS = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(3))
    for path in ("direct", "views"):
        split = SplitModel(tiny_model(arch, num_layers=2, dtype=torch.bfloat16), split_layer=1, path=path)
        cache = split.make_cache(2, 20)
        prefill(split, cache, [3, 6], ids_BS)
        place = cache.place(offset=0, width=3)
        logits.append(split.head(split.deep(split.shallow(ids_BS[:, -3:], cache, place), ids_BS[:, -3:], cache, place)))
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[1].norm()


def test_what_is_not_llama_shaped_is_not_taken():
    """Weights of another shape would be multiplied as if they were Llama's."""
    assert not DirectPath.supports(tiny_model("gpt2"))
    assert not DirectPath.supports(tiny_model("llama", mlp_bias=True))
    assert not DirectPath.supports(tiny_model("llama", attention_bias=True))
    assert not DirectPath.supports(tiny_model("llama", hidden_act="gelu"))
    assert DirectPath.supports(tiny_model("qwen2"))
