"""Where in a text its tokens stand, and the places there that the end of another text leads to.

Knows token ids and places; knows nothing of requests, tenants or estimates. A place is an index into `tokens`, between
what stands before it and what follows; GAP stands where nothing is known, and matches nothing.

Only the newest MAX_PLACES places behind a token, and behind a pair of tokens, can be looked up. That is enough, since a
place once found is followed for as long as both texts agree: in a longer match some token or pair is rare. (72 answers
of SmolLM2-135M after 480 others: trees of 16 nodes have MAT 2.26, chains 1.94; with all places behind every one of the
last 1..8 tokens 2.26 and 1.95, at twenty times the work.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice

GAP = -1
MAX_MATCH = 8  # tokens: longer matches tell no more
MAX_PLACES = 16  # with 8 the same trees have MAT 2.22
MAX_FOUND = 64  # places followed at a time: more are found in repetitions only
# Of a key: its entry in a dict that has just grown, the number itself, and an empty tuple; of a place that a key holds:
# its number and a pointer. As CPython 3.11 to 3.13 on 64 bits have them, rounded up.
KEY_BYTES, PLACE_BYTES = 160, 40

Found = dict[int, int]  # place -> for how many tokens it is known to agree, 1..MAX_MATCH

_LONGER = [min(length + 1, MAX_MATCH) for length in range(MAX_MATCH + 1)]


class Places:
    """An index over `tokens`, which whoever made it fills."""

    def __init__(self, tokens: array[int]) -> None:
        self.tokens = tokens
        self._behind: dict[int, tuple[int, ...]] = {}  # a token, or a pair as `_pair` has it -> places, newest first

    def __bool__(self) -> bool:
        """Whether there is a place to find."""
        return bool(self._behind)

    def add(self, place: int) -> int:
        """Makes the place behind tokens[place - 1] one that can be found, place >= 2; returns the bytes it takes."""
        num_bytes = 0
        for key in self._keys(place):
            held = self._behind.get(key, ())
            self._behind[key] = (place, *held[: MAX_PLACES - 1])
            num_bytes += PLACE_BYTES * (len(held) < MAX_PLACES) + KEY_BYTES * (not held)
        return num_bytes

    def discard(self, place: int) -> int:
        """Undoes `add`, before the tokens are changed; returns the bytes set free."""
        num_bytes = 0
        for key in self._keys(place):
            held = self._behind.get(key, ())
            if place not in held:
                continue
            num_bytes += PLACE_BYTES
            if len(held) > 1:
                self._behind[key] = tuple(other for other in held if other != place)
            else:
                del self._behind[key]
                num_bytes += KEY_BYTES
        return num_bytes

    def _keys(self, place: int) -> tuple[int, ...]:
        before, token = self.tokens[place - 2], self.tokens[place - 1]
        return (token,) if before == GAP else (token, _pair(before, token))

    def find(self, context: Sequence[int]) -> Found:
        """The places that the end of a text leads to. context: its last tokens, of which MAX_MATCH count."""
        found: Found = {}
        before = GAP
        recent = context[-MAX_MATCH:]
        for token in recent[:-1]:
            # Of a token's newest places, those that go on as the text does are among the newest of the next pair.
            found = self._follow_pair(found, before, token)
            before = token
        return self.follow(found, before, recent[-1]) if recent else found

    def follow(self, found: Found, before: int, token: int) -> Found:
        """The places that one more token leads to, from those that the text before it led to, which ends in `before`.

        Longest first, and of equal length the newest first, if `found` was so; at most MAX_FOUND.
        """
        after = self._follow_pair(found, before, token)
        for place in self._behind.get(token, ()):
            if place not in after:
                after[place] = 1
        return after if len(after) <= MAX_FOUND else dict(islice(after.items(), MAX_FOUND))

    def _follow_pair(self, found: Found, before: int, token: int) -> Found:
        """Those that agree for two tokens or more."""
        tokens = self.tokens
        after = {place + 1: _LONGER[length] for place, length in found.items() if tokens[place] == token}
        for place in self._behind.get(_pair(before, token), ()):
            if place not in after:
                after[place] = 2
        return after


def _pair(before: int, token: int) -> int:
    """Above every token id."""
    return (before + 2) << 32 | token
