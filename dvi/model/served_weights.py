"""Weights of a drafter as rounds read them: rewritten in place at every publish, in the layout the machine multiplies
fastest.

Knows products and layouts; knows nothing of drafts. Packed for the kernels of `dvi.model.native` where those are,
which read a bfloat16 head of 10,240 x 576 in .09 ms where one ordinary product takes .5 ms (see docs/benchmarks.md).
"""
# N outputs, K inputs, M rows; n some of the N. B rows, D hidden, H of the MLP, V draft vocabulary.

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from dvi.model.native.library import Drafter, load
from dvi.model.native.weights import PackedWeight, can_pack, multiply, pack


class PackedProduct:
    """x W^T + b by the kernels, float32 [M, N]."""

    def __init__(self, library: ctypes.CDLL, weight: PackedWeight) -> None:
        self.library, self.weight = library, weight

    def __deepcopy__(self, memo: dict) -> PackedProduct:  # the kernels' struct holds addresses
        return PackedProduct(self.library, self.weight.clone())

    def __call__(self, x_MK: Tensor) -> Tensor:
        return multiply(self.library, self.weight, x_MK.to(self.weight.dtype))

    def write(self, weight_nK: Tensor, *, start: int = 0) -> None:
        """From output `start` on, a multiple of 16; of any dtype."""
        self.weight.write(weight_nK, start=start)

    @property
    def buffer(self) -> Tensor:
        """All the memory that it takes, at one address for good."""
        return self.weight.buffer


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
        self.packed: PackedProduct | None = None  # a learner's copy never publishes and never pays for it

    def serve(self) -> None:
        """From now on `served` multiplies with the parameter as it stands."""
        if self.packed is not None:
            self.packed.write(self.weight.detach())
        elif (library := _library_for(self.weight, self._served_dtype)) is not None:
            self.packed = PackedProduct(library, pack(self.weight.detach().to(self._served_dtype)))

    def served(self, x_MK: Tensor, plus_MN: Tensor | None = None) -> Tensor:
        """x W^T, float32 [M, N], plus something."""
        if self.packed is not None:
            y_MN = self.packed(x_MK)
            return y_MN if plus_MN is None else y_MN.add_(plus_MN)
        return self(x_MK) if plus_MN is None else torch.addmm(plus_MN, x_MK, self.weight.t())


def anchored_logits(
    hidden_BD: Tensor, state_BH: Tensor, from_hidden: PackedProduct, to_hidden: PackedProduct, head: PackedProduct,
    gain_D: Tensor, eps: float,
) -> Tensor:
    """Logits [B, V] of an anchored drafter's step in one call of the kernels: see `AnchoredDrafter.step`."""
    num_rows, width = hidden_BD.shape
    dtype, inner = head.weight.dtype, state_BH.shape[1]
    inputs = torch.empty(num_rows, max(width, inner), dtype=dtype)
    scratch = torch.empty(num_rows, inner), torch.empty(num_rows, width)
    drafter = Drafter(
        from_hidden.weight.product, to_hidden.weight.product, head.weight.product, gain_D.data_ptr(), eps, num_rows,
        torch.get_num_threads(), inputs.data_ptr(), *(tensor.data_ptr() for tensor in scratch),
    )
    hidden_BD, state_BH = hidden_BD.to(dtype).contiguous(), state_BH.contiguous()
    logits_BV = torch.empty(num_rows, head.weight.shape[0])
    head.library.dvi_draft(ctypes.byref(drafter), hidden_BD.data_ptr(), state_BH.data_ptr(), logits_BV.data_ptr())
    return logits_BV


def _library_for(weight_NK: Tensor, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The kernels, where they multiply such a weight, stored in this dtype; else None."""
    return load() if can_pack(weight_NK, dtype or weight_NK.dtype) else None
