"""Reading settings: frozen dataclasses < a YAML file, or a model's name < `key=value` on the command line.

Knows keys, types and bounds; knows nothing of models or training, and imports neither torch nor transformers, so that
`dvi --help` and `--print-config` answer at once. What the settings are stands in `dvi.settings`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml

from dvi.bundled import here_or_bundled
from dvi.key_names import hint_for, meant_by
from dvi.settings import ServeConfig, TrainConfig, WarmupConfig
from dvi.settings.explained import types_of
from dvi.software import versions_of
from dvi.whole_files import write_whole

Schema = TypeVar("Schema")

YAML_SUFFIXES = (".yaml", ".yml")

_LOG = logging.getLogger(__name__)

RENAMED = {"data.text_field": ("field", "prompt")}  # to what, and the value that said nothing, its default then


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str | Mapping[str, Any]] = (),
    *,
    schema: type[Schema] = TrainConfig,
) -> Schema:
    """The checked settings: defaults, then the YAML file, then each override in turn.

    overrides: `section.key=value`, further YAML files, or mappings of sections to keys and values.
    Values are written as in YAML, with 1e-3 a number; one value where a list is expected stands for a list of one.
    Raises ValueError naming key, value, bound and remedy; it lists every wrong value, but stops at an unknown key.
    """
    settings: dict[str, Any] = dataclasses.asdict(schema())
    if path is not None:
        _merge(settings, _read_yaml(Path(path)), source=str(path), schema=schema)
    for override in overrides:
        if isinstance(override, str) and is_yaml(override):
            _merge(settings, _read_yaml(Path(override)), source=override, schema=schema)
        else:
            new = _parse_override(override) if isinstance(override, str) else override
            _merge(settings, new, source="the command line", schema=schema)
    return checked(settings, schema)


def checked(settings: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """The settings of these keys and values, whose types and bounds hold. Raises ValueError as `load_config` does."""
    # Here, not at the top: importing pydantic takes longer than everything else `dvi --help` does.
    from pydantic import TypeAdapter, ValidationError

    # JSON, because strict validation of Python objects refuses dicts for dataclasses and lists for tuples.
    document = json.dumps(settings, default=str)
    try:
        return TypeAdapter(schema).validate_json(document, strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(_describe(entry, schema) for entry in error.errors())) from None


def is_yaml(argument: str) -> bool:
    """Whether an argument names a YAML file: told by the suffix alone, so that a missing one is no model's name."""
    return "=" not in argument and argument.endswith(YAML_SUFFIXES)


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"train": {"lr": 0.001}} of "train.lr" and 0.001."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def to_yaml(config: TrainConfig | ServeConfig | WarmupConfig) -> str:
    """Every key with its value, as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def write_provenance(folder: str | Path, config: TrainConfig | ServeConfig | WarmupConfig) -> None:
    """Writes what is needed to repeat a run: config.yaml, and provenance.json (argv, versions, git SHA, date).

    git_sha is of the checkout that holds this package, with "-dirty" after it when files differ; null outside one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", to_yaml(config))
    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "git_sha": _git_sha(),
        "versions": {"python": platform.python_version()}
        | versions_of(("dvi", "torch", "transformers", "peft", "accelerate")),
    }
    write_whole(folder / "provenance.json", json.dumps(provenance, indent=2) + "\n")


def setting_of_run(folder: str | Path, section: str, name: str) -> Any:
    """A value of the config.yaml that a run left in its folder; None where it left none, or without that key."""
    try:
        return yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))[section][name]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-3 is a number, as in YAML 1.2, and not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> Any:
    try:
        text = here_or_bundled(path).read_text(encoding="utf-8")
    except OSError as error:
        hint = "; dvi init writes one" if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"config must be a readable YAML file, got {path}: {error.strerror}{hint}") from error
    return _parse_yaml(text, source=str(path))


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} must be valid YAML: {error}") from error


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"an override must look like section.key=value, got {override!r}; try train.lr=1e-3")
    return nested(key.strip(), _parse_yaml(text, source=override))


def _merge(settings: dict[str, Any], new: Any, *, source: str, schema: type) -> None:
    """Lays `new` over `settings`, in place; an empty file or section sets nothing. Raises at an unknown key."""

    def merge(settings: dict[str, Any], new: Any, section: type, prefix: str) -> None:
        if new is None:
            return
        if not isinstance(new, Mapping):
            names = ", ".join(entry.name for entry in dataclasses.fields(section))
            meant = meant_by(prefix[:-1], schema)
            hint = "" if meant is None else f"; did you mean {meant}={new}?"
            raise ValueError(f"{prefix[:-1] or source} must hold keys: one of {names}; got {new!r}{hint}")
        hints = types_of(section)
        for name, value in new.items():
            key = f"{prefix}{name}"
            if key in RENAMED:
                name, value = _renamed(key, value)
                key = f"{prefix}{name}"
            if name not in hints:
                key = _whole_key(key, value)
                raise ValueError(f"unknown key {key!r} in {source}; {hint_for(key, schema)}")
            if dataclasses.is_dataclass(hints[name]):
                merge(settings[name], value, hints[name], f"{key}.")
            elif get_origin(hints[name]) is tuple and isinstance(value, str):
                settings[name] = [value]
            else:
                settings[name] = value

    merge(settings, new, schema, "")


def _renamed(key: str, value: Any) -> tuple[str, Any]:
    """The name and value that a key of earlier versions has now; a notice says so."""
    name, no_effect = RENAMED[key]
    _LOG.warning("%s is now %s.%s%s", key, key.rpartition(".")[0], name, "; leave it out" * (value == no_effect))
    return name, None if value == no_effect else value


def _whole_key(key: str, value: Any) -> str:
    """The key as it was written, down to the value: the unknown part of it need not be the last."""
    while isinstance(value, Mapping) and len(value) == 1:
        ((name, value),) = value.items()
        key = f"{key}.{name}"
    return key


def _describe(error: Mapping[str, Any], schema: type) -> str:
    """One line for one pydantic error: key, bound, value and the default as the remedy."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # raised by a section's __post_init__, which names its keys itself
        return f"{key}.{error['ctx']['error']}"
    default: Any = schema()
    for part in error["loc"]:
        default = getattr(default, part) if dataclasses.is_dataclass(default) else default
    bound = error["msg"].replace("Input should be", "must be", 1)
    return f"{key} {bound}, got {error['input']!r}; the default is {default!r}"


def _git_sha() -> str | None:
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
