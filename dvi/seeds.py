"""Which seed draws what. Knows integers only; the draws themselves are in `dvi.decode.sampling`.

A request's draws are a function of its seed, its prompt, and which answer to that prompt it is: never of its place in a
list, of its batch mates, or of the requests before it. Two requests that one learner serves share no draws, unless they
are the same in all three.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

SEED_SPAN = 2**62

Seeds = Callable[[int, list[int]], int]  # of a prompt's place in its list, and of the prompt


def answer_seed(seed: int, index: int) -> int:
    """The seed of answer `index` to one prompt, in 0..2**62-1: the request's own for the first one.

    Not seed + index, which would be another request's seed: users count seeds up.
    """
    return seed if index == 0 else _hashed(f"answer {index} of {seed}".encode())


def prompt_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """What a request with this seed draws with: other prompts draw independently under one seed."""
    return _hashed(f"prompt of {seed}: ".encode() + array("q", prompt_ids).tobytes())


class AnswerSeeds:
    """The seeds of prompts that share one: a prompt that comes again is asked for its next answer."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._times: Counter[int] = Counter()  # by a number made of the prompt: prompts are long

    def __call__(self, place: int, prompt_ids: list[int]) -> int:
        key = prompt_seed(self._seed, prompt_ids)
        self._times[key] += 1
        return answer_seed(self._seed, self._times[key] - 1)


def _hashed(words: bytes) -> int:
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little") % SEED_SPAN
