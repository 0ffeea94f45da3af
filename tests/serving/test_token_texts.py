"""Single tokens as bytes and words: nothing of how a vocabulary spells them may get out."""

from __future__ import annotations

import functools

import pytest
from transformers import PreTrainedTokenizerBase

from dvi.decode.text import TextStream
from dvi.serving.token_texts import TokenTexts, byte_alphabet
from tests.decode.test_text import TEXTS, TOKENIZERS, ids_of, pieces_of, tokenizer_of


@functools.cache
def texts_of(name: str) -> TokenTexts:
    return TokenTexts(tokenizer_of(name))


def joined(name: str, ids: list[int]) -> bytes:
    return b"".join(texts_of(name).bytes(token_id) for token_id in ids)


@pytest.mark.parametrize("text", [*TEXTS, "🦊🐻" * 3, "\x00\x7f\u00ad\u0120"])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(name, text):
    """Catches "ðŁ¦Ĭ" for a fox, "<0x0A>" for a line's end, and parts of characters turned into replacement signs."""
    # A first word may be given a space that the text does not have.
    assert joined(name, ids_of(name, text)).decode() in (text, " " + text)


@pytest.mark.parametrize("text", [*TEXTS, "🦊🐻" * 3])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_offsets_are_where_in_the_text_each_token_begins(name, text):
    """Catches offsets that count bytes, a vocabulary's own spelling, or a space that the text does not begin with."""
    ids, stream = ids_of(name, text), TextStream(tokenizer_of(name))
    pieces_of(stream, ids)
    num_added = len(joined(name, ids).decode()) - len(stream.text)
    complete = [len(joined(name, ids[:count]).decode(errors="ignore")) for count in range(len(ids))]
    assert stream.offsets == [max(count - num_added, 0) for count in complete]


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_every_token_has_a_word_of_its_own_bytes(name):
    """Catches parts of characters that cannot be told apart, and ids beyond the vocabulary that raise."""
    texts, tokenizer = texts_of(name), tokenizer_of(name)
    for token_id in range(len(tokenizer)):
        content, word = texts.bytes(token_id), texts.text(token_id)
        if word.startswith("bytes:"):
            assert bytes.fromhex(word.removeprefix("bytes:").replace("\\x", "")) == content
        else:
            assert word.encode() == content
    assert texts.text(10**6) == "" and texts.bytes(10**6) == b""


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_special_tokens_are_as_they_are_written(name):
    """Catches an end token without bytes, or spelt letter by letter."""
    tokenizer: PreTrainedTokenizerBase = tokenizer_of(name)
    assert texts_of(name).text(tokenizer.eos_token_id) == tokenizer.eos_token
    assert texts_of(name).bytes(tokenizer.eos_token_id) == tokenizer.eos_token.encode()


def test_the_alphabet_has_a_letter_for_every_byte():
    """Catches a byte that no letter stands for: its tokens would be taken for text."""
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256)) and len(alphabet) == 256
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"], alphabet["ð"]) == (65, 32, 10, 0xF0)
