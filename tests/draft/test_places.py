"""Places against a second writing: which are found behind a context, how long each agrees, and what they take."""

from __future__ import annotations

import random
from array import array

import pytest

from dvi.draft import places as module
from dvi.draft.places import GAP, MAX_FOUND, MAX_MATCH, MAX_PLACES, Places


def indexed(text: list[int]) -> Places:
    places = Places(array("i", [GAP, GAP, *text, GAP]))
    for place in range(3, len(places.tokens)):
        places.add(place)
    return places


def agreement(text: list[int], place: int, context: list[int]) -> int:
    """Tokens before `place` of the text that are the context's last ones, counted one by one."""
    length = 0
    while length < min(place, len(context), MAX_MATCH) and text[place - 1 - length] == context[-1 - length]:
        length += 1
    return length


def all_found(text: list[int], context: list[int]) -> dict[int, int]:
    """Every place that any match leads to, in the text's own numbers."""
    lengths = {place: agreement(text, place, context) for place in range(1, len(text) + 1)}
    return {place: length for place, length in lengths.items() if length}


def newest_found(text: list[int], context: list[int]) -> dict[int, int]:
    """Those of `all_found` that the newest MAX_PLACES of a key lead to, each as long as the earliest lead is."""
    context = context[-MAX_MATCH:]
    found: dict[int, int] = {}
    for start in range(len(context)):
        for num_tokens in (1, 2):
            key = context[start + 1 - num_tokens : start + 1]
            if num_tokens > start + 1:
                continue
            seeds = [end for end in range(len(text), num_tokens - 1, -1) if text[end - num_tokens : end] == key]
            rest = context[start + 1 :]
            for seed in seeds[:MAX_PLACES]:
                place = seed + len(rest)
                if text[seed:place] == rest and place <= len(text):
                    found[place] = max(found.get(place, 0), min(num_tokens + len(rest), MAX_MATCH))
    return found


def shifted(found: dict[int, int]) -> dict[int, int]:
    """As numbers of the text, without the two gaps before it."""
    return {place - 2: length for place, length in found.items()}


@pytest.mark.parametrize("seed", range(30))
def test_without_bounds_every_match_is_found_at_its_full_length(seed, monkeypatch):
    """Catches a pair taken for a longer match, a place followed beyond its disagreement, and lengths off by one."""
    monkeypatch.setattr(module, "MAX_PLACES", 10**9)
    monkeypatch.setattr(module, "MAX_FOUND", 10**9)
    rng = random.Random(seed)
    text = rng.choices(range(rng.choice((1, 2, 3, 8))), k=rng.randrange(120))
    places = indexed(text)
    for num in (0, 1, 2, 5, 12):
        context = rng.choice((text, rng.choices(range(3), k=20)))[-num:] if num else []
        assert shifted(places.find(context)) == all_found(text, context)


@pytest.mark.parametrize("seed", range(30))
def test_with_bounds_a_place_is_found_where_one_of_the_newest_leads_to_it(seed):
    rng = random.Random(seed)
    text = rng.choices(range(rng.choice((2, 4, 8))), k=300)
    found, expected = shifted(indexed(text).find(text)), newest_found(text, text)
    if len(expected) <= MAX_FOUND:
        assert found == expected
    assert len(found) <= MAX_FOUND and all(length <= agreement(text, place, text) for place, length in found.items())


@pytest.mark.parametrize("seed", range(10))
def test_of_more_than_can_be_followed_the_longest_are_and_the_newest_of_these(seed, monkeypatch):
    """Catches text that repeats itself: its places would grow with it."""
    rng = random.Random(seed)
    places, context = indexed(rng.choices((1, 2), k=500)), rng.choices((1, 2), k=MAX_MATCH)
    found = [*places.find(context).items()]
    assert found == sorted(found, key=lambda entry: (-entry[1], -entry[0]))
    monkeypatch.setattr(module, "MAX_FOUND", 10)
    end = context[-1]
    every = places.follow(dict(found), end, 1)
    assert len(every) == 10 and [*every.items()] == sorted(every.items(), key=lambda entry: (-entry[1], -entry[0]))


def test_a_long_match_is_found_behind_frequent_tokens_when_one_of_its_own_is_rare():
    """Catches an index of the newest places alone: a thousand newer ones stand behind the last two tokens."""
    text = [5, 1, 2, 1, 2, 77, *[1, 2, 9] * 1000]
    assert 7 in indexed(text).find([5, 1, 2, 1, 2])


@pytest.mark.parametrize("seed", range(10))
def test_what_is_discarded_is_as_if_it_had_never_been_added(seed):
    rng = random.Random(seed)
    text = rng.choices(range(6), k=60)  # fewer than MAX_PLACES of a token are lost to newer ones
    places, kept = indexed(text), Places(array("i", [GAP, GAP, *text, GAP]))
    num_bytes = 0
    dropped = set(rng.sample(range(3, len(text) + 3), k=30))
    for place in range(3, len(text) + 3):
        if place not in dropped:
            num_bytes += kept.add(place)
    for place in dropped:
        places.discard(place)
    if max(map(text.count, set(text))) <= MAX_PLACES:
        assert places._behind == kept._behind
    for place in set(range(3, len(text) + 3)) - dropped:
        num_bytes -= kept.discard(place)
    assert not kept and num_bytes == 0


def test_discarding_a_place_that_newer_ones_pushed_out_changes_nothing():
    text = [1] * (MAX_PLACES + 5)
    places = indexed(text)
    before = dict(places._behind)
    assert places.discard(3) == places.discard(5) == 0 and places._behind == before
