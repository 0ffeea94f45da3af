"""Which positions of a ragged round are computed: only those that count, side by side, row after row.

Knows how many positions each row verifies; knows nothing of models or drafts. Projections, norms and the output head
then cost what M positions cost; attention alone wants the rectangle back.
"""
# B rows, U verified positions, N = B * U places of the rectangle, M <= N positions that count.

from __future__ import annotations

import torch
from torch import Tensor

# To pack and unpack costs 2 to 5 % of a rectangle's pass. 0.85: there a packed pass took 0.91 (32 rows) to 1.01 (2 to
# 4 rows) of the rectangle's time, T = 4 and 8, one thread of an AVX2 server, float32, the bundled model; half of the
# positions took 0.80 to 0.86 with 4 rows, 0.71 to 0.78 with 8, 0.66 to 0.71 with 16 and 0.63 to 0.68 with 32.
MAX_PACKED_SHARE = 0.85


def is_worth_packing(num_positions: int, num_places: int) -> bool:
    """Whether M = num_positions of a rectangle's N places cost less side by side than the rectangle."""
    return num_positions <= MAX_PACKED_SHARE * num_places


class Packing:
    """The first num_positions_B[b] places of every row b, and the way back.

    kept_M    int64: their places in the rectangle, ascending.
    source_N  int64: which of the M stands at each place. A place that does not count repeats its own row's last one
              that does: never another row's, whose NaN would go round the batch through masked slots of the cache.
    """

    def __init__(self, num_positions_B: Tensor, *, width: int) -> None:
        """num_positions_B: int64, 1..width each. width: U. Waits for the device where that is not a CPU."""
        count_B1 = num_positions_B[:, None]
        column_U = torch.arange(width, device=count_B1.device)
        self.kept_M = (column_U < count_B1).flatten().nonzero()[:, 0]
        first_B1 = count_B1.cumsum(0) - count_B1
        self.source_N = (first_B1 + torch.minimum(column_U, count_B1 - 1)).flatten()
        self._width = width

    def pack(self, x_BUD: Tensor) -> Tensor:
        """[B, U, D] -> [M, D]."""
        return x_BUD.flatten(0, 1).index_select(0, self.kept_M)

    def unpack(self, x_MD: Tensor) -> Tensor:
        """[M, D] -> [B, U, D]; what was not computed repeats its row's last position that was."""
        return x_MD.index_select(0, self.source_N).view(-1, self._width, x_MD.shape[-1])
