"""A model decoded from the blocks of its GGUF file is the dequantised model, up to what activations are rounded to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dvi import SelfSpeculator
from dvi.config import load_config
from dvi.decode.precision import settle_dtype
from dvi.inspect.memory_plan import SplitShape
from dvi.model.drafter import DrafterConfig
from dvi.model.gguf import bytes_of_layers, read_config, read_model
from dvi.model.native import library
from dvi.model.native.weights import BFLOAT16, INT4, INT8
from dvi.model.split import SplitModel
from dvi.settings import LearningSettings
from tests.support.gguf_files import NAMES, TOKENS, write_gguf

needs_kernels = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
SIZES = {"num_layers": 3, "hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "dtype": torch.float32}
LAYERS = list(NAMES.values())[2:]  # without the norms


def written(path: Path, kinds: dict[str, str], **options: object) -> PreTrainedModel:
    write_gguf(path, kinds=kinds, **SIZES | options)
    return read_model(path, dtype=torch.bfloat16, with_blocks=True)


def logits_of(split: SplitModel, ids_BQ: Tensor) -> Tensor:
    cache = split.make_cache(len(ids_BQ), 32)
    place = cache.place(offset=0, width=ids_BQ.shape[1])
    return split.head(split.deep(split.shallow(ids_BQ, cache, place), ids_BQ, cache, place))


def kinds_of(split: SplitModel) -> list[set[int]]:
    """Of the packed products: q k v, o, gate and up, down; the head."""
    path = split._path
    by_product = zip(*([weight.kind for weight in layer.weights] for layer in path._layers), strict=True)
    return [*map(set, by_product), {path._head.kind}]


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "packed"), [("Q4_0", INT4), ("Q4_1", INT4), ("Q8_0", INT8)])
def test_a_model_of_blocks_computes_what_its_dequantised_weights_do_in_float32(tmp_path, kind, packed, tied):
    """Catches queries or keys left in llama.cpp's order of rows, a head that is not the file's."""
    path = tmp_path / "tiny.gguf"
    head = "token_embd" if tied else "output"
    model = written(path, {name: kind for name in [*LAYERS, head]}, tied=tied)
    split = SplitModel(model, split_layer=1, path="native")
    assert kinds_of(split) == [{packed}] * 5
    wide = read_model(path, dtype=torch.float32)
    ids_BQ = torch.randint(len(TOKENS), (2, 20), generator=torch.Generator().manual_seed(0))
    expected_BQV, found_BQV = wide(ids_BQ, use_cache=False).logits, logits_of(split, ids_BQ)
    # Activations are rounded to 8 bits in some ten places of each layer; random weights forgive less than trained ones.
    assert ((found_BQV - expected_BQV).norm() / expected_BQV.norm()).item() < 0.03


@needs_kernels
@torch.no_grad()
def test_in_a_mixed_file_each_product_is_of_what_all_its_parts_are(tmp_path):
    """q, k, v of 4 bits in two ways are one product of 4 bits; an odd one out has them all in bfloat16."""
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q4_0", "attn_output": "Q8_0", "ffn_gate": "Q4_0",
             "ffn_up": "Q8_0", "ffn_down": "F16", "token_embd": "F16"}  # fmt: skip
    split = SplitModel(written(tmp_path / "tiny.gguf", kinds, tied=True), split_layer=1, path="native")
    assert kinds_of(split) == [{INT4}, {INT8}, {BFLOAT16}, {BFLOAT16}, {BFLOAT16}]


@torch.no_grad()
def test_blocks_that_the_kernels_cannot_hold_are_left_to_the_dequantised_weights(tmp_path):
    """Eight scales of Q4_0 go into a float16, which ends at 65504."""
    path, layer = tmp_path / "tiny.gguf", "model.layers.0.mlp."

    def grown(model: nn.Module) -> None:
        model.get_submodule(f"{layer}up_proj").weight.mul_(1e6)

    write_gguf(path, kinds={name: "Q4_0" for name in LAYERS}, before_writing=grown, **SIZES)
    model = read_model(path, dtype=torch.bfloat16, with_blocks=True)
    assert hasattr(model.get_submodule(f"{layer}gate_proj"), "blocks")
    assert not hasattr(model.get_submodule(f"{layer}up_proj"), "blocks")


@torch.no_grad()
def test_the_dequantised_weights_are_the_same_with_blocks_and_without(tmp_path):
    """A drafter trained beside the one fits the other: its head's fingerprint is of these weights."""
    path = tmp_path / "tiny.gguf"
    with_blocks = written(path, {name: "Q4_1" for name in [*LAYERS, "token_embd"]}, tied=True)
    states = [model.state_dict() for model in (with_blocks, read_model(path, dtype=torch.bfloat16))]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# The setting model.weights


def settled(folder: Path, *settings: str, **earlier: str):
    return settle_dtype(load_config(None, [f"model.path={folder}/tiny.gguf", "model.device=cpu", *settings]), **earlier)


@needs_kernels
def test_auto_is_blocks_where_the_file_has_them_and_they_can_be(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", kinds=dict.fromkeys(LAYERS, "Q4_0"), **SIZES)
    for settings, found in (
        ((), ("bfloat16", "blocks")),
        (("model.dtype=bfloat16",), ("bfloat16", "blocks")),
        (("model.dtype=float32",), ("float32", "dense")),
        (("model.weights=dense",), ("float32", "dense")),
        (("model.path_kind=views",), ("float32", "dense")),
    ):
        model = settled(tmp_path, *settings).model
        assert (model.dtype, model.weights) == found, settings
    write_gguf(tmp_path / "tiny.gguf", **SIZES)
    assert settled(tmp_path).model.weights == "dense"


@needs_kernels
def test_a_run_that_is_gone_on_with_keeps_its_weights(tmp_path):
    """Those of a run from before there was a choice were dense."""
    write_gguf(tmp_path / "tiny.gguf", kinds=dict.fromkeys(LAYERS, "Q4_0"), **SIZES)
    for earlier_weights, kept in ((None, "dense"), ("dense", "dense"), ("blocks", "blocks")):
        assert settled(tmp_path, earlier="bfloat16", earlier_weights=earlier_weights).model.weights == kept


def test_a_model_that_is_no_file_has_nothing_to_choose():
    config = load_config(None, ["model.path=tests/stories260k", "model.dtype=float32"])
    assert settle_dtype(config).model.weights == "auto"


@needs_kernels
@pytest.mark.parametrize(
    ("kinds", "options", "reason"),
    [
        ({"attn_q": "Q4_0"}, {"dtype": "float32"}, "multiplied with bfloat16, and dtype is float32"),
        ({"attn_q": "Q4_0"}, {"dtype": "bfloat16", "path": "direct"}, "path 'direct' reads dense weights"),
        ({"attn_q": "F16"}, {"dtype": "bfloat16"}, "none of its layers' weights is Q4_0, Q4_1, Q8_0"),
    ],
)
def test_blocks_that_cannot_be_are_refused_with_the_reason_and_the_way_round(tmp_path, kinds, options, reason):
    write_gguf(tmp_path / "tiny.gguf", kinds=kinds, **SIZES)
    with pytest.raises(ValueError, match=rf"weights must be 'auto' or 'dense' for .*, got 'blocks': .*{reason}"):
        SelfSpeculator.from_pretrained(tmp_path / "tiny.gguf", weights="blocks", device="cpu", **options)


@needs_kernels
def test_a_drafter_trained_beside_dense_weights_fits_the_blocks_and_the_other_way_round(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kinds=dict.fromkeys([*LAYERS, "token_embd"], "Q4_1"), tied=True, **SIZES)

    def speculator(weights: str, **options: object) -> SelfSpeculator:
        return SelfSpeculator.from_pretrained(
            path, weights=weights, dtype="bfloat16", device="cpu", split_layer=1, **options
        )

    for first, second in (("dense", "blocks"), ("blocks", "dense")):
        speculator(first).save_drafter(tmp_path / first)
        found = speculator(second, adapter=tmp_path / first)
        assert found.split.weights == second


@needs_kernels
def test_a_model_of_blocks_is_decoded_exactly(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kinds=dict.fromkeys([*LAYERS, "token_embd"], "Q4_1") | {"attn_output": "Q8_0"}, tied=True, **SIZES)
    speculator = SelfSpeculator.from_pretrained(path, device="cpu", mode="exact")
    assert (speculator.split.weights, speculator.mode) == ("blocks", "exact")


def test_without_kernels_the_weights_are_dense(tmp_path, monkeypatch):
    monkeypatch.setenv(library.SWITCH, "off")
    write_gguf(tmp_path / "tiny.gguf", kinds=dict.fromkeys(LAYERS, "Q4_0"), **SIZES)
    assert settled(tmp_path).model.weights == "dense"
    with pytest.raises(ValueError, match=r"got 'blocks': .*blocks are for Llama-shaped models .* C\+\+ compiler"):
        settled(tmp_path, "model.dtype=bfloat16", "model.weights=blocks")


@needs_kernels
def test_the_layers_of_a_model_of_blocks_weigh_what_the_plan_says(tmp_path):
    """A plan of dense layers would be three times too much, and turn people away from machines that are enough."""
    path, kinds = tmp_path / "tiny.gguf", {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q4_1", "ffn_down": "Q8_0"}
    split = SplitModel(written(path, kinds), split_layer=1, path="native")
    assert bytes_of_layers(path) == sum(weight.num_bytes for layer in split._path._layers for weight in layer.weights)
    config = read_config(path)
    shapes = [SplitShape(config, dtype=torch.bfloat16, split_layer=1, block_bytes=b) for b in (None, 1000)]
    plans = [
        shape.plan_memory(
            drafter=DrafterConfig(), learning=LearningSettings(enabled=False), rows=1, positions=8, num_draft_tokens=2,
            learner_memory=lambda *_: None,
        )
        for shape in shapes
    ]
    assert plans[1].layers == 1000 and plans[0].other_weights == plans[1].other_weights
