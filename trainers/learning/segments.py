"""Segments: the memory of a replay, as slots of consecutive positions in a ring and a reservoir, and who owns each.

Knows rows, requests and tenants by number; knows nothing of drafts, rewards or blocks. Memory is taken once; what it
costs to fill rows does not depend on how much is stored.

A segment is a slot of `segment_len` consecutive committed positions of one request. New segments fill the ring, so the
newest are always there; a segment that the ring evicts is offered to the reservoir, which keeps a uniform sample of
everything evicted (algorithm R, Vitter 1985), against forgetting.
"""
# R rows: all stored positions, N of them.

from __future__ import annotations

import torch
from torch import Tensor

from dvi.model.transfers import to_device
from dvi.records import Transitions
from dvi.tenancy import TenantSlots, tenant_id

# What is known of a row besides its states, one column each of an int64 table: few tensors make few kernel launches.
FACTS = TOKEN, POSITION, ACTION, DEPTH, REWARD, VERSION = range(6)
# What a row can be to a block, best last. One byte a row, since sampling probes many rows: it must stay in the cache.
EMPTY, UNANCHORED, ANCHORED, ROUND_START = range(4)


class Segments:
    """Slots 0..num_ring-1 are the ring, the others the reservoir.

    fields          of every row: hidden, target_hidden, log_prob, facts (FACTS) and kind (EMPTY to ROUND_START).
    starts, lengths, owners, tenants   of every slot: its first position, how many rows are filled, whose they are.
    by_tenant       the slots that hold a position a block can start at.
    ring_used, reservoir_used   slots ever filled.      num_positions   stored.
    num_refused     rows that whoever fills it did not let in.
    Raises ValueError when the sizes cannot work, saying what would.
    """

    def __init__(
        self, *, capacity_positions: int, hidden_size: int, dtype: torch.dtype, device: torch.device,
        reservoir_fraction: float, segment_len: int, max_bytes: int | None = None, seed: int = 0,
    ) -> None:
        if not 0 <= reservoir_fraction < 1:
            raise ValueError(f"reservoir_fraction must be in [0, 1), got {reservoir_fraction}; 0.3 is the default")
        num_segments = capacity_positions // segment_len
        if num_segments < 1:
            raise ValueError(f"capacity_positions must hold a segment of {segment_len}, got {capacity_positions}")
        self.num_reservoir = int(num_segments * reservoir_fraction)
        self.num_ring = num_segments - self.num_reservoir
        self.segment_len, self.reservoir_fraction = segment_len, reservoir_fraction
        self.dtype, self.device = dtype, device
        layout = {
            "hidden": ((hidden_size,), dtype),
            "target_hidden": ((hidden_size,), dtype),
            "log_prob": ((), torch.float32),
            "facts": ((len(FACTS),), torch.int64),
            "kind": ((), torch.int8),
        }
        bytes_per_segment = segment_len * sum(
            torch.Size(shape).numel() * field_dtype.itemsize for shape, field_dtype in layout.values()
        )
        if max_bytes is not None and num_segments * bytes_per_segment > max_bytes:
            raise ValueError(
                f"capacity_positions {capacity_positions} takes {num_segments * bytes_per_segment} bytes, over "
                f"max_bytes {max_bytes}; {max_bytes // bytes_per_segment * segment_len} positions would fit"
            )
        num_rows = num_segments * segment_len
        self.fields = {
            name: torch.zeros(num_rows, *shape, dtype=field_dtype, device=device)
            for name, (shape, field_dtype) in layout.items()
        }

        # The bookkeeping stays on the host: no syncs.
        self.starts = [0] * num_segments
        self.lengths = [0] * num_segments
        self.owners = [-1] * num_segments
        self.tenants = [0] * num_segments
        self.by_tenant = TenantSlots()
        self._open: dict[int, int] = {}
        # Rows that `place` has given out and not filled yet, and which of its columns go there.
        self._unwritten_rows: list[int] = []
        self._unwritten_columns: list[int] = []
        self._unwritten_slots: set[int] = set()
        self._cursor = 0
        self.ring_used = 0
        self.reservoir_used = 0
        self._num_evicted = 0
        self.num_positions = 0
        self.num_refused = 0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.lengths) * self.segment_len

    @property
    def num_bytes(self) -> int:
        """Memory taken, full or empty."""
        return sum(field.numel() * field.element_size() for field in self.fields.values())

    def rows(self, slot: int) -> slice:
        return slice(slot * self.segment_len, (slot + 1) * self.segment_len)

    # Writing

    def place(self, stretch: Transitions, columns: dict[str, Tensor], offset: int, first: int, end: int) -> None:
        """Finds rows for the stretch's columns first..end-1, in as many segments as it takes; `write` fills them.

        columns: of the fields, for all stretches of the call. offset: of this one's first there.
        """
        tenant = tenant_id(stretch.tenant)
        while first < end:
            position = stretch.start_position + first
            slot = self._slot_for(stretch.request_id, tenant, position, columns)
            length = self.lengths[slot]
            take = min(self.segment_len - length, end - first)
            row = slot * self.segment_len + length
            self._unwritten_rows += range(row, row + take)
            self._unwritten_columns += range(offset + first, offset + first + take)
            self._unwritten_slots.add(slot)
            if length == 0 and position > 0:
                # The position before is in another segment. A sequence's own first position has none: it needs none.
                columns["kind"][offset + first] = UNANCHORED
            self.lengths[slot] += take
            self.num_positions += take
            first += take
            if self.num_starts(slot) and slot not in self.by_tenant:
                self.by_tenant.add(slot, tenant)

    def write(self, columns: dict[str, Tensor]) -> None:
        """Fills the rows found since the last write."""
        places = self._unwritten_rows, self._unwritten_columns
        rows_N, columns_N = to_device(places, self.device, dtype=torch.int64)
        for name, field in self.fields.items():
            field[rows_N] = columns[name][columns_N].to(field.dtype)
        self._unwritten_rows, self._unwritten_columns = [], []
        self._unwritten_slots = set()

    def _slot_for(self, request_id: int, tenant: int, position: int, columns: dict[str, Tensor]) -> int:
        """The request's open segment if it has room and ends just before this position, else a new one."""
        slot = self._open.get(request_id)
        # Of the same tenant: after a restart another request may come under this number.
        if slot is not None and self.tenants[slot] == tenant:
            length = self.lengths[slot]
            if length < self.segment_len and position == self.starts[slot] + length:
                return slot
        if self._cursor in self._unwritten_slots:
            self.write(columns)
        slot = self._next_slot()
        self.starts[slot] = position
        self.owners[slot] = request_id
        self.tenants[slot] = tenant
        self._open[request_id] = slot
        return slot

    def _next_slot(self) -> int:
        """The ring slot whose turn it is, emptied."""
        slot = self._cursor
        self._cursor = (slot + 1) % self.num_ring
        self.ring_used = max(self.ring_used, slot + 1)
        if self.lengths[slot]:
            self._evict(slot)
        return slot

    def _evict(self, slot: int) -> None:
        """Empties a ring slot; its segment takes a place in the reservoir with odds places / segments ever evicted."""
        self._close(slot)
        self._num_evicted += 1
        if self.reservoir_used < self.num_reservoir:
            place = self.reservoir_used
            self.reservoir_used += 1
        else:
            place = int(torch.randint(self._num_evicted, (), generator=self._generator, device="cpu"))
        if place < self.num_reservoir:
            self._copy_segment(self, slot, self.num_ring + place)
        self._clear(slot)

    def _close(self, slot: int) -> None:
        """A request that still writes here must not write into the next owner's segment."""
        if self._open.get(self.owners[slot]) == slot:
            del self._open[self.owners[slot]]

    def _copy_segment(self, origin: Segments, source: int, target: int) -> None:
        """origin: the store that holds `source`, this one or another of the same sizes."""
        self._clear(target)
        for name, field in self.fields.items():
            field[self.rows(target)] = origin.fields[name][self.rows(source)]
        for book in ("starts", "lengths", "owners", "tenants"):
            getattr(self, book)[target] = getattr(origin, book)[source]
        if source in origin.by_tenant:
            self.by_tenant.add(target, self.tenants[target])
        self.num_positions += self.lengths[target]

    def _clear(self, slot: int) -> None:
        self.num_positions -= self.lengths[slot]
        self.lengths[slot] = 0
        self.owners[slot] = -1
        self.tenants[slot] = 0
        self.by_tenant.discard(slot)
        self.fields["kind"][self.rows(slot)] = EMPTY

    def num_starts(self, slot: int) -> int:
        """Positions of the segment that a block can start at: all but a first one whose predecessor is elsewhere."""
        return self.lengths[slot] - self.num_unanchored(slot)

    def num_unanchored(self, slot: int) -> int:
        return int(self.starts[slot] > 0)

    # Dropping

    def end(self, request_id: int) -> None:
        """The request's segment goes on no more; unknown requests are ignored."""
        self._open.pop(request_id, None)

    @torch.no_grad()
    def drop(self, slots: list[int]) -> None:
        """Empties these slots, and wipes all rows that hold nothing: evicted segments have left remnants there too."""
        # Backwards, so that the reservoir's last segment, which fills the gap, has already been looked at.
        for slot in reversed(slots):
            if not self.lengths[slot]:
                continue
            self._close(slot)
            if slot >= self.num_ring:
                last = self.num_ring + self.reservoir_used - 1
                self.reservoir_used -= 1
                if slot != last:
                    self._copy_segment(self, last, slot)
                    slot = last
            self._clear(slot)
        is_empty_R = self.fields["kind"] == EMPTY
        for field in self.fields.values():
            field.masked_fill_(is_empty_R.view(-1, *[1] * (field.dim() - 1)), 0)

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as a flat dict of tensors fit for safetensors; the fields are the live memory."""
        return {
            **self.fields,
            "sizes": torch.tensor(self._sizes),
            "starts": torch.tensor(self.starts),
            "lengths": torch.tensor(self.lengths),
            "owners": torch.tensor(self.owners),
            "tenants": torch.tensor(self.tenants),
            "by_tenant": torch.tensor(list(self.by_tenant.in_order()), dtype=torch.int64).reshape(-1, 2),
            "open": torch.tensor(list(self._open.items()), dtype=torch.int64).reshape(-1, 2),
            "counters": torch.tensor([getattr(self, name) for name in _COUNTERS]),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores bit for bit what state_dict gave. Raises ValueError when it came from a buffer of other sizes."""
        saved, mine = (state["sizes"].tolist(), state["hidden"].dtype), (self._sizes, self.dtype)
        if saved != mine:
            raise ValueError(
                "[segment_len, ring segments, reservoir segments, hidden_size] and dtype must be "
                f"{saved[0]}, {saved[1]} to take this replay state, got {mine[0]}, {mine[1]}; "
                "build the buffer as the saved one was"
            )
        for name, field in self.fields.items():
            field.copy_(state[name])
        self.starts = state["starts"].tolist()
        self.lengths = state["lengths"].tolist()
        self.owners = state["owners"].tolist()
        self.tenants = state["tenants"].tolist()
        self.by_tenant = TenantSlots()
        for slot, tenant in state["by_tenant"].tolist():
            self.by_tenant.add(slot, tenant)
        self._open = dict(state["open"].tolist())
        for name, value in zip(_COUNTERS, state["counters"].tolist(), strict=True):
            setattr(self, name, value)
        self._generator.set_state(state["generator"].cpu())

    def adopt(self, state: dict[str, Tensor], *, part: int = 0, num_parts: int = 1) -> None:
        """Takes every num_parts-th segment, from the part-th on, of what state_dict of another buffer gave.

        They come in as new segments do, and none of them goes on. Raises ValueError for a buffer of other sizes.
        """
        saved = Segments(
            capacity_positions=self.capacity, hidden_size=self.fields["hidden"].shape[1], dtype=self.dtype,
            device=self.device, reservoir_fraction=self.reservoir_fraction, segment_len=self.segment_len,
        )
        saved.load_state_dict(state)
        for source in [slot for slot, length in enumerate(saved.lengths) if length][part::num_parts]:
            target = self._next_slot()
            self._copy_segment(saved, source, target)
            self.owners[target] = -1  # its request may have a number that another one has here

    @property
    def _sizes(self) -> list[int]:
        return [self.segment_len, self.num_ring, self.num_reservoir, self.fields["hidden"].shape[1]]


# In a saved state by place: append, never reorder.
_COUNTERS = ("_cursor", "ring_used", "reservoir_used", "_num_evicted", "num_positions", "num_refused")
