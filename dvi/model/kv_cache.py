"""Keys and values by row and position, preallocated, so that rejected tokens are forgotten by not counting them.

Knows rows, positions and lengths; knows nothing of tokens or layers' meaning. Two words: a row's *length* is the number
of committed positions; a *placement* says where the Q positions of one forward pass go. Writing past the length is
free and harmless: `commit` decides what survives, the rest is masked out and overwritten later. The nodes of a draft
tree lie side by side behind the length; `commit_paths` moves those that survive together.
"""
# B rows, Q query positions of one pass, S cached positions.

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dvi.model.transfers import overwrite, to_device
from dvi.model.tree import PlacedTree, Tree

KeysAndValues = dict[int, tuple[Tensor, Tensor]]  # by layer

VISIBLE_STEP = 256  # a GPU attends over whole multiples of this many slots: few shapes, so few captured graphs


@dataclass
class Placement:
    """Where one forward pass writes and what it may see. Shared by all layers of the pass.

    rows          the cache rows the pass runs over, B of them.
    positions_BQ  int64 absolute positions of the queries in the text.
    slots_BQ      int64 columns of the cache that they write: the same, but for a tree's nodes.
    visible       number of cache slots the pass attends over, from slot 0; a host number, so shapes stay on the host.
    slots         the written columns as a slice when every row writes the same ones, else None.
    tree          what the queries see of the draft tree whose nodes they are; None for a chain.
    """

    rows: slice
    positions_BQ: Tensor
    slots_BQ: Tensor
    visible: int
    slots: slice | None
    tree: PlacedTree | None = None
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def is_trivially_causal(self) -> bool:
        """True when one query sees exactly every visible slot, so that no mask is needed."""
        is_one_query = self.slots is not None and self.slots.stop - self.slots.start == 1
        return is_one_query and self.slots.stop == self.visible and self.tree is None

    def mask_B1QS(self, *, window: int | None = None, dtype: torch.dtype = torch.bool) -> Tensor:
        """What each query may attend to: slots at or before its own position, at most `window` of them; of a tree's
        nodes its ancestors alone.

        dtype bool: True = attend (SDPA). A float dtype: 0 or the dtype's lowest value, to be added (eager attention).
        """
        key = (window, dtype)
        if key not in self._masks:
            distance_BQS = self.positions_BQ[:, :, None] - self.key_position_BS()[:, None]
            mask = distance_BQS >= 0 if self.tree is None else self.tree.is_seen_BQS(self.visible)
            if window is not None:
                mask = mask & (distance_BQS < window)
            if dtype != torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            self._masks[key] = mask[:, None]
        return self._masks[key]

    def key_position_BS(self) -> Tensor:
        """The position in the text of what each visible slot holds, [B, S] or, where all rows agree, [1, S]."""
        if self.tree is None:
            return torch.arange(self.visible, device=self.positions_BQ.device)[None]
        return self.tree.position_BS(self.visible)


class RollbackCache:
    """Per-layer key/value buffers [rows, heads, S, head_dim], allocated at a layer's first write; they move only when
    `open_row` asks for a row or a length that they lack.

    lengths, lengths_B  committed positions per row, on the host and, as int64, on the device.
    """

    def __init__(self, *, rows: int, capacity: int, device: torch.device) -> None:
        self.rows = rows
        self.capacity = capacity
        self.device = device
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.epoch = 0  # counts moves of the buffers: what has remembered their addresses must forget them
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer: keys, values
        self._stacked: dict[int, Tensor] = {}  # layer: the same memory as one tensor [2, B, H, S, D]
        self.addresses: dict[range, object] = {}  # of runs of layers, what a path noted of them; forgotten at a move
        self._row_index_B1 = torch.arange(rows, device=device)[:, None]
        self._column_S = torch.arange(capacity, device=device)

    def place(
        self, *, offset: int, width: int, rows: slice | None = None, visible: int | None = None,
        tree: Tree | None = None,
    ) -> Placement:
        """The placement of `width` positions starting `offset` past the length of each row in `rows` (default: all).

        visible: slots to attend over; default is just enough for the furthest row. Fixed-shape callers (exact mode,
        CUDA graphs) pass their own. tree: of B rows; the positions are its nodes offset .. offset + width - 1, whose
        ancestors have been written or are among them. Raises ValueError when the furthest row would not fit.
        """
        rows = slice(0, self.rows) if rows is None else rows
        lengths = self.lengths[rows]
        end = max(lengths) + offset + width
        if end > self.capacity:
            raise ValueError(
                f"cache capacity must be at least {end} positions for this pass, got {self.capacity}; "
                "allocate prompt + max_new_tokens + num_draft_tokens + 1"
            )
        # A slice is a host fact: cheap on a CPU, but frozen into a captured CUDA graph, so only a CPU takes it.
        if self.device.type == "cpu" and len(set(lengths)) == 1:
            start = lengths[0] + offset
            slots = slice(start, start + width)
            slots_BQ = self._column_S[slots].expand(len(lengths), width)
        else:
            slots = None
            slots_BQ = self.lengths_B[rows, None] + self._column_S[offset : offset + width]
        if visible is None:
            visible = end if self.device.type == "cpu" else min(-(-end // VISIBLE_STEP) * VISIBLE_STEP, self.capacity)
        if tree is None:
            return Placement(rows, slots_BQ, slots_BQ, visible, slots)
        nodes, lengths_B = slice(offset, offset + width), self.lengths_B[rows]
        placed = PlacedTree(tree.depths_BN, tree.ancestors_BN[:, nodes], lengths_B)
        return Placement(rows, lengths_B[:, None] + tree.depths_BN[:, nodes], slots_BQ, visible, slots, placed)

    def buffers(self, layer: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All that a layer's keys and values are stored in, each [rows, H, capacity, d] and contiguous."""
        if layer not in self._buffers:
            like_BHQD = torch.empty(0, num_heads, 0, head_dim, dtype=dtype, device=self.device)
            self._allocate(layer, like_BHQD, like_BHQD)
        return self._buffers[layer]

    def write(self, layer: int, keys_BHQD: Tensor, values_BHQD: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """Stores the pass's keys and values; returns views [B, H, visible, D] of all the pass may attend to."""
        if layer not in self._buffers:
            self._allocate(layer, keys_BHQD, values_BHQD)
        keys, values = (buffer[placement.rows] for buffer in self._buffers[layer])
        if placement.slots is not None:
            keys[:, :, placement.slots] = keys_BHQD
            values[:, :, placement.slots] = values_BHQD
        else:
            # A layer of a model spread over devices need not sit where the token ids do.
            row_B1 = self._row_index_B1[: keys.shape[0]].to(keys.device)
            slots_BQ = placement.slots_BQ.to(keys.device)
            keys[row_B1, :, slots_BQ] = keys_BHQD.transpose(1, 2)
            values[row_B1, :, slots_BQ] = values_BHQD.transpose(1, 2)
        return keys[:, :, : placement.visible], values[:, :, : placement.visible]

    def write_stacked(self, layer: int, stacked_2HQD: Tensor, placement: Placement) -> Tensor:
        """`write` for one row at known slots, keys and values stacked: [2, H, visible, D] in four calls, not ten."""
        if layer not in self._buffers:
            self._allocate(layer, stacked_2HQD[:1], stacked_2HQD[1:])
        row_2HSD = self._stacked[layer][:, placement.rows.start]
        row_2HSD[:, :, placement.slots] = stacked_2HQD
        return row_2HSD[:, :, : placement.visible]

    def _allocate(self, layer: int, keys_BHQD: Tensor, values_BHQD: Tensor) -> None:
        # Zeros, not empty: masked slots are multiplied by probability 0, and 0 * NaN would be NaN.
        def zeros(like_BHQD: Tensor, *lead: int) -> Tensor:
            return like_BHQD.new_zeros(*lead, self.rows, like_BHQD.shape[1], self.capacity, like_BHQD.shape[3])

        if keys_BHQD.shape[1::2] == values_BHQD.shape[1::2]:
            self._stacked[layer] = zeros(keys_BHQD, 2)
            self._buffers[layer] = (self._stacked[layer][0], self._stacked[layer][1])
        else:  # latent attention: keys and values differ in size
            self._buffers[layer] = (zeros(keys_BHQD), zeros(values_BHQD))

    def commit(self, num_tokens: list[int], *, rows: slice | None = None) -> None:
        """Keeps the first num_tokens positions each row in `rows` wrote past its length, in every layer."""
        lengths = list(self.lengths)
        rows = slice(0, self.rows) if rows is None else rows
        lengths[rows] = [old + new for old, new in zip(lengths[rows], num_tokens, strict=True)]
        self.set_lengths(lengths)

    def commit_paths(self, paths: list[list[int]], *, rows: slice | None = None) -> None:
        """Keeps the nodes on one path of each row's tree, the root first, and moves them together in all layers."""
        rows = slice(0, self.rows) if rows is None else rows
        for row, path in zip(range(self.rows)[rows], paths, strict=True):
            if path == list(range(len(path))):
                continue  # they stand where they will stay
            start, stop = self.lengths[row], self.lengths[row] + len(path)
            slots = to_device([start + node for node in path], self.device)
            for buffer in itertools.chain.from_iterable(self._buffers.values()):
                buffer[row, :, start:stop] = buffer[row].index_select(1, slots.to(buffer.device))
        self.commit([len(path) for path in paths], rows=rows)

    def open_row(self, row: int, capacity: int) -> None:
        """Empties a row for a sequence of up to `capacity` positions; buffers grow (and move) only if they must."""
        if capacity > self.capacity or row >= self.rows:
            rows = self.rows if row < self.rows else max(row + 1, 2 * self.rows)
            self._grow(rows, self.capacity if capacity <= self.capacity else max(capacity, 2 * self.capacity))
        self.set_lengths([0 if index == row else length for index, length in enumerate(self.lengths)])

    def _grow(self, rows: int, capacity: int) -> None:
        old, self._buffers, self._stacked, self.addresses = self._buffers, {}, {}, {}
        used_rows, used, self.rows, self.capacity = self.rows, self.capacity, rows, capacity
        self.epoch += 1
        self.lengths = self.lengths + [0] * (rows - used_rows)
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._row_index_B1 = torch.arange(rows, device=self.device)[:, None]
        self._column_S = torch.arange(capacity, device=self.device)
        for layer, (keys, values) in old.items():
            self._allocate(layer, keys, values)
            for new, buffer in zip(self._buffers[layer], (keys, values), strict=True):
                new[:used_rows, :, :used] = buffer

    def copy_out(self, row: int, start: int, stop: int) -> KeysAndValues:
        """A copy of what a row holds at positions start..stop-1: keys and values, each [H, stop - start, d]."""
        return {
            layer: tuple(buffer[row, :, start:stop].clone() for buffer in both) for layer, both in self._buffers.items()
        }

    def copy_in(self, row: int, start: int, segment: KeysAndValues) -> None:
        """Writes what `copy_out` gave, of any cache of the same model, at the same positions; commits nothing."""
        for layer, both in segment.items():
            if layer not in self._buffers:
                self._allocate(layer, *(tensor_HQD[None] for tensor_HQD in both))
            for buffer, tensor_HQD in zip(self._buffers[layer], both, strict=True):
                buffer[row, :, start : start + tensor_HQD.shape[1]] = tensor_HQD

    def wipe_row(self, row: int) -> None:
        """Zeros all that a row holds: masked slots count nothing as long as they are finite, and NaN is not."""
        for buffer in itertools.chain.from_iterable(self._buffers.values()):
            buffer[row] = 0

    def swap_rows(self, one: int, other: int) -> None:
        """Exchanges two rows."""
        length = max(self.lengths[one], self.lengths[other])
        for buffer in itertools.chain.from_iterable(self._buffers.values()):
            kept = buffer[one, :, :length].clone()
            buffer[one, :, :length] = buffer[other, :, :length]
            buffer[other, :, :length] = kept
        lengths = list(self.lengths)
        lengths[one], lengths[other] = lengths[other], lengths[one]
        self.set_lengths(lengths)

    def copy_row(self, *, source: int, target: int) -> None:
        """Makes row `target` an exact copy of row `source`: keeps the running rows a dense prefix when one leaves."""
        length = self.lengths[source]
        for buffer in itertools.chain.from_iterable(self._buffers.values()):
            buffer[target, :, :length] = buffer[source, :, :length]
        self.set_lengths([length if row == target else old for row, old in enumerate(self.lengths)])

    def set_lengths(self, lengths: list[int]) -> None:
        """Declares each row's committed length: rollback, row reuse and prefill go through here."""
        assert len(lengths) == self.rows and min(lengths) >= 0 and max(lengths) <= self.capacity
        self.lengths = list(lengths)
        overwrite(self.lengths_B, lengths)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in itertools.chain.from_iterable(self._buffers.values()))
