"""Replay: committed stretches of hidden states with the verdicts they earned, and training blocks drawn from them.

Knows positions, rounds and requests; knows nothing of losses, models or text. Memory is taken once; what `add` and
`sample` cost does not depend on how much is stored.

The unit is the *segment*: a slot of `segment_len` consecutive committed positions of one request. New segments fill a
ring, so the newest are always there; a segment that the ring evicts is offered to a reservoir, which keeps a uniform
sample of everything evicted (algorithm R, Vitter 1985), against forgetting.
"""
# N blocks, T positions of a block, W positions of a transition, D hidden size, P probes, R rows: all stored positions.

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from dvi.records import ReplayBatch, Transitions
from dvi.settings import LearningSettings
from dvi.tenancy import TenantSlots, tenant_id

# What is known of a row besides its states, one column each of an int64 table: few tensors make few kernel launches.
FACTS = TOKEN, POSITION, ACTION, DEPTH, REWARD, VERSION = range(6)
NOT_DRAFTED = -1  # the depth of a position without a draft
# What a row can be to a block, best last. One byte a row, since sampling probes many rows: it must stay in the cache.
EMPTY, UNANCHORED, ANCHORED, ROUND_START = range(4)
# Places tried for each block. A block that only a share s of all places can start is missed with odds (1 - s)^32:
# 1 in 100 000 where s = 0.3 (round starts in generated text), 1 in 10 where s = 0.07 (among long prompts).
NUM_PROBES = 32


class ReplayBuffer:
    """A bounded store of Transitions, from which blocks are drawn as a drafter would have met them.

    capacity_positions    bound on the stored positions; rounded down to whole segments.
    hidden_size           D.
    max_block             the longest block that will be asked for: T.
    dtype, device         of the stored hidden states. States that overflow the dtype are refused.
    reservoir_fraction    share of the capacity, and of every sample, that belongs to the reservoir; in [0, 1).
    segment_len           a block never crosses a segment's end, so T / (2 segment_len) of all positions are cut off.
    max_bytes             optional bound on the memory taken.
    seed                  of the reservoir's own draws.

    num_refused           rows refused so far because they were not finite.
    `len()` is the number of stored positions. Raises ValueError when the sizes cannot work, saying what would.
    """

    def __init__(
        self,
        *,
        capacity_positions: int,
        hidden_size: int,
        max_block: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reservoir_fraction: float = LearningSettings.reservoir_fraction,
        segment_len: int = 32,
        max_bytes: int | None = None,
        seed: int = LearningSettings.seed,
    ) -> None:
        if not 0 <= reservoir_fraction < 1:
            default = LearningSettings.reservoir_fraction
            raise ValueError(
                f"reservoir_fraction must be in [0, 1), got {reservoir_fraction}; {default} is the default"
            )
        if not 1 <= max_block < segment_len:
            raise ValueError(
                f"max_block must be in 1..{segment_len - 1} for segment_len {segment_len}, got {max_block}; "
                f"segment_len {8 * max_block} would do"
            )
        num_segments = capacity_positions // segment_len
        if num_segments < 1:
            raise ValueError(f"capacity_positions must hold a segment of {segment_len}, got {capacity_positions}")
        self._num_reservoir = int(num_segments * reservoir_fraction)
        self._num_ring = num_segments - self._num_reservoir
        self.reservoir_fraction = reservoir_fraction
        self.segment_len = segment_len
        self.max_block = max_block
        self.device = torch.device(device)
        self.dtype = dtype
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
        self._fields = {
            name: torch.zeros(num_rows, *shape, dtype=field_dtype, device=self.device)
            for name, (shape, field_dtype) in layout.items()
        }

        # Slots 0..num_ring-1 are the ring, the others the reservoir. The bookkeeping stays on the host: no syncs.
        self._starts = [0] * num_segments
        self._lengths = [0] * num_segments
        self._owners = [-1] * num_segments
        self._tenants = [0] * num_segments
        self._by_tenant = TenantSlots()  # the segments that hold a position a block can start at
        self._open: dict[int, int] = {}
        # Rows that a call of `add` has given out and not filled yet, and which of its columns go there.
        self._unwritten_rows: list[int] = []
        self._unwritten_columns: list[int] = []
        self._unwritten_slots: set[int] = set()
        self._cursor = 0
        self._ring_used = 0
        self._reservoir_used = 0
        self._num_evicted = 0
        self._num_positions = 0
        self.num_refused = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __repr__(self) -> str:
        return f"ReplayBuffer({len(self):,} of {self.capacity:,} positions)"

    def __len__(self) -> int:
        return self._num_positions

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self._lengths) * self.segment_len

    @property
    def num_tenants(self) -> int:
        """Tenants with experience to draw from."""
        return len(self._by_tenant)

    @property
    def num_bytes(self) -> int:
        """Memory taken, full or empty."""
        return sum(field.numel() * field.element_size() for field in self._fields.values())

    # Writing

    @torch.no_grad()
    def add(self, *transitions: Transitions) -> None:
        """Appends each stretch to its request's open segment, or to a new one where it does not continue it.

        Rows whose hidden states or log-probability are not finite are refused: counted, never stored; what follows
        them starts a new segment. A dishonest stretch is kept without its drafts, so that it can never be a reward.
        One device sync a call, and a cost that is mostly the call's own: pass many stretches together.
        """
        transitions = [stretch for stretch in transitions if len(stretch)]
        if not transitions:
            return
        columns = self._columns(transitions)
        # The call's one device sync.
        is_finite = columns["checksum"].isfinite().tolist()
        offset = 0
        for stretch in transitions:
            first = 0
            for is_kept, run in groupby(is_finite[offset : offset + len(stretch)]):
                end = first + sum(1 for _ in run)
                if is_kept:
                    self._place(stretch, columns, offset, first, end)
                else:
                    self.num_refused += end - first
                first = end
            offset += len(stretch)
        self._write(columns)

    def end(self, request_id: int) -> None:
        """Closes the request's open segment; unknown requests are ignored. What it holds stays."""
        self._open.pop(request_id, None)

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drops every segment of these requests and wipes its memory. Takes time in the positions held."""
        forgotten = set(request_ids)
        self._drop([slot for slot, owner in enumerate(self._owners) if owner in forgotten])

    def forget_tenant(self, tenant: str) -> int:
        """Drops every segment of this tenant and wipes its memory; returns the number of positions dropped."""
        num_before, forgotten = len(self), tenant_id(tenant)
        self._drop([slot for slot, owner in enumerate(self._tenants) if owner == forgotten])
        return num_before - len(self)

    @torch.no_grad()
    def _drop(self, slots: list[int]) -> None:
        """Empties these slots, and wipes all rows that hold nothing: evicted segments have left remnants there too."""
        # Backwards, so that the reservoir's last segment, which fills the gap, has already been looked at.
        for slot in reversed(slots):
            if not self._lengths[slot]:
                continue
            self._close(slot)
            if slot >= self._num_ring:
                last = self._num_ring + self._reservoir_used - 1
                self._reservoir_used -= 1
                if slot != last:
                    self._copy_segment(self, last, slot)
                    slot = last
            self._clear(slot)
        is_empty_R = self._fields["kind"] == EMPTY
        for field in self._fields.values():
            field[is_empty_R] = 0

    def _columns(self, transitions: list[Transitions]) -> dict[str, Tensor]:
        """All stretches' positions one after the other, as the fields hold them, and a number for each that is finite
        only if all of the position is."""
        hidden_ND, target_hidden_ND = (
            torch.cat([getattr(stretch, name) for stretch in transitions]).to(self.dtype)
            for name in ("hidden_WD", "target_hidden_WD")
        )
        log_prob_N = torch.cat([stretch.draft_log_probs_W for stretch in transitions])
        host: list[tuple[int, int, int, int]] = []
        for stretch in transitions:
            num_drafted = stretch.num_drafted if stretch.is_honest else 0
            host += [
                (
                    stretch.start_position + column, column if column < num_drafted else NOT_DRAFTED,
                    int(column < stretch.num_accepted), stretch.drafter_version,
                )
                for column in range(len(stretch))
            ]  # fmt: skip
        position_N, depth_N, reward_N, version_N = torch.tensor(host, device=self.device).unbind(1)
        facts = {
            TOKEN: torch.cat([stretch.token_ids_W for stretch in transitions]), POSITION: position_N,
            ACTION: torch.cat([stretch.draft_token_ids_W for stretch in transitions]), DEPTH: depth_N,
            REWARD: reward_N, VERSION: version_N,
        }  # fmt: skip
        return {
            "hidden": hidden_ND,
            "target_hidden": target_hidden_ND,
            "log_prob": log_prob_N,
            "facts": torch.stack([facts[name] for name in FACTS], 1),
            "kind": torch.where(depth_N == 0, ROUND_START, ANCHORED),
            # In float32, where no float16 sum overflows.
            "checksum": sum(x_ND.sum(1, dtype=torch.float32) for x_ND in (hidden_ND, target_hidden_ND)) + log_prob_N,
        }

    def _place(self, stretch: Transitions, columns: dict[str, Tensor], offset: int, first: int, end: int) -> None:
        """Finds rows for the stretch's columns first..end-1, in as many segments as it takes; `_write` fills them.

        offset: of the stretch in `columns`.
        """
        tenant = tenant_id(stretch.tenant)
        while first < end:
            position = stretch.start_position + first
            slot = self._slot_for(stretch.request_id, tenant, position, columns)
            length = self._lengths[slot]
            take = min(self.segment_len - length, end - first)
            row = slot * self.segment_len + length
            self._unwritten_rows += range(row, row + take)
            self._unwritten_columns += range(offset + first, offset + first + take)
            self._unwritten_slots.add(slot)
            if length == 0 and position > 0:
                # The position before is in another segment. A sequence's own first position has none: it needs none.
                columns["kind"][offset + first] = UNANCHORED
            self._lengths[slot] += take
            self._num_positions += take
            first += take
            if self._num_starts(slot) and slot not in self._by_tenant:
                self._by_tenant.add(slot, tenant)

    def _write(self, columns: dict[str, Tensor]) -> None:
        """Fills the rows found since the last write."""
        rows_N = torch.tensor(self._unwritten_rows, dtype=torch.int64, device=self.device)
        columns_N = torch.tensor(self._unwritten_columns, dtype=torch.int64, device=self.device)
        for name, field in self._fields.items():
            field[rows_N] = columns[name][columns_N].to(field.dtype)
        self._unwritten_rows, self._unwritten_columns = [], []
        self._unwritten_slots = set()

    def _slot_for(self, request_id: int, tenant: int, position: int, columns: dict[str, Tensor]) -> int:
        """The request's open segment if it has room and ends just before this position, else a new one."""
        slot = self._open.get(request_id)
        # Of the same tenant: after a restart another request may come under this number.
        if slot is not None and self._tenants[slot] == tenant:
            length = self._lengths[slot]
            if length < self.segment_len and position == self._starts[slot] + length:
                return slot
        if self._cursor in self._unwritten_slots:
            self._write(columns)
        slot = self._next_slot()
        self._starts[slot] = position
        self._owners[slot] = request_id
        self._tenants[slot] = tenant
        self._open[request_id] = slot
        return slot

    def _next_slot(self) -> int:
        """The ring slot whose turn it is, emptied."""
        slot = self._cursor
        self._cursor = (slot + 1) % self._num_ring
        self._ring_used = max(self._ring_used, slot + 1)
        if self._lengths[slot]:
            self._evict(slot)
        return slot

    def _evict(self, slot: int) -> None:
        """Empties a ring slot; its segment takes a place in the reservoir with odds places / segments ever evicted."""
        self._close(slot)
        self._num_evicted += 1
        if self._reservoir_used < self._num_reservoir:
            place = self._reservoir_used
            self._reservoir_used += 1
        else:
            place = int(torch.randint(self._num_evicted, (), generator=self._generator))
        if place < self._num_reservoir:
            self._copy_segment(self, slot, self._num_ring + place)
        self._clear(slot)

    def _close(self, slot: int) -> None:
        """A request that still writes here must not write into the next owner's segment."""
        if self._open.get(self._owners[slot]) == slot:
            del self._open[self._owners[slot]]

    def _copy_segment(self, origin: ReplayBuffer, source: int, target: int) -> None:
        """origin: the buffer that holds `source`, this one or another of the same sizes."""
        self._clear(target)
        for name, field in self._fields.items():
            field[self._rows(target)] = origin._fields[name][self._rows(source)]
        for book in ("_starts", "_lengths", "_owners", "_tenants"):
            getattr(self, book)[target] = getattr(origin, book)[source]
        if source in origin._by_tenant:
            self._by_tenant.add(target, self._tenants[target])
        self._num_positions += self._lengths[target]

    def _clear(self, slot: int) -> None:
        self._num_positions -= self._lengths[slot]
        self._lengths[slot] = 0
        self._owners[slot] = -1
        self._tenants[slot] = 0
        self._by_tenant.discard(slot)
        self._fields["kind"][self._rows(slot)] = EMPTY

    def _num_starts(self, slot: int) -> int:
        """Positions of the segment that a block can start at: all but a first one whose predecessor is elsewhere."""
        return self._lengths[slot] - self._num_unanchored(slot)

    def _num_unanchored(self, slot: int) -> int:
        return int(self._starts[slot] > 0)

    def _rows(self, slot: int) -> slice:
        return slice(slot * self.segment_len, (slot + 1) * self.segment_len)

    # Reading

    @torch.no_grad()
    def sample(
        self,
        num_blocks: int,
        block_len: int,
        *,
        current_version: int,
        generator: torch.Generator,
        aligned_fraction: float = 0.5,
        max_staleness: int = 16,
        max_tenant_share: float = 1.0,
    ) -> ReplayBatch:
        """Blocks of T = block_len consecutive positions with the verifier's state just before them as anchor.

        Every committed position with a known predecessor can start a block, since a drafter sees committed tokens
        alone; that is all the distribution terms need. Reward terms need depths that match what was really drafted,
        so a share of the blocks starts where a round started. Both are drawn uniformly, with replacement. A block is
        masked from its segment's end on, and throughout where NUM_PROBES found nothing to start it with.

        generator         on any device; drives every draw.
        aligned_fraction  share of the blocks drawn among round starts, or anywhere where probing finds none.
        max_staleness     versions; older drafts carry no reward, for their ratio to today's drafter means little.
        max_tenant_share  of the blocks that one tenant may fill while there are others, see TenantSlots.draw. Below 1,
                          and with several tenants, a block is drawn by tenant, then by segment, then by position, from
                          ring and reservoir as they come, and aligned where its segment has a round start.
        Raises ValueError when nothing is stored or block_len is outside 1..max_block.
        """
        if not 1 <= block_len <= self.max_block:
            raise ValueError(f"block_len must be in 1..{self.max_block} (max_block), got {block_len}")
        if not self._num_positions:
            raise ValueError("nothing to sample from: the replay buffer is empty; add transitions first")
        if max_tenant_share < 1 and self.num_tenants > 1:
            slots = self._by_tenant.draw(num_blocks, max_share=max_tenant_share, generator=generator)
            row_NP, is_aligned_N = self._probes_in(slots, aligned_fraction, generator)
        else:
            row_NP, is_aligned_N = self._probes_anywhere(num_blocks, aligned_fraction, generator)
        row_N, is_found_N = self._best_starts(row_NP.to(self.device), is_aligned_N.to(self.device))
        fields = self._fields
        step_T = torch.arange(block_len, device=self.device)
        offset_N = row_N % self.segment_len
        is_inside_NT = offset_N[:, None] + step_T < self.segment_len
        row_NT = (row_N[:, None] + step_T).where(is_inside_NT, row_N[:, None])
        facts_NT = fields["facts"][row_NT].unbind(-1)
        mask_NT = is_inside_NT & (fields["kind"][row_NT] != EMPTY) & is_found_N[:, None]
        staleness_NT = current_version - facts_NT[VERSION]
        has_reward_NT = mask_NT & (facts_NT[DEPTH] == step_T) & (staleness_NT <= max_staleness)
        anchor_ND = fields["target_hidden"][(row_N - 1).clamp_min(0)]
        return ReplayBatch(
            anchor_ND=anchor_ND.masked_fill_((facts_NT[POSITION] == 0)[:, :1], 0),
            hidden_NTD=fields["hidden"][row_NT],
            target_hidden_NTD=fields["target_hidden"][row_NT],
            token_ids_NT=facts_NT[TOKEN],
            mask_NT=mask_NT,
            action_NT=facts_NT[ACTION].where(has_reward_NT, 0),
            reward_NT=facts_NT[REWARD].where(has_reward_NT, 0).float(),
            has_reward_NT=has_reward_NT,
            behaviour_log_probs_NT=fields["log_prob"][row_NT].where(has_reward_NT, 0),
            staleness_N=staleness_NT[:, 0],
        )

    def _probes_anywhere(
        self, num_blocks: int, aligned_fraction: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random rows to try for each block, [N, P], and which blocks are aligned. Ring blocks come first."""
        num_reservoir_blocks = round(num_blocks * self.reservoir_fraction) if self._reservoir_used else 0
        probes, is_aligned = [], []
        for first_slot, num_slots, count in (
            (0, self._ring_used, num_blocks - num_reservoir_blocks),
            (self._num_ring, self._reservoir_used, num_reservoir_blocks),
        ):
            if count:
                rows_NP = torch.randint(
                    num_slots * self.segment_len, (count, NUM_PROBES), generator=generator, device=generator.device
                )
                probes.append(rows_NP + first_slot * self.segment_len)
                is_aligned.append(torch.arange(count) < round(count * aligned_fraction))
        return torch.cat(probes), torch.cat(is_aligned)

    def _probes_in(
        self, slots: list[int], aligned_fraction: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The same, one block in each of these slots, among the rows that a block can start at."""
        first_row_N = torch.tensor([slot * self.segment_len + self._num_unanchored(slot) for slot in slots])
        num_rows_N = torch.tensor([self._num_starts(slot) for slot in slots])
        shape = (len(slots), NUM_PROBES)
        offset_NP = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).cpu()
        row_NP = first_row_N[:, None] + (offset_NP * num_rows_N[:, None]).long()
        return row_NP, torch.arange(len(slots)) < round(len(slots) * aligned_fraction)

    def _best_starts(self, row_NP: Tensor, is_aligned_N: Tensor) -> tuple[Tensor, Tensor]:
        """One of the probed rows for each block to start at, and whether it can.

        The first round start for an aligned block, else the first row that a block can start at. So the draw is
        uniform over those rows, at a fixed cost.
        """
        # In other blocks a round start is as good as any anchored row; argmax takes the first of equals.
        best_wanted_N1 = torch.where(is_aligned_N, ROUND_START, ANCHORED)[:, None]
        kind_NP = torch.minimum(self._fields["kind"][row_NP], best_wanted_N1)
        best_N1 = kind_NP.argmax(1, keepdim=True)
        return row_NP.gather(1, best_N1)[:, 0], kind_NP.gather(1, best_N1)[:, 0] >= ANCHORED

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as a flat dict of tensors fit for safetensors; the fields are the live memory."""
        return {
            **self._fields,
            "sizes": torch.tensor(self._sizes),
            "starts": torch.tensor(self._starts),
            "lengths": torch.tensor(self._lengths),
            "owners": torch.tensor(self._owners),
            "tenants": torch.tensor(self._tenants),
            "by_tenant": torch.tensor(list(self._by_tenant.in_order()), dtype=torch.int64).reshape(-1, 2),
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
        for name, field in self._fields.items():
            field.copy_(state[name])
        self._starts = state["starts"].tolist()
        self._lengths = state["lengths"].tolist()
        self._owners = state["owners"].tolist()
        self._tenants = state["tenants"].tolist()
        self._by_tenant = TenantSlots()
        for slot, tenant in state["by_tenant"].tolist():
            self._by_tenant.add(slot, tenant)
        self._open = dict(state["open"].tolist())
        for name, value in zip(_COUNTERS, state["counters"].tolist(), strict=True):
            setattr(self, name, value)
        self._generator.set_state(state["generator"].cpu())

    def adopt(self, state: dict[str, Tensor], *, part: int = 0, num_parts: int = 1) -> None:
        """Takes every num_parts-th segment, from the part-th on, of what state_dict of another buffer gave.

        They come in as new segments do, and none of them goes on. Raises ValueError for a buffer of other sizes.
        """
        saved = ReplayBuffer(
            capacity_positions=self.capacity, hidden_size=self._fields["hidden"].shape[1], max_block=self.max_block,
            dtype=self.dtype, device=self.device, reservoir_fraction=self.reservoir_fraction,
            segment_len=self.segment_len,
        )  # fmt: skip
        saved.load_state_dict(state)
        for source in [slot for slot, length in enumerate(saved._lengths) if length][part::num_parts]:
            target = self._next_slot()
            self._copy_segment(saved, source, target)
            self._owners[target] = -1  # its request may have a number that another one has here

    @property
    def _sizes(self) -> list[int]:
        return [self.segment_len, self._num_ring, self._num_reservoir, self._fields["hidden"].shape[1]]


# In a saved state by place: append, never reorder.
_COUNTERS = ("_cursor", "_ring_used", "_reservoir_used", "_num_evicted", "_num_positions", "num_refused")
