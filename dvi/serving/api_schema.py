"""The bodies that clients send, and the settings of requests that follow from them.

Knows the fields of OpenAI's completions API that have an effect here, the server's limits and error words; knows
nothing of HTTP connections, text or the engine. The fields that have none are refused by `body_reading`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dvi.draft.catalogue import GOODPUT_BUCKETS
from dvi.records import SamplingParams
from dvi.seeds import SEED_SPAN, answer_seed
from dvi.serving.protocol import ApiError, invalid
from dvi.serving.request import DEFAULT_DRAFTER, DraftChoice
from dvi.settings import DraftSettings, PolicyName, RequestSettings, ServeSettings

MAX_DRAFT_TOKENS = GOODPUT_BUCKETS[-1]
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # below: logits / temperature overflows, and it is greedy all the same
MAX_PENALTY = 100.0
SAMPLED_BY = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip

class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class StreamOptions(_Body):
    include_usage: bool = False


class DviOptions(BaseModel):
    """Our own part of a request: how it is drafted for, whether it is learnt from, and a label for the figures."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    policy: PolicyName | None = None
    num_draft_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | None = None
    train: bool = True
    domain: Annotated[str, Field(pattern=r"\A[a-z0-9_-]{0,32}\z")] = ""


class GenerationBody(_Body):
    """What both endpoints share. None is the server's default, but for `seed`: without one the draws are fresh."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Texts | None = Field(None, description="a text or a list of texts")
    stop_token_ids: TokenIds | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    presence_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1 / MAX_PENALTY, le=MAX_PENALTY)] | None = None
    ignore_eos: bool | None = None
    dvi: DviOptions = DviOptions()

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n


class CompletionBody(GenerationBody):
    """POST /v1/completions. logprobs: how many likeliest tokens to give beside the chosen one."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="a text, a list of texts, token ids, or a list of token ids"
    )
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one: a text or token ids each."""
        is_single = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if is_single else self.prompt

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description="a text or a list of {type: text, text}"
    )

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] = Field(
        description="a list of {role, content}: role system, developer, user or assistant, content text"
    )
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class NameBody(BaseModel):
    """An admin's choice of an adapter."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    name: str


class SaveBody(NameBody):
    """An admin's name for what is saved, and whether an adapter of that name may lose its place."""

    overwrite: bool = True


class VersionBody(BaseModel):
    """An admin's choice of a drafter version; None leaves it to the server."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    version: int | None = None


class KeyBody(BaseModel):
    """An admin's choice of an API key, by its name."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    key: str


def sampling_params(body: GenerationBody, defaults: RequestSettings, *, max_new_tokens: int) -> list[SamplingParams]:
    """The settings of each answer of this body, prompt by prompt: answer i to a prompt draws with (seed, i).

    With a seed, and a temperature, the answer's tokens are a function of seed and prompt whatever the drafter has
    learnt meanwhile (shared Gumbel noise); without one draws are fresh and rejection sampling accepts more.
    max_new_tokens: of these answers, see `new_tokens`. Raises ApiError for what is out of bounds.
    """
    num_prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
    chosen = {name: getattr(body, name) for name in SAMPLED_BY if getattr(body, name) is not None}
    chosen["top_k"] = max(chosen.get("top_k", defaults.top_k), 0)  # -1 is off, in other servers' words
    stop = defaults.stop_strings if body.stop is None else (body.stop,) if isinstance(body.stop, str) else body.stop
    if 0 < (body.temperature or 0) < MIN_TEMPERATURE:
        raise invalid(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}", param="temperature")
    try:
        first = SamplingParams(
            **dataclasses.asdict(defaults) | chosen
            | {"max_new_tokens": max_new_tokens, "stop_strings": tuple(stop), "seed": body.seed or 0},
            stop_token_ids=tuple(body.stop_token_ids or ()), ignore_eos=bool(body.ignore_eos),
        )
        if body.seed is not None and not first.is_greedy:
            first = dataclasses.replace(first, coupling="gumbel")
        if body.seed is None:
            seeds = [secrets.randbelow(SEED_SPAN) for _ in range(num_prompts * body.num_answers)]
        else:
            seeds = [answer_seed(body.seed, i) for i in range(body.num_answers)] * num_prompts
        return [dataclasses.replace(first, seed=seed) for seed in seeds]
    except ValueError as error:
        raise refusal(error) from None


def refusal(error: ValueError) -> ApiError:
    """400 with the error's words, which begin with the name of the field."""
    name = re.match(r"\w*", str(error))[0]
    is_field = name in CompletionBody.model_fields or name in ChatBody.model_fields
    return invalid(str(error)[:300], param=name if is_field else None)


def draft_choice(
    body: GenerationBody, settings: DraftSettings, *, drafter: str = DEFAULT_DRAFTER, has_plan: bool = False
) -> DraftChoice:
    """has_plan: the server's own number of draft tokens gives way to a plan's."""
    options = body.dvi
    is_ours = options.num_draft_tokens is None
    return DraftChoice(
        drafter, options.policy or settings.policy, settings.num_draft_tokens if is_ours else options.num_draft_tokens,
        may_draft_less=is_ours and has_plan,
    )


def check_limits(body: GenerationBody, limits: ServeSettings, *, vocab_size: int) -> None:
    """Raises ApiError for what is more than the server gives one request, or cannot come; before any text is tokenised.

    vocab_size: of the model's tokens.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    asked = {
        "n": (body.num_answers, 1, limits.max_n),
        "stop": (len(stop), 0, limits.max_stop),
        "stop_token_ids": (len(body.stop_token_ids or ()), 0, limits.max_stop),
        "logprobs": (body.num_logprobs or 0, 0, limits.max_logprobs),
    }
    num_prompts = 1
    if isinstance(body, CompletionBody):
        num_prompts = len(body.prompts)
        asked["prompt"] = (num_prompts, 1, limits.max_prompts)
    for name, (number, least, most) in asked.items():
        if not least <= number <= most:
            raise invalid(f"{name}: must be {least} to {most} here, got {_short(number)}", param=name)
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= limits.max_stop_chars:
            name = "stop" if isinstance(body.stop, str) else f"stop[{index}]"
            bound = f"1 to {limits.max_stop_chars} characters"
            raise invalid(f"{name}: must be a text of {bound} here, got {len(text)}", param="stop")
    for index, token_id in enumerate(body.stop_token_ids or ()):
        if token_id >= vocab_size:
            bound = f"0 to {vocab_size - 1}, one of the model's tokens"
            raise invalid(f"stop_token_ids[{index}]: must be {bound}, got {token_id}", param="stop_token_ids")
    num_answers = num_prompts * body.num_answers
    most = limits.max_rows + limits.max_waiting  # more would find no place even in an empty server
    if num_answers > most:
        raise invalid(f"prompts times n must be at most {most} here, got {num_answers}", param="n")


def new_tokens(body: GenerationBody, defaults: RequestSettings, *, cap: int | None, room: int) -> int:
    """How many tokens each answer may have. room: what the longest prompt leaves of the context.

    The server's default shrinks to the room and the cap. Raises ApiError where the client asked for more than those.
    """
    name, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    most = min(room, math.inf if cap is None else cap)
    if asked is None:
        return min(defaults.max_new_tokens, most)
    if not 1 <= asked <= most:
        raise invalid(f"{name}: must be 1 to {most} for this prompt, got {_short(asked)}", param=name)
    return asked


def _short(number: int) -> str:
    """A number as text; an absurd one does not fill the message."""
    return str(number) if abs(number) < 10**18 else "a huge number"
