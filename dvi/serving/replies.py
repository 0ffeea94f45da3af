"""From the engine's news to OpenAI's response objects, whole or chunk by chunk.

Knows the shapes of both endpoints; knows nothing of HTTP or of how tokens come about. Beside OpenAI's fields every
reply has metrics.speculative_decoding, with vLLM's names where vLLM has one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dvi.records import RoundStats
from dvi.serving.request import RequestOutput, TokenLogprobs

if TYPE_CHECKING:
    from dvi.serving.token_texts import TokenTexts


@dataclass
class _Choice:
    """What has come of one answer."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    num_tokens: int = 0
    last: RequestOutput | None = None


class Reply:
    """One response as it grows.

    prompt_tokens  of each prompt. num_answers: to each; choice i is answer i % num_answers to prompt i // num_answers.
    tokens         text and bytes of a token id, for log-probabilities; has_logprobs says whether they were asked for.
    """

    def __init__(
        self, *, is_chat: bool, model: str, prompt_tokens: list[int], num_answers: int, has_logprobs: bool,
        tokens: TokenTexts,
    ) -> None:
        self._is_chat, self._has_logprobs, self._tokens = is_chat, has_logprobs, tokens
        self._prompt_tokens, self._num_answers = sum(prompt_tokens), num_answers
        self._choices = [_Choice() for _ in range(len(prompt_tokens) * num_answers)]
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def take(self, index: int, output: RequestOutput) -> None:
        """Adds news of choice `index`, for `whole`."""
        choice = self._choices[index]
        choice.text.append(output.text)
        choice.logprobs += output.logprobs
        choice.text_offsets += output.text_offsets
        self._count(choice, output)

    def whole(self) -> dict[str, Any]:
        """The response object, once every choice has ended."""
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.text)
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            logprobs = self._logprobs(choice.logprobs, choice.text_offsets)
            choices.append(
                {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.last.finish_reason}
            )
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(), "metrics": self._metrics()}

    def opening(self) -> Iterable[dict[str, Any]]:
        """The chunks before any text: in a chat, who speaks."""
        if self._is_chat:
            for index in range(len(self._choices)):
                yield self._chunk([self._piece(index, {"role": "assistant", "content": ""}, None, None)])

    def chunk(self, index: int, output: RequestOutput, *, is_last: bool = False) -> dict[str, Any] | None:
        """The chunk of this news; None when it holds nothing to show. is_last: it ends the stream, with the metrics."""
        choice = self._choices[index]
        self._count(choice, output)
        if not (output.text or output.logprobs or output.finish_reason):
            return None
        content = output.text
        if self._is_chat:
            content = {"content": output.text} if output.text else {}
        logprobs = self._logprobs(output.logprobs, output.text_offsets)
        chunk = self._chunk([self._piece(index, content, logprobs, output.finish_reason)])
        return chunk | {"metrics": self._metrics()} if is_last else chunk

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for usage."""
        return self._chunk([]) | {"usage": self._usage(), "metrics": self._metrics()}

    def _count(self, choice: _Choice, output: RequestOutput) -> None:
        choice.num_tokens += len(output.token_ids)
        choice.last = output

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _piece(self, index: int, content: Any, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        name = "delta" if self._is_chat else "text"
        return {"index": index, name: content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _usage(self) -> dict[str, Any]:
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        # Of each prompt's first answer: the others may find the prompt in the cache because that one is there.
        cached_tokens = sum(choice.last.num_cached_tokens for choice in self._choices[:: self._num_answers])
        return {
            "prompt_tokens": self._prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }  # fmt: skip

    def _metrics(self) -> dict[str, Any]:
        last = [choice.last for choice in self._choices if choice.last is not None]
        return {"speculative_decoding": speculative_decoding(last)}

    def _logprobs(self, tokens: list[TokenLogprobs], offsets: list[int]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        if self._is_chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        texts = [self._tokens.text(token.token_id) for token in tokens]
        # OpenAI's also holds the chosen token, whether or not it is among the likeliest.
        top = [((token.token_id, token.logprob), *token.top) for token in tokens]
        return {
            "tokens": texts, "token_logprobs": [token.logprob for token in tokens], "text_offset": offsets,
            "top_logprobs": [{self._tokens.text(i): logprob for i, logprob in pairs} for pairs in top],
        }  # fmt: skip

    def _chat_logprob(self, token: TokenLogprobs) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            content = self._tokens.bytes(token_id)
            return {"token": self._tokens.text(token_id), "logprob": logprob, "bytes": list(content)}

        return entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]}


def speculative_decoding(outputs: list[RequestOutput]) -> dict[str, Any]:
    """Raw counts and two ratios of one response's answers together.

    num_spec_steps         rounds: verify passes, each with a draft of any length, also none.
    num_accepted_draft_tokens  of the drafted ones; the answers have them.
    num_tokens_past_end    what verdicts gave behind the ends of answers: in none of the other numbers.
    num_waived_draft_tokens  of the accepted ones, those that a lossy verify rule alone let pass.
    accepted_per_depth     of drafted_per_depth, which counts the depths that were reached.
    mean_acceptance_length new tokens per verify pass, the recovered or bonus token counted.
    """
    total = RoundStats()
    for output in outputs:
        if output.stats is not None:
            total.add(output.stats)
    return {
        "num_spec_steps": total.num_rounds, "num_draft_tokens": total.num_drafted,
        "num_accepted_draft_tokens": total.num_accepted, "num_waived_draft_tokens": total.num_waived,
        "num_tokens_past_end": total.num_accepted_past_end, "draft_acceptance_rate": total.acceptance_rate,
        "mean_acceptance_length": total.mean_accepted_tokens, "drafted_per_depth": total.drafted_per_depth,
        "accepted_per_depth": total.accepted_per_depth,
        "drafter_version": max((output.drafter_version for output in outputs), default=0),
        "level": outputs[0].level if outputs else None,
        "verify_rule": outputs[0].verify_rule if outputs else None,
    }  # fmt: skip
