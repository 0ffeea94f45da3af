"""From text to token ids, for the server: prompts and chats.

Knows a tokenizer and its chat template; knows nothing of requests. Chats are rendered by the model's own template, in
the sandbox of transformers. What users write stays text: `</s>` in a message is five characters and ends nothing.
"""

from __future__ import annotations

import re

import jinja2
from transformers import PreTrainedTokenizerBase

from dvi.end_tokens import special_tokens
from dvi.text import check_token_ids

# A Unicode noncharacter, which no text for interchange holds: it marks where a message's special tokens are cut apart.
_CUT = "\ufdd0"


class PromptEncoder:
    """Token ids of prompts, within a limit.

    vocab_size: ids below it the model knows; its tokenizer may have made others.
    max_tokens: a longer prompt is refused; one that is hopelessly longer before it is tokenised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, max_tokens: int) -> None:
        self._tokenizer, self._vocab_size, self._max_tokens = tokenizer, vocab_size, max_tokens
        self._max_chars = max_tokens * max(map(len, tokenizer.get_vocab()))
        special = sorted(special_tokens(tokenizer).values())
        # After its first character, by lookahead: of overlapping special tokens each is cut.
        self._special = re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in special))

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Ids of a text as it is (special tokens in it count as such: it may be a rendered template), or the ids.

        Raises ValueError naming what does not fit.
        """
        if isinstance(prompt, str):
            self._check_chars(len(prompt))
            return self._check(self._tokenizer(prompt)["input_ids"])
        return self._check(prompt)

    def encode_chat(self, messages: list[tuple[str, str]]) -> list[int]:
        """Ids of a chat of (role, text), rendered by the model's template with room for the answer to follow.

        Raises ValueError for a model without a template, and for a chat that the template refuses.
        """
        if self._tokenizer.chat_template is None:
            raise ValueError("this model has no chat template; use /v1/completions")
        self._check_chars(sum(len(text) for _, text in messages))
        if any(_CUT in text for _, text in messages):
            raise ValueError("messages must not hold the noncharacter U+FDD0")
        chat = [{"role": role, "content": self._cut_special(text)} for role, text in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:  # what a template raises to refuse, such as roles that do not alternate
            raise ValueError(f"the model's chat template refuses these messages: {error}"[:300]) from None
        # Piece by piece: no piece holds a special token that a message brought, all hold those of the template.
        pieces = self._tokenizer(rendered.split(_CUT), add_special_tokens=False)["input_ids"]
        return self._check([token_id for piece in pieces for token_id in piece])

    def _cut_special(self, text: str) -> str:
        return self._special.sub(lambda found: found[0] + _CUT, text)

    def _check_chars(self, num_chars: int) -> None:
        if num_chars > self._max_chars:
            raise ValueError(f"a prompt must be at most {self._max_tokens} tokens here, got {num_chars} characters")

    def _check(self, ids: list[int]) -> list[int]:
        if not 1 <= len(ids) <= self._max_tokens:
            raise ValueError(f"a prompt must be 1 to {self._max_tokens} tokens here, got {len(ids)}")
        check_token_ids(ids, num_known=self._vocab_size, tokenizer=self._tokenizer)
        return ids
