"""How messages become a prompt for models whose tokenizer does not say.

Knows text alone. vicuna_v1.1 as FastChat writes it, which is also how Spec-Bench prompts every model.
"""

from __future__ import annotations

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_STOP = "</s>"

# For `tokenizer.chat_template`. An answer of no text has no end mark, in FastChat neither.
VICUNA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}" + VICUNA_SYSTEM + "{% endif %} "
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} ASSISTANT:"
    "{% elif message.role == 'assistant' and message.content %} {{ message.content }}" + VICUNA_STOP + "{% endif %}"
    "{% endfor %}"
)
