"""Bodies: a field has its effect or is refused, and a refusal names the place that is wrong."""

from __future__ import annotations

import json

import pytest

from dvi.serving.api_schema import ChatBody, CompletionBody
from dvi.serving.body_reading import parse_body
from dvi.serving.prompts import PromptEncoder
from dvi.serving.protocol import ApiError
from tests.decode.test_text import tokenizer_of

PATHS = {CompletionBody: {"prompt": "x"}, ChatBody: {"messages": [{"role": "user", "content": "x"}]}}


def parsed(schema: type, **fields: object):
    return parse_body(json.dumps(PATHS[schema] | fields).encode(), schema)


def refused(schema: type, **fields: object) -> ApiError:
    with pytest.raises(ApiError) as found:
        parsed(schema, **fields)
    assert found.value.status == 400 and len(found.value.message) <= 300
    return found.value


def user(content: object, **more: object) -> dict:
    return {"role": "user", "content": content} | more


@pytest.mark.parametrize(
    ("schema", "fields", "place"),
    [
        (CompletionBody, {"prompt": ["a", 5]}, "prompt[1]: must be a valid string"),
        (CompletionBody, {"prompt": [7, 3, "a"]}, "prompt[2]: must be a valid integer"),
        (CompletionBody, {"prompt": [[7], [3, "a"]]}, "prompt[1][1]: must be a valid integer"),
        (CompletionBody, {"prompt": {}}, "prompt: must be a text, a list of texts, token ids"),
        (CompletionBody, {"stop": ["a", "b", 3]}, "stop[2]: must be a valid string"),
        (CompletionBody, {"stop": 3}, "stop: must be a text or a list of texts"),
        (CompletionBody, {"stop_token_ids": [1, -1]}, "stop_token_ids[1]: must be greater"),
        (CompletionBody, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage: "),
        (CompletionBody, {"dvi": {"polcy": "auto"}}, "dvi.polcy: "),
        (ChatBody, {"messages": [user("a"), user(3)]}, "messages[1].content: must be a text or a list of {type"),
        (ChatBody, {"messages": [user("a"), {"role": "user"}]}, "messages[1].content: is missing; it must be a text"),
        (ChatBody, {"messages": [user("a"), {"role": "tool", "content": "x"}]}, "messages[1].role: must be 'system'"),
        (ChatBody, {"messages": [user("a"), "b"]}, "messages[1]: must be"),
        (ChatBody, {"messages": [user([{"type": "text", "text": "a"}, {"type": "image_url"}])]},
         "messages[0].content[1].type: must be 'text'"),
        (ChatBody, {"messages": [user("a", tool_calls=[{}])]}, "messages[0].tool_calls is not supported"),
        (ChatBody, {"messages": [user("a"), user("b", name="Bob")]}, "messages[1].name is not supported"),
        (ChatBody, {"messages": [user([{"type": "text", "text": "a", "cache": 1}])]}, "messages[0].content[0].cache: "),
        (ChatBody, {"messages": []}, "messages: must be a list of {role, content}"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_place(schema, fields, place):
    """Catches a message that leaves a client to search its list for what is wrong."""
    error = refused(schema, **fields)
    assert error.message.startswith(place), error.message
    assert error.param == place.split(".")[0].split("[")[0].split(":")[0].split(" ")[0]


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"temprature": 0.5}, "did you mean temperature?"), ({"max_token": 3}, "did you mean max_tokens?"),
        ({"messages": []}, "only in /v1/chat/completions"), ({"x": 1}, "there is no such field here; leave it out"),
        ({"a\u202e" + "b" * 500: 1}, "there is no such field here"),
    ],
)  # fmt: skip
def test_a_field_that_nobody_knows_is_refused_with_what_was_meant(fields, hint):
    """Catches a mistyped setting that is passed over, and a client's long or hostile word in an error."""
    error = refused(CompletionBody, **fields)
    assert hint in error.message and error.message.isprintable() and len(error.message) < 150


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": True}, {"n": 2, "best_of": 3}, {"store": True}, {"service_tier": "flex"}, {"echo": 0},
        {"parallel_tool_calls": False}, {"min_tokens": 1}, {"logit_bias": {"5": 1}}, {"modalities": ["audio"]},
        {"response_format": {"type": "json_schema"}}, {"tool_choice": "required"}, {"stream_options": {}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}}, {"suffix": "x"}, {"priority": 1},
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(fields):
    """Catches a value that means something else than leaving the field out, also where 0 equals False."""
    error = refused(CompletionBody, **fields)
    assert error.param in fields and error.param in error.message


def test_what_means_the_same_as_nothing_is_as_good_as_left_out():
    """Catches refusing what OpenAI's own client writes into a chat that it continues."""
    turn = {
        "role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "tool_calls": None, "name": None,
    }  # fmt: skip
    neutral = {
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "n": 2,
        "modalities": ["text"], "store": False, "service_tier": "default", "user": "u", "metadata": {"a": "b"},
        "stop": None, "unknown": None, "top_k": -1, "best_of": 2, "min_tokens": 0, "frequency_penalty": 0,
        "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False},
    }  # fmt: skip
    body = parsed(ChatBody, messages=[user("a"), turn, user([{"type": "text", "text": "b", "x": None}])], **neutral)
    assert [(m.role, m.text) for m in body.messages] == [("user", "a"), ("assistant", "hi"), ("user", "b")]
    assert body.wants_usage and body.num_answers == 2


# Roles


def rendered(template: str, *messages: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    tokenizer = tokenizer_of("byte-level")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encoder = PromptEncoder(tokenizer, vocab_size=len(tokenizer), max_tokens=200)
    return tokenizer.decode(encoder.encode_chat(list(messages)))


ALL = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
NO_SYSTEM = "{% for m in messages if m['role'] in ('user', 'assistant') %}{{ m['content'] | trim }};{% endfor %}"
FIRST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }};{% endif %}"
    "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }};{% endfor %}"
)


def test_a_developer_is_a_system_where_the_template_does_not_know_the_word(monkeypatch):
    """Catches a role that the model has never seen, and one of its own that it is not given."""
    chat = [("developer", "Be brief."), ("user", "Hi")]
    assert "system=Be brief.;user=Hi;" in rendered(ALL, *chat, monkeypatch=monkeypatch)
    own = "{# developer #}" + ALL
    assert "developer=Be brief.;user=Hi;" in rendered(own, *chat, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("template", "chat", "place"),
    [
        (NO_SYSTEM, [("system", "a"), ("user", "b")], 0), (NO_SYSTEM, [("developer", "a"), ("user", "b")], 0),
        (NO_SYSTEM, [("user", "b"), ("system", "b"), ("user", "c")], 1),
        (FIRST_SYSTEM, [("system", "a"), ("user", "b"), ("system", "c")], 2),
    ],
)  # fmt: skip
def test_a_message_that_the_template_leaves_out_is_refused(monkeypatch, template, chat, place):
    """Catches instructions that the model never reads, wherever they stand and whatever they say."""
    with pytest.raises(ValueError, match=rf"messages\[{place}\]\.role: the model's chat template leaves system"):
        rendered(template, *chat, monkeypatch=monkeypatch)


def test_what_the_template_does_read_is_let_through(monkeypatch):
    """Catches refusing a chat because a template trims its texts, or writes a first system message elsewhere."""
    assert "b;" in rendered(NO_SYSTEM, ("user", " b "), ("assistant", "c"), ("user", "d"), monkeypatch=monkeypatch)
    assert "a;b;" in rendered(FIRST_SYSTEM, ("system", "a"), ("user", "b"), monkeypatch=monkeypatch)


def test_prompts_and_messages_are_named_by_their_places(monkeypatch):
    """Catches "a prompt is too long" where there are sixty."""
    tokenizer = tokenizer_of("byte-level")
    encoder = PromptEncoder(tokenizer, vocab_size=100, max_tokens=5)
    with pytest.raises(ValueError, match=r"prompt\[1\]: token ids must be integers in 0\.\.99"):
        encoder.encode_all([[1], [100]])
    with pytest.raises(ValueError, match=r"prompt\[2\]: a prompt must be 1 to 5 tokens here, got 6"):
        encoder.encode_all([[1], [2], [3] * 6])
    with pytest.raises(ValueError, match=r"^prompt: a prompt must be 1 to 5 tokens"):
        encoder.encode_all([[]])
    with pytest.raises(ValueError, match=r"messages\[1\]\.content: must not hold"):
        rendered(ALL, ("user", "a"), ("user", "b\ufdd0"), monkeypatch=monkeypatch)
