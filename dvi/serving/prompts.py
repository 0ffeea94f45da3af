"""From text to token ids, for the server: prompts and chats.

Knows a tokenizer and its chat template; knows nothing of requests. Chats are rendered by the model's own template, in
the sandbox of transformers. What users write stays text: `</s>` in a message is five characters and ends nothing.
"""

from __future__ import annotations

import re
from functools import lru_cache

import jinja2
from transformers import PreTrainedTokenizerBase

from dvi.decode.text import check_token_ids
from dvi.model.end_tokens import special_tokens

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
        # OpenAI's later word for system: the model's own only where its template has it.
        knows_developer = "developer" in str(tokenizer.chat_template)
        self._own_role = {} if knows_developer else {"developer": "system"}
        self._left_out = lru_cache(maxsize=1024)(self._find_left_out)

    def encode_all(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        """Ids of each, see `encode`; the error also names its place, as `prompt[1]: ...`."""
        return [self.encode_at(prompts, index) for index in range(len(prompts))]

    def encode_at(self, prompts: list[str] | list[list[int]], index: int) -> list[int]:
        """Ids of one of them, for the same words."""
        try:
            return self.encode(prompts[index])
        except ValueError as error:
            raise ValueError(f"prompt{f'[{index}]' if len(prompts) > 1 else ''}: {error}") from None

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

        A developer's messages are a system's where the template does not know the word. Raises ValueError, naming the
        message, for a model without a template, and for a chat that the template refuses or leaves a part of out.
        """
        if self._tokenizer.chat_template is None:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        if len(messages) > self._max_tokens:
            raise ValueError(
                f"messages: a chat must have at most {self._max_tokens} messages here, got {len(messages)}"
            )
        self._check_chars(sum(len(text) for _, text in messages))
        for index, (_, text) in enumerate(messages):
            if _CUT in text:
                raise ValueError(f"messages[{index}].content: must not hold the noncharacter U+FDD0")
        roles = tuple(self._own_role.get(role, role) for role, _ in messages)
        if left_out := self._left_out(roles):
            raise ValueError(
                f"messages[{left_out[0]}].role: the model's chat template leaves {roles[left_out[0]]} messages out; "
                "put its text into a user message"
            )
        chat = [
            {"role": role, "content": self._cut_special(text)} for role, (_, text) in zip(roles, messages, strict=True)
        ]
        try:
            rendered = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:  # what a template raises to refuse, such as roles that do not alternate
            raise ValueError(f"messages: the model's chat template refuses these: {error}"[:300]) from None
        # Piece by piece: no piece holds a special token that a message brought, all hold those of the template.
        pieces = self._tokenizer(rendered.split(_CUT), add_special_tokens=False)["input_ids"]
        return self._check([token_id for piece in pieces for token_id in piece])

    def _find_left_out(self, roles: tuple[str, ...]) -> list[int]:
        """Which messages of a chat with these roles do not get into what the model reads."""
        marks = [f"[message {index}]" for index in range(len(roles))]
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rendered = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:
            return []  # the chat itself will be refused, in the template's words
        return [index for index, mark in enumerate(marks) if mark not in rendered]

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
