"""Weights laid out for the kernels: panels of sixteen outputs, each read once from end to end for any number of rows.

Knows the layouts of kernels.cpp; knows nothing of layers.
"""
# N outputs, K inputs, P panels of L outputs, B blocks of I = 32 inputs, M rows.

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvi.model.blocks import BLOCK, ZERO, Blocks
from dvi.model.native.library import Product

L = 16  # outputs side by side in a panel
FLOAT32, BFLOAT16, INT4, INT8 = range(4)  # enum Kind


class PackedWeight:
    """One weight [N, K] and its bias in the layout of `kind`, with the struct that the kernels read."""

    def __init__(self, packed: Tensor, kind: int, shape: tuple[int, int], bias_N: Tensor | None = None) -> None:
        self.shape, self.kind, self.buffer = shape, kind, packed
        self._bias_N = None if bias_N is None else bias_N.float().contiguous()
        bias = None if bias_N is None else self._bias_N.data_ptr()
        self.product = Product(kind, *shape, 0, packed.data_ptr(), bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs that it is multiplied with."""
        return torch.float32 if self.kind == FLOAT32 else torch.bfloat16

    @property
    def num_bytes(self) -> int:
        return self.buffer.nbytes

    def unpacked(self) -> Tensor:
        """[N, K] in the inputs' dtype: to the bit what was packed, or what its blocks are dequantised to."""
        n, k = self.shape
        if self.kind == FLOAT32:
            return self.buffer.transpose(1, 2).reshape(-1, k)[:n]
        if self.kind == BFLOAT16:
            return self.buffer.transpose(1, 2).reshape(-1, k // 2).view(torch.bfloat16)[:n]
        return _unpacked_blocks(self.buffer, self.kind)[:n]

    def clone(self) -> PackedWeight:
        return PackedWeight(self.buffer.clone(), self.kind, self.shape, self._bias_N)

    def write(self, weight_nK: Tensor, *, start: int = 0) -> None:
        """Overwrites the outputs from `start` on, a multiple of L, of a weight that `pack` made."""
        panels = _panels(weight_nK.to(self.dtype))
        self.buffer[start // L : start // L + len(panels)] = panels


def can_pack(weight_NK: Tensor, dtype: torch.dtype) -> bool:
    """Whether `pack` takes such a weight in this dtype."""
    return weight_NK.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and weight_NK.shape[1] % 2 == 0


def pack_linears(linears: Sequence[nn.Linear]) -> PackedWeight:
    """Projections of the same input as one product: of blocks where all have some alike, else of their weights."""
    bias_N = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    blocks = [linear.blocks for linear in linears if hasattr(linear, "blocks")]
    if len(blocks) == len(linears) and len({part.is_4_bit for part in blocks}) == 1:
        return pack_blocks(blocks, bias_N)
    return pack(torch.cat([linear.weight for linear in linears]), bias_N)


def pack(weight_NK: Tensor, bias_N: Tensor | None = None) -> PackedWeight:
    """float32 or bfloat16 [N, K], K even; outputs are filled up with zeros to whole panels."""
    kind = FLOAT32 if weight_NK.dtype == torch.float32 else BFLOAT16
    return PackedWeight(_panels(weight_NK).contiguous(), kind, tuple(weight_NK.shape), bias_N)


def _panels(weight_NK: Tensor) -> Tensor:
    """[P, K, L] of the filled weight's numbers, or [P, K/2, L] of its pairs of bfloat16: a view."""
    filled_NK = F.pad(weight_NK, (0, 0, 0, -len(weight_NK) % L)) if len(weight_NK) % L else weight_NK.contiguous()
    words = filled_NK if weight_NK.dtype == torch.float32 else filled_NK.view(torch.int32)
    return words.view(-1, L, words.shape[1]).transpose(1, 2)


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


def _unpacked_blocks(packed_PBb: Tensor, kind: int) -> Tensor:
    """[P * L, K] bfloat16: `pack_blocks` undone and dequantised."""

    def numbers(start: int) -> Tensor:  # a float16 for each output of each block, [P, L, B, 1]
        halves_PBL = packed_PBb[..., start : start + 2 * L].contiguous().view(torch.float16)
        return halves_PBL.transpose(1, 2).float()[..., None]

    if kind == INT4:
        nibbles = packed_PBb[..., 4 * L :].unflatten(-1, (4, L, 2, 2))  # P, B, group, L, parity, byte
        even_odd = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).permute(0, 3, 1, 2, 5, 6, 4)
        scale, low, values = numbers(0), numbers(2 * L), even_odd.flatten(3)
        # Q4_0's, which may have scales below zero, and so zeros below zero.
        weight_PLBI = torch.where(low == -ZERO * scale, scale * (values.float() - ZERO), scale * values + low)
    else:
        pairs = packed_PBb[..., 2 * L :].view(torch.int8).unflatten(-1, (BLOCK // 2, L, 2))
        weight_PLBI = numbers(0) * pairs.permute(0, 3, 1, 2, 4).flatten(3)
    return weight_PLBI.bfloat16().flatten(2).flatten(0, 1)


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
