"""From a body's bytes to its fields: what may be in one, and which place a refusal names.

Knows the fields of OpenAI's API beyond ours; knows nothing of what ours mean. A field is accepted for its effect.
One that has none here is refused by name, unless its value is what leaving it out means, or it only says who asks.
Whatever a client sent is never repeated whole.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from dvi.serving.api_schema import ChatBody, ChatMessage, CompletionBody, DviOptions, GenerationBody, TextPart
from dvi.serving.protocol import ApiError, invalid

# A template is code. One from a client is refused under every name and at every depth.
_TEMPLATE_FIELDS = {"chat_template", "chat_template_kwargs", "chat_template_args", "jinja_template"}
# What says who asks, or is the sender's own note: nothing that an answer could show.
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
# Fields without an effect here, with the values that mean the same as none.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True,),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "echo": (False,), "suffix": ("",), "best_of": (1,), "modalities": (["text"],), "audio": (), "prediction": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
    "use_beam_search": (False,), "prompt_logprobs": (), "prompt_embeds": (), "min_tokens": (0,), "bad_words": ([],),
    "allowed_token_ids": (), "truncate_prompt_tokens": (), "continue_final_message": (False,),
    "add_generation_prompt": (True,), "documents": ([],), "length_penalty": (1,), "typical_p": (1,),
    "skip_special_tokens": (True,), "template": (), "reasoning_effort": ("none",), "web_search_options": (),
    "store": (False,), "service_tier": ("auto", "default"), "verbosity": ("medium",), "priority": (0,),
}  # fmt: skip
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "name": (), "refusal": (), "annotations": ([],), "tool_calls": ([],), "tool_call_id": (), "function_call": (),
    "audio": (), "reasoning_content": ("",),
}  # fmt: skip
_UNSUPPORTED_OF_STREAMS: dict[str, tuple[Any, ...]] = {
    "include_obfuscation": (False,), "continuous_usage_stats": (False,),
}  # fmt: skip
_SHOWN_CHARS = 40  # of a client's own words in an error

SPARE_CONTAINERS, CONTAINERS_PER_ITEM = 1000, 4  # how many objects and lists a body may hold

Body = TypeVar("Body", bound=BaseModel)


def parse_body(content: bytes, schema: type[Body], *, max_items: int = 100) -> Body:
    """The body that this JSON text holds. Raises ApiError 400 naming the place that is wrong.

    max_items: of a list, such as messages or token ids. A longer one is refused before anything is made of it: a body
    within the limit of bytes may hold a million items, and everybody waits while they are looked at.
    """
    try:
        document = from_json(content, allow_inf_nan=False)
    except ValueError as error:  # also NaN, lone surrogates, too deep nesting and endless numbers
        raise invalid(f"the body must be valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    if issubclass(schema, GenerationBody):
        _check_size(document, max_items)
        _refuse_templates(document)
        document = _without_neutral(document, schema)
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False, include_context=False), schema) from None


def _check_size(document: dict[str, Any], max_items: int) -> None:
    num_left = SPARE_CONTAINERS + CONTAINERS_PER_ITEM * max_items
    for name, field in document.items():
        waiting, param = [field] if isinstance(field, dict | list) else [], _shown(name)
        while waiting:
            value, num_left = waiting.pop(), num_left - 1
            if isinstance(value, list) and len(value) > max_items:
                raise invalid(f"{param}: lists must hold at most {max_items} items here, got {len(value)}", param=param)
            if num_left < 0:
                raise invalid(f"{param}: there are too many objects and lists in this body", param=param)
            items = value if isinstance(value, list) else value.values()
            waiting += [item for item in items if isinstance(item, dict | list)]


def _refuse_templates(document: dict[str, Any]) -> None:
    waiting: list[Any] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if found := _TEMPLATE_FIELDS & value.keys():
                name = min(found)
                message = f"{name} is refused: chats are rendered by the model's own template"
                raise ApiError(400, message, code="unsupported", param=name)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(item for item in value if isinstance(item, dict | list))


def _without_neutral(document: dict[str, Any], schema: type[GenerationBody]) -> dict[str, Any]:
    """The document without what changes nothing. Raises ApiError for a field that has no effect here."""
    document = {name: value for name, value in document.items() if name not in _LABELS}
    unsupported = _UNSUPPORTED | {"best_of": (1, document.get("n") or 1)}  # the best of as many as are asked for
    document = _checked(document, "", schema, unsupported)
    if isinstance(options := document.get("stream_options"), dict):
        if document.get("stream") is not True:
            raise invalid("stream_options: needs stream to be true; leave it out", param="stream_options")
        document["stream_options"] = _checked(
            options, "stream_options.", schema.model_fields["stream_options"].annotation.__args__[0],
            _UNSUPPORTED_OF_STREAMS,
        )
    if schema is ChatBody and isinstance(messages := document.get("messages"), list):
        document["messages"] = [
            _checked_message(message, f"messages[{index}].") if isinstance(message, dict) else message
            for index, message in enumerate(messages)
        ]
    return document


def _checked_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    message = _checked(message, where, ChatMessage, _UNSUPPORTED_IN_MESSAGES)
    if isinstance(parts := message.get("content"), list):
        message["content"] = [
            _checked(part, f"{where}content[{index}].", TextPart, {}) if isinstance(part, dict) else part
            for index, part in enumerate(parts)
        ]
    return message


def _checked(
    fields: dict[str, Any], where: str, schema: type[BaseModel], unsupported: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Those of the fields that the schema knows. The others must be neutral: null, or a value that means the same."""
    others = fields.keys() - schema.model_fields.keys()
    for name in sorted(others, key=lambda name: (name not in unsupported, name)):
        value = fields[name]
        if value is None or any(_is_same(value, neutral) for neutral in unsupported.get(name, ())):
            continue
        path = where + _shown(name)
        param = re.match(r"\w*", path)[0]
        if name in unsupported or name in _UNSUPPORTED:
            raise ApiError(400, f"{path} is not supported; leave it out", code="unsupported", param=param)
        hint = _hint(name, schema)
        raise ApiError(400, f"{path}: there is no such field here{hint}; leave it out", code="unsupported", param=param)
    return {name: value for name, value in fields.items() if name in schema.model_fields}


def _is_same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _hint(name: str, schema: type[BaseModel]) -> str:
    for other, address in ((ChatBody, "/v1/chat/completions"), (CompletionBody, "/v1/completions")):
        if issubclass(schema, GenerationBody) and name in other.model_fields:
            return f", only in {address}"
    close = difflib.get_close_matches(name[:_SHOWN_CHARS], schema.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(word: str) -> str:
    """A client's word, short and on one line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in word[:_SHOWN_CHARS])


# Names in a complaint's address; between them pydantic puts those of the types that it tried.
_NAMES = {
    name
    for schema in (CompletionBody, ChatBody, ChatMessage, TextPart, DviOptions, GenerationBody)
    for name in schema.model_fields
} | {"include_usage", "name", "version", "key"}


def _refusal(errors: list[ErrorDetails], schema: type[BaseModel]) -> ApiError:
    """The complaint that got furthest: of several types that a value may have, the one that it was meant to be."""
    error = max(errors, key=lambda error: [part for part in error["loc"] if isinstance(part, int)])
    path, described = "", None
    for part in error["loc"]:
        if isinstance(part, int):
            path, described = f"{path}[{part}]", None
        elif part in _NAMES or error["type"] == "extra_forbidden":
            path = f"{path}.{_shown(part)}" if path else _shown(part)
            described = next(
                (s.model_fields[part].description for s in (schema, ChatMessage) if part in s.model_fields), None
            )
    problem = f"must be {described}" if described else error["msg"].replace("Input should be", "must be", 1)
    if error["type"] == "missing":
        problem = f"is missing{f'; it must be {described}' if described else ''}"
    return invalid(f"{path}: {problem}"[:300], param=str(error["loc"][0]) if error["loc"] else None)
