"""Weights as GGUF files hold them quantised: rows of blocks, 32 inputs that share a scale.

Knows the bytes of Q4_0, Q4_1 and Q8_0; knows nothing of files, names or how products are computed.
"""
# N outputs, B blocks of a row, I the 32 inputs of a block.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # inputs that share a scale
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of a block: float16 scale, in Q4_1 float16 low, values
ZERO = 8  # what Q4_0's values, 0..15, are counted from


@dataclass(frozen=True)
class Blocks:
    """One weight [N, 32 B], as it lies in the file. bytes_NBb: uint8; kind: of BYTES."""

    bytes_NBb: Tensor
    kind: str

    @property
    def is_4_bit(self) -> bool:
        return self.kind != "Q8_0"

    @property
    def scale_NB(self) -> Tensor:
        """float16."""
        return self._float16(0)

    @property
    def low_NB(self) -> Tensor:
        """float16, what a 4-bit value of 0 means. Of Q4_0 -8 scales: exact, or infinite where a scale is above 8188."""
        return self._float16(2) if self.kind == "Q4_1" else self.scale_NB * -ZERO

    @property
    def values_NBI(self) -> Tensor:
        """int8: 0..15 of 4 bits, which a block's `low_NB` is added to, or -128..127."""
        if not self.is_4_bit:
            return self.bytes_NBb[..., 2:].view(torch.int8)
        pairs_NBh = self.bytes_NBb[..., -BLOCK // 2 :]
        return torch.cat([pairs_NBh & 15, pairs_NBh >> 4], dim=-1).view(torch.int8)

    def reordered(self, rows_N: Tensor) -> Blocks:
        """With the rows in another order: whole rows, so nothing is quantised anew."""
        return Blocks(self.bytes_NBb[rows_N], self.kind)

    def dequantised(self) -> Tensor:
        """[N, K] float32."""
        weight_NBI = self.scale_NB.float()[..., None] * self.values_NBI
        if self.is_4_bit:
            weight_NBI += self.low_NB.float()[..., None]
        return weight_NBI.flatten(1)

    def _float16(self, start: int) -> Tensor:
        return self.bytes_NBb[..., start : start + 2].contiguous().view(torch.float16)[..., 0]
