"""What the arguments of `dvi train`, `warmup`, `serve` and `tune` mean: settings, or a model and its prompts.

Knows names and files, and looks no further into a model than whether it is there; imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dvi.bundled import here_or_bundled
from dvi.config import is_yaml, load_config, nested
from dvi.settings import ServeConfig

Schema = TypeVar("Schema")

GGUF = ".gguf"
MANIFEST_FILE = "dvi_manifest.json"  # of a saved drafter
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PROMPTS_SUFFIXES = (".jsonl", ".json", ".gz", ".txt", ".csv", ".parquet")


def load_arguments(
    source: str,
    arguments: Iterable[str] = (),
    *,
    schema: type[Schema],
    verb: str,
    options: Mapping[str, Any] | None = None,
) -> Schema:
    """The checked settings of a verb.

    source     a YAML file, told by its suffix, or a model: a folder, a hub name or a .gguf file. A model's output lies
               in a folder with its name, runs/VERB-MODEL, so that two models do not meet in one.
    arguments  section.key=value, further YAML files and, where the settings have a section data, files of prompts.
    options    values by dotted key that come last; None leaves a key as it is.
    Raises ValueError and FileNotFoundError for what is not there, and all that `load_config` raises.
    """
    takes_prompts = any(entry.name == "data" for entry in dataclasses.fields(schema))
    overrides: list[str | Mapping[str, Any]] = []
    if not is_yaml(source):
        check_model(source)
        overrides += [nested("model.path", source), *_folders(source, schema, verb)]
    prompts: list[str] = []
    for argument in arguments:
        if "=" in argument or is_yaml(argument) or not (takes_prompts and _names_prompts(argument)):
            overrides.append(argument)
        else:
            prompts.append(argument)
    if prompts:
        overrides.append(nested("data.prompts", prompts))
    overrides += [nested(key, value) for key, value in (options or {}).items() if value is not None]
    return load_config(source if is_yaml(source) else None, overrides, schema=schema)


def check_model(name: str) -> None:
    """Raises ValueError where no model can be meant, before minutes are spent on finding out."""
    path = Path(name)
    if path.is_dir():
        if (path / MANIFEST_FILE).is_file():
            raise ValueError(f"{name} is a drafter; give the model that it was trained with, and --adapter {name}")
        if not (path / "config.json").is_file() and not any(path.glob(f"*{GGUF}")):
            raise ValueError(f"the folder {name} must hold a model: config.json with weights, or a {GGUF} file")
    elif path.is_file():
        if path.suffix.lower() != GGUF:
            raise ValueError(f"{name} must be a model's folder, a {GGUF} file, a hub name or a .yaml file of settings")
    elif name.startswith((".", "/", "~", "checkpoints/")) or name.endswith(GGUF) or not HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no model at {name}; give a model's folder, a hub name or a {GGUF} file")
    elif (Path("checkpoints") / name).is_dir():
        raise ValueError(f"there is no model at {name}; did you mean checkpoints/{name}?")


def _folders(model: str, schema: type, verb: str) -> list[dict[str, Any]]:
    """Where a model's runs lie while nothing else is said."""
    path = Path(model)
    folder = f"runs/{verb}-{path.stem if path.suffix.lower() == GGUF else path.resolve().name}"
    folders = [nested("output.folder", folder)]
    if issubclass(schema, ServeConfig):
        folders.append(nested("serve.adapters_folder", f"{folder}/adapters"))
    return folders


def _names_prompts(argument: str) -> bool:
    """Whether an argument without = is meant as a file. Raises FileNotFoundError for one that is not there."""
    path = here_or_bundled(argument)
    if path.is_file():
        return True
    if "/" in argument or path.suffix.lower() in PROMPTS_SUFFIXES or path.is_dir():
        raise FileNotFoundError(f"no prompts file {argument}; give a file of prompts, such as JSONL rows")
    return False  # a word: as an override it is refused
