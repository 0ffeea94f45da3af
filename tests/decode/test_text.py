"""Text as it grows: every piece is final, whole characters only, and no part of a stop string is ever shown."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dvi.decode.text import REPLACEMENT, TextStream
from dvi.model.end_tokens import end_token_ids
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_model

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


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("around", [("", ""), ("Lily", ""), ("", " was"), ("Lily", " was")])
def test_a_stop_string_may_name_a_special_token_that_no_text_shows(name, around):
    """Catches a stop string that can never be found since the tokens it names are not shown, and one that leaks."""
    tokenizer = tokenizer_of(name)
    before, after = ids_of(name, "There was Lily"), ids_of(name, " was")
    token_id = tokenizer.eos_token_id
    shown = decoded(name, before + after)
    gap = shown[len(decoded(name, before)) :].removesuffix("was")  # where the tokenizer writes a space, and where not
    stop = around[0] + tokenizer.eos_token + around[1].replace(" ", gap)
    stream = TextStream(tokenizer, stop_strings=("never", stop))
    pieces = pieces_of(stream, [*before, token_id, *after])
    assert stream.is_stopped
    assert "".join(pieces) == stream.text == decoded(name, before).removesuffix(around[0])


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_special_tokens_that_a_stop_string_names_are_shown_no_more_than_others(name):
    """Catches a stop string that makes special tokens visible, and text held back for ever after one."""
    tokenizer = tokenizer_of(name)
    ids = ids_of(name, "One day")
    ids = [*ids, tokenizer.eos_token_id, *ids]
    stream = TextStream(tokenizer, stop_strings=(tokenizer.eos_token + "never",))
    assert "".join(pieces_of(stream, ids)) == stream.text == decoded(name, ids)
    assert not stream.is_stopped


def test_everything_that_names_an_end_token_is_believed():
    """Catches an answer that goes on past the end that its chat template uses, because a config names another."""
    model = tiny_model("llama", num_layers=1, hidden_size=16)
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 6], 7
    assert end_token_ids(model, None) == [5, 6, 7]
    tokenizer = tokenizer_of("byte-level")
    assert end_token_ids(model, tokenizer) == sorted({5, 6, 7, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert end_token_ids(model, None) == []


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_offsets_behind_a_stop_string_are_the_end_and_told_with_their_text(name):
    """Catches offsets outside the text, and a stop string that gets out as tokens before it is complete."""
    stream = TextStream(tokenizer_of(name), stop_strings=("girl named",))
    told = []
    for token_id in ids_of(name, TEXTS[0]):
        if stream.push(token_id):
            break
        stream.read()
        told.append(stream.num_told)
        assert all(offset < len(stream.text) for offset in stream.offsets[: told[-1]])
    assert stream.text == "Once upon a time, there was a little "[: len(stream.text)]
    assert stream.offsets == sorted(stream.offsets) and stream.offsets[-1] == len(stream.text)
    assert told == sorted(told) and all(stream.offsets[index] < len(stream.text) for index in range(told[-1]))
