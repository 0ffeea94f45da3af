"""The prefix cache: whole chunks of one tenant's own beginnings, the newest kept."""

from __future__ import annotations

import torch

from dvi.serving.prefix_cache import PrefixCache

CHUNK = 4


def cache_of(max_positions: int = 40) -> PrefixCache:
    return PrefixCache(chunk_len=CHUNK, max_positions=max_positions)


def read_from(token_ids: list[int]):
    """Keys and values that tell which tokens they are of."""

    def read(start: int, stop: int) -> dict:
        tokens = torch.tensor(token_ids[start:stop])[None, :, None]
        return {0: (tokens, -tokens)}

    return read


def stored(cache: PrefixCache, tenant: str, token_ids: list[int]) -> None:
    cache.store(tenant, token_ids, read_from(token_ids))


def found_ids(cache: PrefixCache, tenant: str, token_ids: list[int]) -> list[int]:
    return [i for chunk in cache.match(tenant, token_ids) for i in chunk[0][0].flatten().tolist()]


def test_a_text_finds_the_whole_chunks_it_shares_and_its_last_two_tokens_never():
    """Catches half chunks, a chunk with another beginning, and a text with nothing left to prefill."""
    cache, text = cache_of(), list(range(14))
    stored(cache, "", text)
    assert cache.num_positions == 12
    assert found_ids(cache, "", [*text, 99, 98]) == text[:12]
    assert found_ids(cache, "", text) == text[:12]
    assert found_ids(cache, "", text[:13]) == text[:8]
    assert found_ids(cache, "", [*text[:6], 99, *text[7:]]) == text[:4]
    assert found_ids(cache, "", [99, *text[1:]]) == []
    assert found_ids(cache, "", text[:1]) == found_ids(cache, "", []) == []


def test_no_tenant_finds_anothers_chunks_whatever_its_name():
    """Catches keys without a salt, and salts that run into the tokens."""
    cache, text = cache_of(), list(range(12))
    stored(cache, "one", text)
    for stranger in ("", "two", "one ", "on", "one\x00"):
        assert found_ids(cache, stranger, text) == []
    assert found_ids(cache, "one", text) == text[:8]


def test_the_least_recently_used_go_first_and_beginnings_last():
    """Catches a beginning evicted before what follows it, which then takes room and is never found."""
    cache = cache_of(max_positions=5 * CHUNK)
    old, new = list(range(12)), list(range(100, 112))
    stored(cache, "", old)
    stored(cache, "", new)  # six chunks into five places
    assert found_ids(cache, "", [*old, 0, 0]) == old[:8]
    assert found_ids(cache, "", [*new, 0, 0]) == new
    stored(cache, "", list(range(200, 208)))
    assert found_ids(cache, "", [*old, 0, 0]) == []
    assert found_ids(cache, "", [*new, 0, 0]) == new
    assert cache.num_positions == 5 * CHUNK


def test_what_is_held_is_not_read_again():
    """Catches a copy of the whole text at every turn of a conversation."""
    cache, text, reads = cache_of(), list(range(12)), []
    stored(cache, "", text[:8])
    cache.store("", text, lambda start, stop: reads.append((start, stop)) or read_from(text)(start, stop))
    assert reads == [(8, 12)]


def test_forgetting_drops_one_tenant_and_counts_it():
    """Catches forgetting that takes too much or too little."""
    cache, text = cache_of(), list(range(12))
    stored(cache, "one", text)
    stored(cache, "two", text)
    assert cache.forget("one") == 12 and cache.forget("one") == 0
    assert found_ids(cache, "one", text) == [] and found_ids(cache, "two", text) == text[:8]


def test_a_cache_of_no_positions_keeps_nothing_and_reads_nothing():
    """Catches work done for a cache that is turned off."""
    cache = cache_of(max_positions=0)
    cache.store("", list(range(12)), lambda start, stop: 1 / 0)
    assert cache.num_positions == 0 and cache.match("", list(range(12))) == []
