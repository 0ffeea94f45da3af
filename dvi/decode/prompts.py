"""Prompts: text, chat messages or token ids, to the ids that a model reads.

Knows a tokenizer and the bounds of a model; knows nothing of requests or decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dvi.decode.text import check_token_ids
from dvi.model.chat_templates import render_chat
from dvi.model.context import max_positions_of, why_shorter
from dvi.traffic import Messages, as_text, why_no_text

Prompt = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True)
class PromptEncoder:
    """Token ids of prompts for one model.

    tokenizer      None takes token ids alone.
    config         the text model's, which bounds the context.
    num_input_ids  ids below it have an embedding.
    """

    tokenizer: PreTrainedTokenizerBase | None
    config: PretrainedConfig
    num_input_ids: int

    @property
    def max_positions(self) -> int:
        """The model's context, prompt and answer together; less where `dvi.model.context` says why."""
        return max_positions_of(self.config)

    def need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ValueError where there is none, naming what needs it."""
        if self.tokenizer is None:
            raise ValueError(f"{what} need a tokenizer; give token ids")
        return self.tokenizer

    def encode(self, prompt: Prompt, *, max_tokens: int | None = None) -> list[int]:
        """See `SelfSpeculator.encode`."""
        if isinstance(prompt, str):
            _check_characters(prompt, "the text")
            ids = self.need_tokenizer("text prompts")(prompt)["input_ids"]
        elif prompt and isinstance(prompt[0], dict):
            tokenizer = self.need_tokenizer("chat messages")
            if tokenizer.chat_template is None:
                raise ValueError("this model has no chat template; give the prompt as text")
            for index, message in enumerate(prompt):
                _check_characters(message.get("content"), f"messages[{index}].content")
            text = render_chat(tokenizer, prompt)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = list(prompt)
        limit = self.max_positions
        if not ids:
            raise ValueError("a prompt must hold at least 1 token, got an empty one")
        check_token_ids(ids, num_known=self.num_input_ids, tokenizer=self.tokenizer)
        if max_tokens is not None:
            ids = ids[-max_tokens:]
        if len(ids) >= limit:
            reason = why_shorter(self.config)
            because = "" if reason is None else f": {reason}"
            raise ValueError(
                f"a prompt must be shorter than the model's context of {limit} tokens, got {len(ids)}{because}"
            )
        return ids

    def encode_all(self, prompts: list[Prompt]) -> Iterator[list[int]]:
        """Of each prompt. Raises ValueError for the first that cannot be decoded, naming its place."""
        for index, prompt in enumerate(prompts):
            try:
                yield self.encode(prompt)
            except ValueError as error:
                where = getattr(prompt, "where", "") or (f"prompts[{index}]" if len(prompts) > 1 else "")
                raise ValueError(f"{where}: {error}" if where else str(error)) from error

    def encode_request(self, messages: Messages, *, max_new_tokens: int) -> tuple[list[int], bool]:
        """See `SelfSpeculator.encode_request`."""
        room = self.max_positions - max_new_tokens - 1
        if room < 1:
            raise ValueError(
                f"max_new_tokens, of answers and of eval, must be at most {self.max_positions - 2} for the model's "
                f"context of {self.max_positions}, got {max_new_tokens}; try {self.max_positions // 2}"
            )
        prompt = messages if self.need_tokenizer("chat messages").chat_template is not None else as_text(messages)
        ids = self.encode(prompt, max_tokens=room + 1)  # one more tells a longer prompt from one that fits
        return ids[-room:], len(ids) > room


def is_one_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], (int, dict))


def _check_characters(text: object, name: str) -> None:
    """Raises ValueError for what a tokenizer does not take: it would say that it got no string."""
    if isinstance(text, str) and (reason := why_no_text(text)) is not None:
        raise ValueError(f"{name} {reason}")
