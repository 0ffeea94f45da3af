"""Weights laid out for the kernels: panels of sixteen outputs, each read once from end to end for any number of rows.

Knows the layouts of kernels.cpp; knows nothing of layers.
"""
# N outputs, K inputs, P panels of L outputs, B blocks of I = 32 inputs, M rows.

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dvi.model.blocks import BLOCK, Blocks
from dvi.model.native.library import Product

L = 16  # outputs side by side in a panel
FLOAT32, BFLOAT16, INT4, INT8 = range(4)  # enum Kind


class PackedWeight:
    """One weight [N, K] and its bias in the layout of `kind`, with the struct that the kernels read."""

    def __init__(self, packed: Tensor, kind: int, shape: tuple[int, int], bias_N: Tensor | None = None) -> None:
        self.shape, self.kind = shape, kind
        self._packed = packed
        self._bias_N = None if bias_N is None else bias_N.float().contiguous()
        bias = None if bias_N is None else self._bias_N.data_ptr()
        self.product = Product(kind, *shape, 0, packed.data_ptr(), bias)

    @property
    def num_bytes(self) -> int:
        return self._packed.numel() * self._packed.element_size()


def pack(weight_NK: Tensor, bias_N: Tensor | None = None) -> PackedWeight:
    """float32 or bfloat16 [N, K], K even; outputs are filled up with zeros to whole panels."""
    n, k = weight_NK.shape
    filled_NK = F.pad(weight_NK, (0, 0, 0, -n % L))
    if weight_NK.dtype == torch.float32:
        packed, kind = filled_NK.view(-1, L, k).transpose(1, 2), FLOAT32
    else:
        packed, kind = filled_NK.view(-1, L, k // 2, 2).transpose(1, 2), BFLOAT16
    return PackedWeight(packed.contiguous(), kind, (n, k), bias_N)


def pack_blocks(parts: Sequence[Blocks], bias_N: Tensor | None = None) -> PackedWeight:
    """Quantised weights one below the other, all of 4 bits or all of 8: the file's own scales, lows and values."""
    scale_PBL = _in_panels(torch.cat([part.scale_NB for part in parts])).transpose(1, 2)
    values_NBI = torch.cat([part.values_NBI for part in parts])
    values_PLBI = _in_panels(values_NBI).view(torch.uint8)
    if parts[0].is_4_bit:
        low_PBL = _in_panels(torch.cat([part.low_NB for part in parts])).transpose(1, 2)
        # Four groups of eight inputs; of a group's pairs each even and odd input lies in a 16-bit word of its own, the
        # first pair lowest, and two nibbles are a byte.
        even_odd = values_PLBI.unflatten(-1, (4, 2, 2, 2)).permute(0, 2, 3, 1, 6, 4, 5)  # P, B, group, L, parity, 2, 2
        bytes_PBx = (even_odd[..., 0] | even_odd[..., 1] << 4).flatten(2)
        halves, kind = [scale_PBL, low_PBL], INT4
    else:
        bytes_PBx = values_PLBI.unflatten(-1, (BLOCK // 2, 2)).permute(0, 2, 3, 1, 4).flatten(2)
        halves, kind = [scale_PBL], INT8
    packed = torch.cat([*(half.contiguous().view(torch.uint8) for half in halves), bytes_PBx], dim=-1)
    n, num_blocks, _ = values_NBI.shape
    return PackedWeight(packed, kind, (n, num_blocks * BLOCK), bias_N)


def _in_panels(x_N: Tensor) -> Tensor:
    """[N, ...] -> [P, L, ...], filled up with zeros."""
    filled = F.pad(x_N, (*(0, 0) * (x_N.ndim - 1), 0, -len(x_N) % L))
    return filled.unflatten(0, (-1, L))


def multiply(library: ctypes.CDLL, weight: PackedWeight, x_MK: Tensor) -> Tensor:
    """x W^T + b, float32 [M, N]; x in the weight's dtype, of a quantised weight bfloat16."""
    x_MK = x_MK.contiguous()
    y_MN = torch.empty(len(x_MK), weight.shape[0])
    sums = torch.empty(len(x_MK), weight.shape[1] // BLOCK) if weight.kind == INT4 else y_MN
    library.dvi_product(
        ctypes.byref(weight.product), x_MK.data_ptr(), len(x_MK), sums.data_ptr(), y_MN.data_ptr(),
        torch.get_num_threads(),
    )
    return y_MN
