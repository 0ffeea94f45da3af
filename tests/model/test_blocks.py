"""Quantised blocks are read as llama.cpp means them."""

from __future__ import annotations

import pytest
import torch

from dvi.model.blocks import BYTES, Blocks
from tests.support.gguf_files import quantised


@pytest.mark.parametrize("kind", BYTES)
def test_dequantised_blocks_are_what_the_package_gguf_reads_in_them(kind):
    blocks, dense_NK = quantised(torch.randn(5, 96, generator=torch.Generator().manual_seed(0)), kind)
    torch.testing.assert_close(blocks.dequantised(), dense_NK, rtol=1e-6, atol=1e-6)  # of scale * 8 one may round apart
    assert blocks.is_finite


@pytest.mark.parametrize("kind", BYTES)
def test_rows_move_whole(kind):
    blocks, _ = quantised(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), kind)
    order_N = torch.tensor([2, 0, 3, 1])
    assert torch.equal(blocks.reordered(order_N).dequantised(), blocks.dequantised()[order_N])


@pytest.mark.parametrize(("kind", "scale"), [("Q4_0", 8192.0), ("Q4_1", float("inf")), ("Q8_0", float("nan"))])
def test_a_scale_that_the_kernels_cannot_hold_is_found(kind, scale):
    """8 scales of Q4_0 are held in float16, which ends at 65504."""
    blocks, _ = quantised(torch.ones(2, 64), kind)
    bytes_NBb = blocks.bytes_NBb.clone()
    bytes_NBb[1, 1, :2] = torch.tensor([scale]).half().view(torch.uint8)
    assert blocks.is_finite and not Blocks(bytes_NBb, kind).is_finite
