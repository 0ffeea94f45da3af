"""Quantised blocks are read as llama.cpp means them."""

from __future__ import annotations

import pytest
import torch

from dvi.model.blocks import BYTES
from tests.support.gguf_files import quantised


@pytest.mark.parametrize("kind", BYTES)
def test_dequantised_blocks_are_what_the_package_gguf_reads_in_them(kind):
    blocks, dense_NK = quantised(torch.randn(5, 96, generator=torch.Generator().manual_seed(0)), kind)
    torch.testing.assert_close(blocks.dequantised(), dense_NK, rtol=1e-6, atol=1e-6)  # of scale * 8 one may round apart


@pytest.mark.parametrize("kind", BYTES)
def test_rows_move_whole(kind):
    blocks, _ = quantised(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), kind)
    order_N = torch.tensor([2, 0, 3, 1])
    assert torch.equal(blocks.reordered(order_N).dequantised(), blocks.dequantised()[order_N])
