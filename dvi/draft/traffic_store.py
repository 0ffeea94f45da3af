"""What earlier requests were answered, as token ids: the newest of it within a bound on bytes, apart by tenant.

Knows texts, tenants and slots; knows nothing of requests, drafts or verdicts. Texts grow side by side, each in slots of
its own, and the slot that was begun first makes room when there is none. Learning a token takes a bounded time, making
room included.
"""
# N slots, of W = SLOT_LEN tokens.

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from dvi.draft.places import GAP, KEY_BYTES, PLACE_BYTES, Places
from dvi.tenancy import tenant_id

# Of a slot: the two tokens before its first one, so that pairs are found across slots, then the text's, then a gap.
# 64: dropping one takes 0.1 ms.
SLOT_LEN, LEAD_IN = 64, 2
SLOT_BYTES = 5 * SLOT_LEN + 600  # four bytes a token, in an array that has just grown; its owner, and its entry
TOKEN_BYTES = 2 * (KEY_BYTES + PLACE_BYTES)  # the most that one more token of a slot takes
MIN_BYTES = 1 << 20
EVERYBODY = 0  # the group of all tenants where they share

_BLANK = array("i", [GAP]) * SLOT_LEN


class Text:
    """One growing text of a tenant.

    slots  those that it still has.
    end    the place behind its last token; None where the next one begins a slot.
    """

    __slots__ = ("end", "slots", "tenant")

    def __init__(self, tenant: int) -> None:
        self.tenant = tenant
        self.slots: set[int] = set()
        self.end: int | None = None


class TrafficStore:
    """The newest texts, in at most max_bytes.

    shares_tenants  one tenant's texts are found by all. A store that is shared is a memory whose speed can be probed:
                    an answer that comes fast has been given before.
    num_bytes       taken now in CPython's memory, by a count that is rather too high.
    `len()` is the number of tokens held. Raises ValueError for max_bytes below MIN_BYTES.
    """

    def __init__(self, max_bytes: int, *, shares_tenants: bool = False) -> None:
        if max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes must be at least {MIN_BYTES}, got {max_bytes}; {64 << 20} would do")
        self.max_bytes, self.shares_tenants = max_bytes, shares_tenants
        # A quarter: without a bound of their own, slots of texts that repeat themselves would leave no room for others.
        self._max_slots = max_bytes // (4 * SLOT_BYTES)
        self._clear()

    def _clear(self) -> None:
        self.num_bytes = self._num_tokens = 0
        self._tokens: array[int] = array("i")
        self._groups: dict[int, Places] = {}
        self._owners: dict[int, Text] = {}  # of the slots in use, in the order in which they were begun
        self._free: list[int] = []

    def __len__(self) -> int:
        return self._num_tokens

    def __repr__(self) -> str:
        return f"TrafficStore({len(self):,} tokens, {self.num_bytes >> 20} of {self.max_bytes >> 20} MiB)"

    def places(self, tenant: int) -> Places:
        """All that this tenant may find."""
        return self._groups.get(self._group(tenant)) or Places(self._tokens)

    def extend(self, text: Text, before: Sequence[int], token_ids: Sequence[int]) -> None:
        """Learns a text's next tokens. before: the two tokens that they follow, GAP where there is none."""
        first, second = before
        for token_id in token_ids:
            while self.num_bytes + TOKEN_BYTES + SLOT_BYTES > self.max_bytes:
                self._drop_oldest()
            if text.end is None:
                self._begin_slot(text, first, second)
            self._append(text, token_id)
            first, second = second, token_id
            self._num_tokens += 1
            if text.end % SLOT_LEN == SLOT_LEN - 1:
                text.end = None

    def _begin_slot(self, text: Text, first: int, second: int) -> None:
        if not self._free and len(self._tokens) == self._max_slots * SLOT_LEN:
            self._drop_oldest()
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._tokens) // SLOT_LEN
            self._tokens.extend(_BLANK)
            self.num_bytes += SLOT_BYTES
        self._owners[slot] = text
        text.slots.add(slot)
        text.end = slot * SLOT_LEN
        for token_id in (first, second):
            self._append(text, token_id)

    def _append(self, text: Text, token_id: int) -> None:
        self._tokens[text.end] = token_id
        text.end += 1
        if _is_found(text.end) and token_id != GAP:
            group = self._group(text.tenant)
            if group not in self._groups:
                self._groups[group] = Places(self._tokens)
            self.num_bytes += self._groups[group].add(text.end)

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._owners)))

    def _drop(self, slot: int) -> int:
        """Wipes a slot; returns the number of tokens that it held."""
        text, start = self._owners.pop(slot), slot * SLOT_LEN
        group = self._group(text.tenant)
        places, num_before = self._groups[group], self._num_tokens
        for end in range(start + 1, start + SLOT_LEN):
            if self._tokens[end - 1] != GAP:
                self._num_tokens -= end > start + LEAD_IN
                if _is_found(end):
                    self.num_bytes -= places.discard(end)
        if not places:
            del self._groups[group]
        self._tokens[start : start + SLOT_LEN] = _BLANK
        self._free.append(slot)
        text.slots.discard(slot)
        if text.end is not None and text.end // SLOT_LEN == slot:
            text.end = None
        return num_before - self._num_tokens

    def forget(self, tenant: str) -> int:
        """Drops all of a tenant's texts and wipes their memory; returns the number of tokens dropped."""
        forgotten = tenant_id(tenant)
        return sum(self._drop(slot) for slot, text in [*self._owners.items()] if text.tenant == forgotten)

    def _group(self, tenant: int) -> int:
        return EVERYBODY if self.shares_tenants else tenant

    # Saving

    def state_dict(self) -> dict[str, Tensor]:
        """tokens_NW int32 and tenants_N int64 of the slots in use, oldest first: fit for safetensors."""
        slots_NW = torch.tensor(self._tokens, dtype=torch.int32, device="cpu").reshape(-1, SLOT_LEN)
        return {
            "tokens_NW": slots_NW[list(self._owners)],
            "tenants_N": torch.tensor([text.tenant for text in self._owners.values()], dtype=torch.int64, device="cpu"),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Learns what state_dict gave in place of all that is held, the newest of it where not all has room.

        Requests under way go on in new slots. Raises ValueError for slots of another length.
        """
        if state["tokens_NW"].shape[1:] != (SLOT_LEN,):
            raise ValueError(f"tokens_NW must have slots of {SLOT_LEN} tokens, got {list(state['tokens_NW'].shape)}")
        for slot in [*self._owners]:
            self._drop(slot)
        self._clear()
        for tenant, (first, second, *rest) in zip(
            state["tenants_N"].tolist(), state["tokens_NW"].tolist(), strict=True
        ):
            self.extend(Text(tenant), (first, second), [token_id for token_id in rest if token_id != GAP])


def _is_found(place: int) -> bool:
    """Whether a place of a slot leads anywhere: not within the lead-in, and not before the gap."""
    return LEAD_IN <= place % SLOT_LEN < SLOT_LEN - 1
