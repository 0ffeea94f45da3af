"""Weights laid out for the kernels: panels of sixteen outputs, each read once from end to end for any number of rows.

Knows the layouts of kernels.cpp; knows nothing of layers.
"""
# N outputs, K inputs, P panels of L outputs, M rows.

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from dvi.model.native.library import Product

L = 16  # outputs side by side in a panel
BLOCK = 32  # inputs that share a scale in a quantised weight
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
