"""What each key of a section means, as its docstring says it: the one source of `--print-config`, `dvi init` and help.

Knows the layout of these docstrings: a first line of the section, then `key  text`, its further lines indented.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Literal, get_args, get_origin, get_type_hints

_ENTRY = re.compile(r"(\w+) +(\S.*)")


def heading(section: type) -> str:
    """The first sentence of a section's docstring."""
    return inspect.cleandoc(section.__doc__ or "").partition("\n")[0]


def explanations(section: type) -> dict[str, str]:
    """What is said of each key, on one line, by the section or what it extends; nothing of those that say it all."""
    keys = {entry.name for entry in dataclasses.fields(section)}
    found: dict[str, str] = {}
    for known in reversed(section.__mro__):
        name = None
        for line in inspect.cleandoc(vars(known).get("__doc__") or "").splitlines()[1:]:
            entry = _ENTRY.fullmatch(line)
            if entry and entry[1] in keys:
                name, found[entry[1]] = entry[1], entry[2]
            elif name is not None and line.startswith(" "):
                found[name] += f" {line.strip()}"
            else:
                name = None
    return found


def choices_of(hint: object) -> tuple[str, ...]:
    """The words that a key of this type may be, or a list of them hold; none where it is free."""
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) is Literal else ()


def types_of(section: type) -> dict[str, object]:
    """The type of each key, without its bounds, in the order of the fields (hints alone put a base class's last)."""
    hints = get_type_hints(section)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(section)}
