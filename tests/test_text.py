"""Text as it grows: every piece is final, whole characters only, and no part of a stop string is ever shown."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dvi.text import REPLACEMENT, TextStream

ROOT = Path(__file__).parents[1]
TOKENIZERS = {"sentencepiece": ROOT / "tests/stories260k", "byte-level": ROOT / "checkpoints/reference-11m"}
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces\n\nand\tlines ",
    "naïve café – “quotes” … 東京 👩‍👩‍👧 🇫🇷 done",
    "👍🏽",
)


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZERS[name])


def ids_of(name: str, text: str) -> list[int]:
    return tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]


def decoded(name: str, ids: list[int]) -> str:
    return tokenizer_of(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    """What a reader sees after each token, and at the end."""
    pieces = []
    for token_id in ids:
        is_stopped = stream.push(token_id)
        pieces.append(stream.read())
        if is_stopped:
            return pieces
    stream.close()
    return [*pieces, stream.read(is_final=True)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_pieces_make_up_the_text_and_hold_whole_characters_only(name, text):
    """Catches half a character printed as a replacement sign, and spaces lost or doubled between pieces."""
    ids = ids_of(name, text)
    pieces = pieces_of(TextStream(tokenizer_of(name)), ids)
    assert "".join(pieces) == decoded(name, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_any_tokens_at_all_give_the_text_of_all_of_them(name):
    """A sampler's tokens need not be text: bytes out of order, special tokens, unfinished ends."""
    # Sentencepiece replaces a run of byte tokens as a whole when any of it is no UTF-8; by then a stream has shown the
    # run's valid beginning. Its ids below 259 are special tokens and bytes.
    lowest = 259 if name == "sentencepiece" else 0

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(lowest, len(tokenizer_of(name)) - 1), max_size=12))
    def check(ids: list[int]) -> None:
        stream = TextStream(tokenizer_of(name))
        assert "".join(pieces_of(stream, ids)) == stream.text == decoded(name, ids)

    check()


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("stop", ["upon a t", "little", "e, t", "Lily.", "O"])
def test_a_stop_string_across_tokens_ends_the_text_before_it(name, stop):
    """Catches a search in the newest piece only, and a search so far back that it costs more with every token."""
    text = TEXTS[0]
    stream = TextStream(tokenizer_of(name), stop_strings=("never", stop))
    pieces = pieces_of(stream, ids_of(name, text))
    assert stream.is_stopped
    full = decoded(name, ids_of(name, text))
    assert "".join(pieces) == stream.text == full[: full.index(stop)]


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_the_first_of_two_stop_strings_in_one_piece_wins(name):
    """Whatever their order in the request."""
    full = decoded(name, ids_of(name, "one two three"))
    for stops in (("three", "two"), ("two", "three")):
        stream = TextStream(tokenizer_of(name), stop_strings=stops)
        pieces_of(stream, ids_of(name, "one two three"))
        assert stream.text == full[: full.index("two")]


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_reading_never_shows_what_may_become_a_stop_string(name):
    """Text once shown cannot be taken back: every prefix shown must be one of the final text."""
    ids = ids_of(name, "aab aabb aabbc end")
    stream = TextStream(tokenizer_of(name), stop_strings=("aabbc",))
    shown = ""
    for piece in pieces_of(stream, ids):
        shown += piece
        assert not any(shown.endswith("aabbc"[:size]) for size in range(1, 6)) or stream.is_stopped
        assert stream.text.startswith(shown)
    assert shown == stream.text and stream.is_stopped


def test_what_looked_like_a_stop_string_is_shown_once_it_is_not():
    stream = TextStream(tokenizer_of("byte-level"), stop_strings=("upon a star",))
    pieces = pieces_of(stream, ids_of("byte-level", TEXTS[0]))
    assert "".join(pieces) == decoded("byte-level", ids_of("byte-level", TEXTS[0]))
