"""Keys and values of text beginnings, kept after their request has gone: whole chunks, found by hash.

Knows token ids, tenants and what a cache gives and takes; knows nothing of requests or rows. A chunk's key is a
SHA-256 over the tenant and every token up to the chunk's end: a tenant never finds what another one left, neither by
content nor by time.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dvi.model.kv_cache import KeysAndValues


@dataclass(frozen=True)
class _Chunk:
    tenant: str
    keys_and_values: KeysAndValues


class PrefixCache:
    """At most max_positions positions, in chunks of chunk_len; the least recently used go first. 0 keeps nothing.

    num_found, num_asked   positions found and asked for, since the start.
    """

    def __init__(self, *, chunk_len: int, max_positions: int) -> None:
        self.chunk_len, self._max_chunks = chunk_len, max_positions // chunk_len
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()
        self.num_found = self.num_asked = 0

    @property
    def num_positions(self) -> int:
        return len(self._chunks) * self.chunk_len

    def match(self, tenant: str, token_ids: list[int]) -> list[KeysAndValues]:
        """The chunks held of this text's beginning, in order. The last two tokens are never among them: one is the
        first round's input, the other must be run for its final hidden state."""
        found = []
        for key in self._keys(tenant, token_ids[: max(len(token_ids) - 2, 0)]):
            if key not in self._chunks:
                break
            found.append(key)
        for key in reversed(found):  # a beginning must outlive what follows it, or that could never be found
            self._chunks.move_to_end(key)
        self.num_asked += len(token_ids)
        self.num_found += len(found) * self.chunk_len
        return [self._chunks[key].keys_and_values for key in found]

    def store(self, tenant: str, token_ids: list[int], read: Callable[[int, int], KeysAndValues]) -> None:
        """Keeps the whole chunks of a text; read(start, stop) gives those that are not held yet."""
        keys = list(self._keys(tenant, token_ids))[: self._max_chunks]
        for index, key in enumerate(keys):
            if key not in self._chunks:
                start = index * self.chunk_len
                self._chunks[key] = _Chunk(tenant, read(start, start + self.chunk_len))
        for key in reversed(keys):
            self._chunks.move_to_end(key)
        while len(self._chunks) > self._max_chunks:
            self._chunks.popitem(last=False)

    def forget(self, tenant: str) -> int:
        """Drops all of a tenant's chunks; returns how many positions they held."""
        held = [key for key, chunk in self._chunks.items() if chunk.tenant == tenant]
        for key in held:
            del self._chunks[key]
        return len(held) * self.chunk_len

    def _keys(self, tenant: str, token_ids: list[int]) -> Iterator[bytes]:
        digest = hashlib.sha256(len(tenant.encode()).to_bytes(8, "little") + tenant.encode())
        for end in range(self.chunk_len, len(token_ids) + 1, self.chunk_len):
            digest.update(array("q", token_ids[end - self.chunk_len : end]).tobytes())
            yield digest.copy().digest()
