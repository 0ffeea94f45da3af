"""Each token by itself, as bytes and as words: for log-probabilities, which are of tokens and not of characters.

Knows a tokenizer; knows nothing of requests. Vocabularies spell bytes in alphabets of their own ("Ġ" for a space,
"<0x0A>" for a line's end): none of those spellings gets out.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from dvi.model.end_tokens import special_tokens

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """text(id) and bytes(id) of single tokens, the space before a word included; special tokens as they are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._written = special_tokens(tokenizer) | {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
        self._byte_of = byte_alphabet() if _is_byte_level(tokenizer) else None
        # Decoded after another token: some tokenizers drop the space of a text's first word.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._skip = len(tokenizer.decode(self._before))
        self.bytes = lru_cache(maxsize=65536)(self._bytes)

    def text(self, token_id: int) -> str:
        """Its characters; where it is only part of one, its bytes as `bytes:\\xf0\\x9f`, as OpenAI writes them."""
        content = self.bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _bytes(self, token_id: int) -> bytes:
        """What it adds to a text; b"" for an id without a token."""
        if token_id in self._written:
            return self._written[token_id].encode()
        word = self._tokenizer.convert_ids_to_tokens(token_id)
        if word is None:
            return b""
        if self._byte_of is not None and all(letter in self._byte_of for letter in word):
            return bytes(self._byte_of[letter] for letter in word)
        if found := _FALLBACK.fullmatch(word):
            return bytes([int(found[1], 16)])
        text = self._tokenizer.decode([*self._before, token_id], clean_up_tokenization_spaces=False)
        return text[self._skip :].encode()


def byte_alphabet() -> dict[str, int]:
    """The letter that byte-level vocabularies spell each byte with, and that byte: GPT-2's table."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return hasattr(tokenizer, "byte_decoder")
    decoder = json.loads(backend.decoder.__getstate__())
    return any(step["type"] == "ByteLevel" for step in [decoder, *decoder.get("decoders", [])])
