"""Weights of a drafter as rounds read them: rewritten in place at every publish, in the layout the machine multiplies
fastest.

Knows products and layouts; knows nothing of drafts. Packed for the kernels of `dvi.model.native` where those are,
which read a bfloat16 head of 10,240 x 576 in .09 ms where one ordinary product takes .5 ms (see docs/benchmarks.md).
"""
# N outputs, K inputs, M rows; n some of the N.

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from dvi.model.native.library import load
from dvi.model.native.weights import PackedWeight, can_pack, multiply, pack


class PackedProduct:
    """x W^T + b by the kernels, float32 [M, N]."""

    def __init__(self, library: ctypes.CDLL, weight: PackedWeight) -> None:
        self._library, self._weight = library, weight

    def __deepcopy__(self, memo: dict) -> PackedProduct:  # the kernels' struct holds addresses
        return PackedProduct(self._library, self._weight.clone())

    def __call__(self, x_MK: Tensor) -> Tensor:
        return multiply(self._library, self._weight, x_MK.to(self._weight.dtype))

    def write(self, weight_nK: Tensor, *, start: int = 0) -> None:
        """From output `start` on, a multiple of 16; of any dtype."""
        self._weight.write(weight_nK, start=start)

    @property
    def buffer(self) -> Tensor:
        """All the memory that it takes, at one address for good."""
        return self._weight.buffer


class TransposedProduct:
    """x W^T + b by the library's own product, in the weight's dtype, on any device."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.buffer = torch.empty_like(weight_NK.t(), memory_format=torch.contiguous_format)
        self._bias_N = bias_N

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_MK = x_MK.to(self.buffer.dtype)
        return torch.mm(x_MK, self.buffer) if self._bias_N is None else torch.addmm(self._bias_N, x_MK, self.buffer)

    def write(self, weight_nK: Tensor, *, start: int = 0) -> None:
        """From output `start` on; of any dtype."""
        self.buffer[:, start : start + len(weight_nK)] = weight_nK.t()


def served_product(weight_NK: Tensor, bias_N: Tensor | None) -> PackedProduct | TransposedProduct:
    """Memory for a weight of this shape, dtype and device; what it multiplies with is what is written to it."""
    library = _library_for(weight_NK)
    if library is None:
        return TransposedProduct(weight_NK, bias_N)
    return PackedProduct(library, pack(weight_NK, bias_N))


class ServedLinear(nn.Linear):
    """A float32 linear layer without bias, for learning, with a second face for rounds.

    served_dtype: in which `serve` packs the weight; without kernels rounds read the parameter itself.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, served_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_inputs, num_outputs, bias=False, device=device)
        self._served_dtype = served_dtype
        self._packed: PackedProduct | None = None  # a learner's copy never publishes and never pays for it

    def serve(self) -> None:
        """From now on `served` multiplies with the parameter as it stands."""
        if self._packed is not None:
            self._packed.write(self.weight.detach())
        elif (library := _library_for(self.weight, self._served_dtype)) is not None:
            self._packed = PackedProduct(library, pack(self.weight.detach().to(self._served_dtype)))

    def served(self, x_MK: Tensor, plus_MN: Tensor | None = None) -> Tensor:
        """x W^T, float32 [M, N], plus something."""
        if self._packed is not None:
            y_MN = self._packed(x_MK)
            return y_MN if plus_MN is None else y_MN.add_(plus_MN)
        return self(x_MK) if plus_MN is None else torch.addmm(plus_MN, x_MK, self.weight.t())


def _library_for(weight_NK: Tensor, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The kernels, where they multiply such a weight, stored in this dtype; else None."""
    return load() if can_pack(weight_NK, dtype or weight_NK.dtype) else None
