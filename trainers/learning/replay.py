"""Replay: committed stretches of hidden states with the verdicts they earned, and training blocks drawn from them.

Knows positions, rounds and drafts; knows nothing of losses, models or text. Memory is taken once, as `Segments`; what
`add` and `sample` cost does not depend on how much is stored.
"""
# N blocks, T positions of a block, W positions of a transition, D hidden size, P probes.

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from dvi.model.transfers import to_device, to_host
from dvi.records import ReplayBatch, Transitions
from dvi.settings import LearningSettings
from dvi.tenancy import tenant_id
from trainers.learning.segments import (
    ACTION,
    ANCHORED,
    DEPTH,
    EMPTY,
    FACTS,
    POSITION,
    REWARD,
    ROUND_START,
    TOKEN,
    VERSION,
    Segments,
)

NOT_DRAFTED = -1  # the depth of a position without a draft
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
    num_bytes             memory taken, full or empty.
    `len()` is the number of stored positions, `capacity` how many fit.
    Raises ValueError when the sizes cannot work, saying what would.
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
        if not 1 <= max_block < segment_len:
            raise ValueError(
                f"max_block must be in 1..{segment_len - 1} for segment_len {segment_len}, got {max_block}; "
                f"segment_len {8 * max_block} would do"
            )
        self._segments = Segments(
            capacity_positions=capacity_positions, hidden_size=hidden_size, dtype=dtype, device=torch.device(device),
            reservoir_fraction=reservoir_fraction, segment_len=segment_len, max_bytes=max_bytes, seed=seed,
        )
        self.max_block = max_block

    segment_len: int = property(attrgetter("_segments.segment_len"))
    capacity: int = property(attrgetter("_segments.capacity"))
    num_bytes: int = property(attrgetter("_segments.num_bytes"))
    num_refused: int = property(attrgetter("_segments.num_refused"))

    def __repr__(self) -> str:
        return f"ReplayBuffer({len(self):,} of {self.capacity:,} positions)"

    def __len__(self) -> int:
        return self._segments.num_positions

    @property
    def num_tenants(self) -> int:
        """Tenants with experience to draw from."""
        return len(self._segments.by_tenant)

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
        is_finite = to_host(columns["checksum"].isfinite()).tolist()
        offset = 0
        for stretch in transitions:
            first = 0
            for is_kept, run in groupby(is_finite[offset : offset + len(stretch)]):
                end = first + sum(1 for _ in run)
                if is_kept:
                    self._segments.place(stretch, columns, offset, first, end)
                else:
                    self._segments.num_refused += end - first
                first = end
            offset += len(stretch)
        self._segments.write(columns)

    def end(self, request_id: int) -> None:
        """Closes the request's open segment; unknown requests are ignored. What it holds stays."""
        self._segments.end(request_id)

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drops every segment of these requests and wipes its memory. Takes time in the positions held."""
        forgotten = set(request_ids)
        self._segments.drop([slot for slot, owner in enumerate(self._segments.owners) if owner in forgotten])

    def forget_tenant(self, tenant: str) -> int:
        """Drops every segment of this tenant and wipes its memory; returns the number of positions dropped."""
        num_before, forgotten = len(self), tenant_id(tenant)
        self._segments.drop([slot for slot, owner in enumerate(self._segments.tenants) if owner == forgotten])
        return num_before - len(self)

    def _columns(self, transitions: list[Transitions]) -> dict[str, Tensor]:
        """All stretches' positions one after the other, as the fields hold them, and a number for each that is finite
        only if all of the position is."""
        hidden_ND, target_hidden_ND = (
            torch.cat([getattr(stretch, name) for stretch in transitions]).to(self._segments.dtype)
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
        position_N, depth_N, reward_N, version_N = to_device(host, self._segments.device).unbind(1)
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
        if not len(self):
            raise ValueError("nothing to sample from: the replay buffer is empty; add transitions first")
        segments, fields = self._segments, self._segments.fields
        if max_tenant_share < 1 and self.num_tenants > 1:
            slots = segments.by_tenant.draw(num_blocks, max_share=max_tenant_share, generator=generator)
            row_NP, is_aligned_N = self._probes_in(slots, aligned_fraction, generator)
        else:
            row_NP, is_aligned_N = self._probes_anywhere(num_blocks, aligned_fraction, generator)
        row_N, is_found_N = self._best_starts(row_NP, is_aligned_N)
        step_T = torch.arange(block_len, device=segments.device)
        offset_N = row_N % segments.segment_len
        is_inside_NT = offset_N[:, None] + step_T < segments.segment_len
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
        segments = self._segments
        num_reservoir_blocks = round(num_blocks * segments.reservoir_fraction) if segments.reservoir_used else 0
        probes, is_aligned = [], []
        for first_slot, num_slots, count in (
            (0, segments.ring_used, num_blocks - num_reservoir_blocks),
            (segments.num_ring, segments.reservoir_used, num_reservoir_blocks),
        ):
            if count:
                rows_NP = torch.randint(
                    num_slots * segments.segment_len, (count, NUM_PROBES), generator=generator, device=generator.device
                )
                probes.append(rows_NP + first_slot * segments.segment_len)
                is_aligned.append(self._is_among_first(count, aligned_fraction))
        return to_device(torch.cat(probes), segments.device), torch.cat(is_aligned)

    def _probes_in(
        self, slots: list[int], aligned_fraction: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The same, one block in each of these slots, among the rows that a block can start at."""
        segments = self._segments
        host = [
            (slot * segments.segment_len + segments.num_unanchored(slot), segments.num_starts(slot)) for slot in slots
        ]
        first_row_N, num_rows_N = to_device(host, segments.device).unbind(1)
        shape = (len(slots), NUM_PROBES)
        offset_NP = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        offset_NP = to_device(offset_NP, segments.device)
        row_NP = first_row_N[:, None] + (offset_NP * num_rows_N[:, None]).long()
        return row_NP, self._is_among_first(len(slots), aligned_fraction)

    def _is_among_first(self, num_blocks: int, share: float) -> Tensor:
        """bool [N]: the first so many of the blocks, on the replay's device."""
        return torch.arange(num_blocks, device=self._segments.device) < round(num_blocks * share)

    def _best_starts(self, row_NP: Tensor, is_aligned_N: Tensor) -> tuple[Tensor, Tensor]:
        """One of the probed rows for each block to start at, and whether it can.

        The first round start for an aligned block, else the first row that a block can start at. So the draw is
        uniform over those rows, at a fixed cost.
        """
        # In other blocks a round start is as good as any anchored row; argmax takes the first of equals.
        best_wanted_N1 = torch.where(is_aligned_N, ROUND_START, ANCHORED)[:, None]
        kind_NP = torch.minimum(self._segments.fields["kind"][row_NP], best_wanted_N1)
        best_N1 = kind_NP.argmax(1, keepdim=True)
        return row_NP.gather(1, best_N1)[:, 0], kind_NP.gather(1, best_N1)[:, 0] >= ANCHORED

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as a flat dict of tensors fit for safetensors; see `Segments`."""
        return self._segments.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores bit for bit what state_dict gave. Raises ValueError when it came from a buffer of other sizes."""
        self._segments.load_state_dict(state)

    def adopt(self, state: dict[str, Tensor], *, part: int = 0, num_parts: int = 1) -> None:
        """See `Segments.adopt`."""
        self._segments.adopt(state, part=part, num_parts=num_parts)
