"""Exact passes where bits depend on shapes: every pass has one shape, whatever the batch and the draft length.

With the libraries' products a row's result differs between 1 row, 5 rows and 16 (other kernels, other orders of
summation). Here each row of the batch runs alone, every pass is padded to one width, prefill included, and attends over
the row's whole cache. A position then meets the same arithmetic whether it was prefilled, decoded plainly or verified
in a draft block; only its index within the pass varies, and `PaddedSplit.self_check` verifies that it changes nothing.
"""
# B rows, Q real query positions of a pass, D hidden.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dvi.model.kv_cache import KeysAndValues, Placement, RollbackCache
from dvi.model.split import SplitModel
from dvi.model.transfers import to_device
from dvi.progress import shown_as

CAPACITY_STEP = 64
# 12: room for the longest draft of every policy and the token after it, and up to a multiple of 4. With 9 rows some
# float64 matrix products on CPUs treat the last row differently from the others, and the self-check refuses.
PADDED_WIDTH = 12
PADDED_DTYPES = (torch.float32, torch.float64)  # on CPUs


class RowCaches:
    """The part of `RollbackCache` that decoding uses, with one cache per row.

    capacity: of every row; 0 lets it follow from each request. Keys and values may pass from one row to another only
    where all rows have one capacity: it is part of each pass's shape.
    """

    def __init__(self, *, rows: int, capacity: int, width: int, device: torch.device) -> None:
        self.rows = rows
        self._capacity = capacity
        self.lengths = [0] * rows
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._width = width
        self._device = device
        self._caches: list[RollbackCache | None] = [None] * rows

    def __getitem__(self, row: int) -> RollbackCache:
        return self._caches[row]

    def open_row(self, row: int, capacity: int) -> None:
        """A fresh cache whose capacity follows from the request alone, never from its batch mates.

        Raises ValueError when all rows share a capacity and the request needs more.
        """
        if 0 < self._capacity < capacity:
            raise ValueError(f"a row must need at most {self._capacity} positions here, got {capacity}; ask for less")
        capacity = -(-((self._capacity or capacity) + 2 * self._width) // CAPACITY_STEP) * CAPACITY_STEP
        if row >= self.rows:
            self._caches += [None] * (row + 1 - self.rows)
            self.rows = row + 1
            self.lengths_B = torch.zeros(self.rows, dtype=torch.int64, device=self._device)
        self._caches[row] = RollbackCache(rows=1, capacity=capacity, device=self._device)
        self._refresh()

    def place(self, *, offset: int, width: int, rows: slice) -> list[tuple[RollbackCache, Placement]]:
        """One fixed-shape placement per row; `width` only says how many of its positions are real."""
        assert width <= self._width
        return [(c, c.place(offset=offset, width=self._width, visible=c.capacity)) for c in self._caches[rows]]

    def commit(self, num_tokens: list[int], *, rows: slice) -> None:
        for cache, count in zip(self._caches[rows], num_tokens, strict=True):
            cache.commit([count])
        self._refresh()

    def copy_row(self, *, source: int, target: int) -> None:
        self._caches[target], self._caches[source] = self._caches[source], None
        self._refresh()

    def swap_rows(self, one: int, other: int) -> None:
        self._caches[one], self._caches[other] = self._caches[other], self._caches[one]
        self._refresh()

    def wipe_row(self, row: int) -> None:
        self._caches[row] = None  # `open_row` makes a fresh one
        self._refresh()

    def copy_out(self, row: int, start: int, stop: int) -> KeysAndValues:
        return self._caches[row].copy_out(0, start, stop)

    def copy_in(self, row: int, start: int, segment: KeysAndValues) -> None:
        self._caches[row].copy_in(0, start, segment)

    def _refresh(self) -> None:
        self.lengths = [0 if cache is None else cache.lengths[0] for cache in self._caches]
        self.lengths_B.copy_(to_device(self.lengths, self._device, dtype=torch.int64))


class PaddedSplit:
    """A `SplitModel` whose passes are padded to `fixed_width` positions and run row by row.

    Raises ValueError for half precision on a CPU, and when the self-check finds that a result depends on its index in
    the pass. On GPUs it has not been tried: there the self-check alone decides.
    """

    can_tree = False
    can_pack = False  # a pass of fewer positions has another shape, and other bits
    path = "padded"  # none that CUDA graphs know: the caches of its rows come and go

    def __init__(self, split: SplitModel, *, width: int = PADDED_WIDTH) -> None:
        if split.device.type == "cpu" and split.dtype not in PADDED_DTYPES:
            raise ValueError(f"passes are padded in float32 or float64, got {split.dtype}; use mode=fast")
        self._split = split
        self.fixed_width = width
        self.self_check()

    def __getattr__(self, name: str) -> object:
        return getattr(self._split, name)

    def make_cache(self, rows: int, capacity: int) -> RowCaches:
        return RowCaches(rows=rows, capacity=capacity, width=self.fixed_width, device=self._split.device)

    def shallow(
        self, token_ids_BQ: Tensor, cache: RowCaches, placement: list[tuple[RollbackCache, Placement]]
    ) -> Tensor:
        outputs = [
            self._split.shallow(self._pad(ids_1Q), *row_placement)
            for ids_1Q, row_placement in zip(token_ids_BQ.split(1), placement, strict=True)
        ]
        return torch.cat(outputs)[:, : token_ids_BQ.shape[1]]

    def deep(
        self, hidden_BQD: Tensor, token_ids_BQ: Tensor, cache: RowCaches,
        placement: list[tuple[RollbackCache, Placement]],
    ) -> Tensor:
        rows = zip(hidden_BQD.split(1), token_ids_BQ.split(1), placement, strict=True)
        outputs = [self._split.deep(self._pad(hidden), self._pad(ids), *place) for hidden, ids, place in rows]
        return torch.cat(outputs)[:, : token_ids_BQ.shape[1]]

    def head(self, final_hidden_BQD: Tensor) -> Tensor:
        outputs = [self._split.head(self._pad(hidden_1QD)) for hidden_1QD in final_hidden_BQD.split(1)]
        return torch.cat(outputs)[:, : final_hidden_BQD.shape[1]]

    def _pad(self, x_1Q: Tensor) -> Tensor:
        """Zeros (or token 0) up to the fixed width; what they write lies past the committed length."""
        missing = self.fixed_width - x_1Q.shape[1]
        return F.pad(x_1Q, (0, missing)) if x_1Q.dim() == 2 else F.pad(x_1Q, (0, 0, 0, missing))

    @torch.no_grad()
    @shown_as("checking exact mode on this machine")
    def self_check(self) -> None:
        """Computes one position at every index of a pass and compares all bits: h_k, h_L and logits."""
        width, generator = self.fixed_width, torch.Generator().manual_seed(0)
        length = 2 * width
        ids_1S = torch.randint(self._split.vocab_size, (1, length + width), generator=generator).to(self._split.device)
        cache = self.make_cache(1, 0)
        cache.open_row(0, length + width)
        rows = slice(0, 1)

        def run(start: int) -> tuple[Tensor, Tensor, Tensor]:
            cache[0].set_lengths([start])
            ids_1Q = ids_1S[:, start : start + width]
            place = cache.place(offset=0, width=width, rows=rows)
            hidden = self.shallow(ids_1Q, cache, place)
            final = self.deep(hidden, ids_1Q, cache, place)
            return hidden, final, self.head(final)

        for start in range(0, length, width):
            run(start)
        reference = [x[0, 0] for x in run(length)]
        for index in range(1, width):
            found = [x[0, index] for x in run(length - index)]
            for name, a, b in zip(("h_k", "h_L", "logits"), reference, found, strict=True):
                if not torch.equal(a, b):
                    raise ValueError(
                        f"exact mode is not possible for {self._split.dtype} on this machine: {name} of a position "
                        f"differs by {(a - b).abs().max():.1e} between index 0 and {index} of a {width}-row pass; "
                        "use mode=fast, or another dtype or width"
                    )
