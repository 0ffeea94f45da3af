"""Settings as a YAML file for people: every key with its value, its choices and what its section says of it.

Knows layout and nothing of the keys themselves; what it writes `dvi.config.load_config` reads back.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

import yaml

from dvi.settings.explained import choices_of, explanations, heading, types_of

COMMENT_COLUMN, WIDTH = 35, 120


def explained_yaml(config: Any) -> str:
    """The text, section by section. config: a dataclass of sections, such as `TrainConfig`."""
    blocks = ["\n".join(_comment(heading(type(config)), column=0))]
    for entry in dataclasses.fields(config):
        blocks.append("\n".join(_section(entry.name, getattr(config, entry.name))))
    return "\n\n".join(blocks) + "\n"


def _section(name: str, section: Any) -> list[str]:
    lines, texts = _explained(f"{name}:", heading(type(section))), explanations(type(section))
    for key, hint in types_of(type(section)).items():
        choices = " | ".join(choices_of(hint))
        text = ": ".join(part for part in (choices, texts.get(key, "")) if part)
        lines += _explained(f"  {key}: {_written(getattr(section, key))}", text)
    return lines


def _explained(line: str, text: str) -> list[str]:
    """The line with the text behind it, which goes on below in the same column."""
    if not text:
        return [line]
    first, *rest = _comment(text, column=COMMENT_COLUMN)
    with_first = f"{line.ljust(COMMENT_COLUMN - 2)}  {first.strip()}"
    return [with_first, *rest] if len(with_first) <= WIDTH else [line, first, *rest]


def _comment(text: str, *, column: int) -> list[str]:
    lead = " " * column + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=lead, break_on_hyphens=False)


def _written(value: Any) -> str:
    """A value on one line, as YAML has it inside a list: a comment may follow it."""
    value = list(value) if isinstance(value, tuple) else value
    options = {"default_flow_style": True, "allow_unicode": True, "width": math.inf}
    text = yaml.safe_dump([value], **options).strip()
    if "\n" in text:  # of a string with line breaks, which double quotes keep on one line
        text = yaml.safe_dump([value], **options, default_style='"').strip()
    return text[1:-1]
