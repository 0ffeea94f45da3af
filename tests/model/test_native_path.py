"""The compiled kernels compute what the views compute, and a row's bits never depend on what stands beside it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dvi.model.kv_cache import RollbackCache
from dvi.model.native import library
from dvi.model.native.path import NativePath
from dvi.model.native.weights import multiply, pack, pack_blocks
from dvi.model.ragged import Packing
from dvi.model.split import SplitModel
from tests.support.exact_doubles import needs_kernels
from tests.support.gguf_files import quantised
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = {"one row": [6], "equal rows": [7, 7, 7], "ragged rows": [3, 20, 6]}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# x86-64-v3 is AVX2: what runs where there are no 512-bit registers.
MARCHES = ("native", "x86-64-v3")


@pytest.fixture(params=MARCHES)
def march(request, monkeypatch) -> str:
    monkeypatch.setenv(library.SWITCH, request.param)
    return request.param


def model_of(arch: str, dtype: torch.dtype) -> torch.nn.Module:
    return tiny_model(arch, num_layers=3, head_dim=32, dtype=dtype, seed=2)


def random_ids(rows: int, width: int) -> Tensor:
    return torch.randint(64, (rows, width), generator=torch.Generator().manual_seed(0))


def one_pass(split: SplitModel, cache: RollbackCache, ids_BQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    place = cache.place(offset=0, width=ids_BQ.shape[1])
    hidden_BQD = split.shallow(ids_BQ, cache, place)
    final_BQD = split.deep(hidden_BQD, ids_BQ, cache, place)
    return hidden_BQD, final_BQD, split.head(final_BQD)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pass_over_any_rows_equals_the_views(arch, lengths, width, dtype, march):
    """Catches a mask off by one, a window forgotten, biases and norms left out, a head's keys read for another's.

    Lengths pass the sliding window of 5 and a block of 16 slots.
    """
    ids_BS = random_ids(len(lengths), max(lengths) + width)
    found = []
    for path, model_dtype in (("native", dtype), ("views", torch.float32)):
        split = SplitModel(model_of(arch, dtype).to(model_dtype), split_layer=1, path=path)
        cache = split.make_cache(len(lengths), 32)
        one_pass(split, cache, ids_BS[:, : max(lengths)])
        cache.commit(lengths)
        found.append([x.float() for x in one_pass(split, cache, ids_BS[:, -width:])])
    for native, expected in zip(*found, strict=True):
        assert ((native - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_position_has_the_same_bits_in_prefill_step_and_verification(arch, dtype, march):
    """What exactness rests on: a text read at once, position by position, in blocks, and beside another row."""
    split = SplitModel(model_of(arch, dtype), split_layer=1, path="native")
    ids_BS = random_ids(2, 40)

    def read(widths: list[int], rows: slice, capacity: int) -> list[Tensor]:
        cache = split.make_cache(len(ids_BS[rows]), capacity)
        parts = []
        for ids_BQ in ids_BS[rows].split(widths, dim=1):
            parts.append(one_pass(split, cache, ids_BQ))
            cache.commit([ids_BQ.shape[1]] * cache.rows)
        return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]

    whole = read([40], slice(0, 2), 40)
    for widths in ([1] * 40, [2] * 20, [5] * 8, [13, 1, 26], [17, 23], [33, 7]):
        for row in (0, 1):
            alone = read(widths, slice(row, row + 1), 64)
            for expected, found in zip(whole, alone, strict=True):
                assert torch.equal(expected[row], found[0])


@needs_kernels
@torch.no_grad()
def test_positions_left_out_of_a_packed_pass_change_nothing_for_the_others(march):
    split = SplitModel(model_of("llama", torch.float32), split_layer=1, path="native")
    ids_BQ, counts_B = random_ids(3, 4), torch.tensor([2, 4, 1])
    finals = []
    for packing in (None, Packing(counts_B, width=4)):
        cache = split.make_cache(3, 16)
        place = cache.place(offset=0, width=4)
        hidden_BQD = split.shallow(ids_BQ, cache, place)
        if packing is None:
            finals.append(split.deep(hidden_BQD, ids_BQ, cache, place))
        else:
            finals.append(packing.unpack(split.deep_packed(packing.pack(hidden_BQD), cache, place, packing)))
    for row, count in enumerate(counts_B.tolist()):
        assert torch.equal(finals[0][row, :count], finals[1][row, :count])


@needs_kernels
@torch.no_grad()
def test_nan_in_one_row_stays_in_it(march):
    """A poisoned row must be seen as such, and its batch mates must not be."""
    split = SplitModel(model_of("llama", torch.bfloat16), split_layer=0, path="native")
    cache, ids_BQ = split.make_cache(2, 16), random_ids(2, 3)
    place = cache.place(offset=0, width=3)
    hidden_BQD = split.shallow(ids_BQ, cache, place).clone()
    hidden_BQD[0, 1] = float("nan")
    logits_BQV = split.head(split.deep(hidden_BQD, ids_BQ, cache, place))
    assert logits_BQV[0, 1:].isnan().all() and logits_BQV[0, 0].isfinite().all() and logits_BQV[1].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 2), (40, 96), (7, 33 * 2), (192, 576)])
def test_a_product_equals_the_plain_one_for_any_number_of_rows(shape, dtype, march):
    """Catches a panel or tile at the end of a share that is left out, or filled outputs that leak."""
    generator = torch.Generator().manual_seed(1)
    weight_NK = torch.randn(shape, generator=generator).to(dtype)
    bias_N = torch.randn(shape[0], generator=generator)
    packed = pack(weight_NK, bias_N)
    x_MK = torch.randn(40, shape[1], generator=generator).to(dtype)
    expected_MN = x_MK.double() @ weight_NK.double().t() + bias_N.double()
    whole_MN = multiply(library.load(), packed, x_MK)
    torch.testing.assert_close(whole_MN.double(), expected_MN, rtol=1e-3, atol=1e-3)
    for rows in range(1, 40):
        assert torch.equal(multiply(library.load(), packed, x_MK[:rows]), whole_MN[:rows])


@needs_kernels
@pytest.mark.parametrize("shapes", [[(16, 32)], [(7, 96)], [(192, 576), (64, 576)], [(33, 1536), (7, 1536)]])
@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_0"), ("Q4_1", "Q4_0"), ("Q8_0", "Q8_0")])
def test_a_product_of_blocks_is_that_of_the_dequantised_weights_for_any_number_of_rows(kinds, shapes, march):
    """Catches a nibble in another's place, a scale of the next block, a part that begins inside a panel."""
    generator = torch.Generator().manual_seed(3)
    pairs = [
        quantised(torch.randn(shape, generator=generator), kind) for kind, shape in zip(kinds, shapes, strict=False)
    ]
    dense_NK = torch.cat([dense for _, dense in pairs]).double()
    bias_N = torch.randn(len(dense_NK), generator=generator)
    packed = pack_blocks([blocks for blocks, _ in pairs], bias_N)
    x_MK = torch.randn(40, dense_NK.shape[1], generator=generator).bfloat16()
    whole_MN = multiply(library.load(), packed, x_MK)
    # Float32 sums of exact products: nothing but the sums' own rounding.
    torch.testing.assert_close(whole_MN.double(), x_MK.double() @ dense_NK.t() + bias_N, rtol=1e-4, atol=1e-4)
    for rows in range(1, 40):
        assert torch.equal(multiply(library.load(), packed, x_MK[:rows]), whole_MN[:rows])


@needs_kernels
def test_structs_are_as_large_as_the_compiler_lays_them_out():
    """A field added on one side alone would shift every address behind it."""
    kernels = library.load()
    structs = {"product": library.Product, "layer": library.Layer, "pass": library.Pass, "drafter": library.Drafter}
    for name, struct in structs.items():
        assert kernels[f"dvi_size_of_{name}"]() == ctypes.sizeof(struct)


@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "is installed"), ("false", "failed")])
def test_without_a_working_compiler_layers_run_as_before_and_a_warning_says_why(
    compiler, reason, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    try:
        assert not NativePath.supports(model_of("llama", torch.float32))
        assert SplitModel(model_of("llama", torch.float32), split_layer=1).path == "direct"
    finally:
        library._load.cache_clear()
    assert [reason in record.message for record in caplog.records] == [True]


@needs_kernels
def test_the_kernels_load_in_a_process_that_has_not_asked_for_torch():
    """They link no OpenMP runtime of their own: whoever loads them must have brought torch's."""
    code = "from dvi.model.native import library; assert library.load() is not None, library.why_none()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_switched_off_means_not_even_compiled(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "off")
    assert SplitModel(model_of("llama", torch.float32), split_layer=1).path == "direct"
    with pytest.raises(ValueError, match="with a C\\+\\+ compiler, got LlamaForCausalLM in float32"):
        SplitModel(model_of("llama", torch.float32), split_layer=1, path="native")
