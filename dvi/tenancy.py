"""Whose experience lies in which slot of a store, and draws of slots in which no tenant exceeds its share.

Knows tenants and slots by number; knows nothing of what the slots hold. A draw costs the same however many slots there
are; it grows with the number of tenants.
"""
# N draws.

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch


def tenant_id(name: str) -> int:
    """A number for a tenant's name, in 64 bits with sign, the same in every process: the name itself is not stored."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


class TenantSlots:
    """Slots by tenant. Their order within is part of the state, since draws depend on it: save `in_order`."""

    def __init__(self) -> None:
        self._slots: dict[int, list[int]] = {}
        self._places: dict[int, tuple[int, int]] = {}  # slot -> (tenant, place in the tenant's list)

    def __len__(self) -> int:
        """The number of tenants."""
        return len(self._slots)

    def __contains__(self, slot: int) -> bool:
        return slot in self._places

    def add(self, slot: int, tenant: int) -> None:
        slots = self._slots.setdefault(tenant, [])
        self._places[slot] = tenant, len(slots)
        slots.append(slot)

    def discard(self, slot: int) -> None:
        """Takes the slot out if it is there; the tenant's last one moves into its place."""
        if slot not in self._places:
            return
        tenant, place = self._places.pop(slot)
        slots = self._slots[tenant]
        last = slots.pop()
        if last != slot:
            slots[place] = last
            self._places[last] = tenant, place
        if not slots:
            del self._slots[tenant]

    def in_order(self) -> Iterator[tuple[int, int]]:
        """(slot, tenant) such that adding them in turn builds the same order again."""
        return ((slot, tenant) for tenant, slots in self._slots.items() for slot in slots)

    def draw(self, num_draws: int, *, max_share: float, generator: torch.Generator) -> list[int]:
        """N slots, those of one tenant drawn evenly, with replacement, in random order.

        Tenants share the draws in proportion to their slots, except that none gets more than max_share of them, or
        than an equal share where that is more.
        """
        tenants = list(self._slots.values())
        most = max(int(max_share * num_draws), math.ceil(num_draws / len(tenants)))
        expected = capped_shares([len(slots) for slots in tenants], total=num_draws, most=most)
        # One draw in every unit of the summed shares: a tenant gets its share rounded down or up, so never above most.
        options = {"generator": generator, "device": generator.device, "dtype": torch.float64}
        points_N = torch.arange(num_draws, device="cpu") + torch.rand((), **options).cpu()
        ends = torch.tensor(expected, dtype=torch.float64, device="cpu").cumsum(0)
        chosen_N = torch.searchsorted(ends, points_N, right=True).clamp_max(len(tenants) - 1).tolist()
        order_N = torch.randperm(num_draws, generator=generator, device=generator.device).tolist()
        picks_N = torch.rand(num_draws, **options).tolist()
        slots_of_N = [tenants[chosen_N[n]] for n in order_N]
        return [slots[int(pick * len(slots))] for slots, pick in zip(slots_of_N, picks_N, strict=True)]


def capped_shares(sizes: Sequence[int], *, total: int, most: int) -> list[float]:
    """`total` divided in proportion to the sizes, none above `most`: what that cuts off goes to the others.

    sizes: positive. Raises ValueError when most * len(sizes) < total.
    """
    if most * len(sizes) < total:
        raise ValueError(f"most must be at least {total / len(sizes):g} to divide {total} by {len(sizes)}, got {most}")
    is_full = [False] * len(sizes)
    while True:
        open_size = sum(size for size, full in zip(sizes, is_full, strict=True) if not full)
        rate = (total - most * sum(is_full)) / max(open_size, 1)
        newly_full = [not full and size * rate > most for size, full in zip(sizes, is_full, strict=True)]
        if not any(newly_full):
            return [float(most) if full else size * rate for size, full in zip(sizes, is_full, strict=True)]
        is_full = [full or new for full, new in zip(is_full, newly_full, strict=True)]
