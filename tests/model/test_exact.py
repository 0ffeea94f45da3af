"""Exact mode's choice of passes, and the self-check of the native path: it passes, and every planted fault is told."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from dvi.model import exact
from dvi.model.exact import check_bits, exact_passes, passes_for
from dvi.model.native import library
from dvi.model.padded import PaddedSplit
from dvi.model.split import SplitModel
from tests.support.exact_doubles import needs_kernels, self_check_left_out
from tests.support.tiny_models import tiny_model


def split_of(arch: str = "llama", dtype: torch.dtype = torch.bfloat16, *, path: str = "auto") -> SplitModel:
    return SplitModel(tiny_model(arch, num_layers=2, head_dim=32, dtype=dtype), split_layer=1, path=path)


@needs_kernels
@pytest.mark.parametrize("march", ["native", "x86-64-v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_self_check_passes_where_every_row_has_one_order_of_operations(arch, dtype, march, monkeypatch):
    """Catches a check that refuses every machine, and a kernel whose order of additions follows its rows."""
    monkeypatch.setenv(library.SWITCH, march)
    check_bits(split_of(arch, dtype))


def touched(x: Tensor) -> Tensor:
    """Another last bit in every position's last value."""
    x = x.clone()
    x[..., -1] = torch.nextafter(x[..., -1], torch.tensor(torch.inf, dtype=x.dtype))
    return x


FAULTS = {
    "a product of 17 rows": ("head", (1, 17), r"logits\[63\] of position 33 .* alone, in a pass of 17 from 33 on"),
    "a step of one row": ("shallow", (1, 1), r"h_k\[31\] of position 0 .* alone, in a pass of 1 from 0 on"),
    "attention past 32 keys": ("deep", (1, 32), r"h_L\[31\] of position 26 .* alone, in a pass of 32 from 26 on"),
    "steps of rows together": ("shallow", (3, 1), r"h_k\[31\] of position 16 .* drafted and verified"),
    "batch mates": ("deep", (3, 5), r"h_L\[31\] of position 16 .* drafted and verified"),
    "a tree": ("deep", (3, 7), r"h_L\[31\] of position 16 .* as a path in a tree"),
    "a packed pass": ("deep_packed", (8, 32), r"h_L\[31\] of position 16 .* in a packed round"),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("name", FAULTS)
def test_one_last_bit_that_depends_on_rows_is_found_and_told(name, monkeypatch):
    """Catches a check that leaves out a number of rows, a kind of pass, or one of the three results."""
    part, shape, message = FAULTS[name]
    split = split_of(dtype=torch.float32)
    honest = getattr(split, part)

    def faulty(x: Tensor, *rest: object) -> Tensor:
        result = honest(x, *rest)
        return touched(result) if x.shape[:2] == shape else result

    monkeypatch.setattr(split, part, faulty)
    with pytest.raises(ValueError, match=f"exact mode is not possible for torch.float32 .*{message}.*; use mode=fast"):
        check_bits(split)


@needs_kernels
def test_a_result_that_depends_on_the_size_of_the_cache_is_found(monkeypatch):
    """Catches rotary angles, or a mask, that are made anew for a longer cache."""
    split = split_of()
    honest = split.deep
    monkeypatch.setattr(
        split, "deep", lambda h, ids, cache, place: honest(h, ids, cache, place) * (1 + (cache.capacity > 100))
    )
    with pytest.raises(ValueError, match=r"h_L\[0\] of position 0 .* alone, in a pass of 1 from 0 on"):
        check_bits(split)


@needs_kernels
def test_every_pass_of_the_self_check_counts(monkeypatch):
    """Catches a pass whose result is thrown away: whichever one call is wrong, it is found."""
    split = split_of(dtype=torch.float32)
    calls = {part: functools.partial(getattr(split, part)) for part in ("shallow", "deep", "deep_packed", "head")}
    counts = dict.fromkeys(calls, 0)

    def counting(part: str, wrong: tuple[str, int] | None):
        def call(*args: object) -> Tensor:
            counts[part] += 1
            result = calls[part](*args)
            return touched(result) if wrong == (part, counts[part]) else result

        return call

    def run(wrong: tuple[str, int] | None) -> None:
        counts.update(dict.fromkeys(calls, 0))
        for part in calls:
            monkeypatch.setattr(split, part, counting(part, wrong))
        check_bits(split)

    run(None)
    for part, total in dict(counts).items():
        for number in range(1, total + 1):
            with pytest.raises(ValueError, match="exact mode is not possible"):
                run((part, number))


# What decoding runs on


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_path_is_exact_as_it_is_and_unasked(dtype):
    """Catches exactness that costs something where it is free: padding, rows one by one, no packing."""
    split = split_of(dtype=dtype)
    for mode in ("auto", "exact"):
        assert passes_for(split, mode) == (split, "exact")
    assert split.fixed_width is None and split.can_pack


def test_fast_promises_nothing_and_asks_nothing(monkeypatch):
    monkeypatch.setattr(exact, "exact_passes", None)
    split = split_of()
    assert passes_for(split, "fast") == (split, "fast")


@needs_kernels
def test_where_the_self_check_fails_exact_mode_is_refused_and_auto_is_fast_with_the_reason(monkeypatch, caplog):
    """Catches a promise that was found not to hold, and a server that does not start for one nobody asked for."""
    split = split_of()
    head = split.head
    monkeypatch.setattr(split, "head", lambda final_BQD: head(final_BQD) + (final_BQD.shape[1] == 9))
    with pytest.raises(ValueError, match=r"logits\[0\] of position 1 .* in a pass of 9 from 1 on; use mode=fast"):
        passes_for(split, "exact")
    assert passes_for(split, "auto") == (split, "fast")
    assert "tokens are promised up to rounding only: exact mode is not possible" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_kernels_passes_are_padded_where_that_is_asked_for(dtype, monkeypatch):
    """Catches a default that multiplies padding."""
    monkeypatch.setenv(library.SWITCH, "off")
    split = split_of(dtype=dtype)
    with self_check_left_out():
        padded, promise = passes_for(split, "exact")
    assert isinstance(padded, PaddedSplit) and promise == "exact" and not padded.can_pack
    assert passes_for(split, "auto") == (split, "fast")


def test_half_precision_without_kernels_is_refused_with_the_remedy(monkeypatch):
    """Its products round by shape on every machine: no self-check of a few positions could promise anything."""
    refusal = "torch.bfloat16 is for Llama-shaped models .*, got {} on the {} path; use dtype float32, or mode=fast"
    with pytest.raises(ValueError, match=refusal.format("GPT2LMHeadModel", "views")):
        exact_passes(SplitModel(tiny_model("gpt2", num_layers=2, dtype=torch.bfloat16), split_layer=1))
    monkeypatch.setenv(library.SWITCH, "off")
    with pytest.raises(ValueError, match=refusal.format("LlamaForCausalLM", "direct")):
        exact_passes(split_of())
