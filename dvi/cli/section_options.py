"""Options of a verb that are the keys of a settings section: their names, types, defaults and help are its own.

Knows signatures and docstrings; the values are checked where all settings are, by `dvi.config.checked`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_origin

import typer

from dvi.settings.explained import choices_of, explanations, types_of

Verb = Callable[..., None]


def options_of(section: type, *, but: tuple[str, ...] = ()) -> Callable[[Verb], Verb]:
    """Makes the `**options` of a verb one option for each key of the section that the verb does not name itself.

    A list is given as text with commas. Left out are the keys `but`, and a section in the section.
    """

    def decorate(verb: Verb) -> Verb:
        signature = inspect.signature(verb, eval_str=True)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in named} | set(but)
        texts, hints, default = explanations(section), types_of(section), section()
        own = list(vars(section)["__annotations__"])  # before what it extends: model and adapter come first
        for name in [*own, *(entry.name for entry in dataclasses.fields(section) if entry.name not in own)]:
            value = getattr(default, name)
            if name not in taken and not dataclasses.is_dataclass(value):
                named.append(_option(name, hints[name], value, texts.get(name, "")))
        verb.__signature__ = signature.replace(parameters=named)
        verb.__annotations__ = {p.name: p.annotation for p in named} | {"return": None}
        return verb

    return decorate


def read_options(section: type, options: dict[str, Any]) -> dict[str, Any]:
    """What the options say of the keys of the section: lists are taken apart.

    "all" is every choice. Raises ValueError naming the option for a word that is none of its choices.
    """
    hints = types_of(section)
    is_list = {name: get_origin(hints[name]) is tuple for name in options}
    return {
        name: listed(value, choices_of(hints[name]), _flag(name)) if is_list[name] else value
        for name, value in options.items()
    }


def listed(text: str, choices: tuple[str, ...], option: str) -> tuple[str, ...]:
    """The words of a text with commas between them. Raises ValueError for one that is none of the choices."""
    if text == "all":
        return choices
    names = tuple(name for name in text.replace(" ", "").split(",") if name)
    for name in names:
        if name not in choices:
            raise ValueError(f"{option} must list some of {', '.join(choices)}, got {name!r}")
    return names


def _option(name: str, hint: object, value: Any, text: str) -> inspect.Parameter:
    if get_origin(hint) is tuple:
        text = f"A list of {', '.join(choices_of(hint))}, or all: {text}"
        hint, value = str, ",".join(value)
    decls = (_flag(name),) if hint is bool else ()  # without --no-...
    annotation = Annotated[hint, typer.Option(*decls, help=text[:1].upper() + text[1:] or None)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
