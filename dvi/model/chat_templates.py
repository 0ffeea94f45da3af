"""How messages become a prompt for models whose tokenizer does not say.

Knows text and templates, and no models. vicuna_v1.1 as FastChat writes it, which is how Spec-Bench prompts every model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_STOP = "</s>"
_PROBE = "dviprobe"  # in no template's own words

# For `tokenizer.chat_template`. An answer of no text has no end mark, in FastChat neither.
VICUNA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}" + VICUNA_SYSTEM + "{% endif %} "
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} ASSISTANT:"
    "{% elif message.role == 'assistant' and message.content %} {{ message.content }}" + VICUNA_STOP + "{% endif %}"
    "{% endfor %}"
)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The messages as the tokenizer's own template puts them, with room for the answer to follow.

    Raises ValueError where the template refuses them, or leaves one out that says something.
    """

    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    try:
        text = render(messages)
    except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:  # as roles that do not take turns
        raise ValueError(f"the model's chat template refuses these messages: {error or type(error).__name__}") from None
    for index, message in enumerate(messages):
        if not isinstance(message.get("content"), str) or message["content"].strip() in text:
            continue
        # A template may change a text, such as leave out what an assistant thought; a plain word it does not.
        probe = [*messages[:index], message | {"content": _PROBE}, *messages[index + 1 :]]
        if _PROBE not in render(probe):
            raise ValueError(
                f"the model's chat template leaves out messages[{index}], whose role is {message['role']!r}; "
                "put its text into the user's message"
            )
    return text
