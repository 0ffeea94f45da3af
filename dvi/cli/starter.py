"""The commented file of settings that `dvi init` writes: a bundled one, with the user's model in it.

Knows the text of configs/online; a reader of the repository and a user of the wheel then see the same comments.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from dvi.bundled import bundled
from dvi.config import YAML_SUFFIXES

SOURCES = {"serve": "configs/online/serve.yaml", "train": "configs/online/reference.yaml"}
PLAIN = re.compile(r"[\w./-]+")  # may stand without quotes where YAML reads it as a text at all


def write_starter(place: str | Path, *, verb: str, model: str | None = None, overwrite: bool = False) -> Path:
    """The file written: `place` itself where it has a YAML file's suffix, else VERB.yaml in that folder.

    verb   "serve" or "train".
    model  model.path; None leaves the bundled model's.
    Raises FileExistsError for a file that is there, unless it may be overwritten.
    """
    path = Path(place)
    if path.suffix not in YAML_SUFFIXES:
        path = path / f"{verb}.yaml"
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --force overwrites it, and another name keeps it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(starter(verb, file=str(path), model=model), encoding="utf-8")
    return path


def starter(verb: str, *, file: str, model: str | None = None) -> str:
    """The text: every key with its default and what it means. file: its name, for the first line."""
    header, _, settings = bundled(SOURCES[verb]).read_text(encoding="utf-8").partition("\n\n")
    assert all(line.startswith("#") for line in header.splitlines()), f"{SOURCES[verb]} must begin with its comment"
    values = {"output.folder": f"runs/{verb}"}
    if model is not None:
        values["model.path"] = model
    for key, value in values.items():
        settings = set_value(settings, key, value)
    return (
        f"# Settings of `dvi {verb}`, as dvi init writes them: dvi {verb} {file} [section.key=value ...]\n"
        "# Every key is here; what is deleted has its default. "
        f"Paths are relative to the folder the command is started in.\n\n{settings}"
    )


def set_value(text: str, key: str, value: str) -> str:
    """A YAML text of two levels with another value of section.key; the comment behind it stays where it was."""
    section, _, name = key.partition(".")
    is_plain = PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    written = value if is_plain else json.dumps(value, ensure_ascii=False)
    pattern = re.compile(rf"(^{section}:[^\n]*\n(?:[ #][^\n]*\n|\n)*?  {name}: )([^\n#]*?)( *#[^\n]*)?$", re.MULTILINE)

    def put(match: re.Match[str]) -> str:
        before, old, comment = match[1], match[2], match[3] or ""
        room = len(old) + len(comment) - len(comment.lstrip())
        return before + (f"{written.ljust(room - 1)} {comment.lstrip()}" if comment else written)

    text, count = pattern.subn(put, text, count=1)
    assert count == 1, f"no {key} in the text"
    return text
