"""The commented file of settings that `dvi init` writes: every key with its default, and the user's model.

Knows which bundled configuration a verb starts from.
"""

from __future__ import annotations

from pathlib import Path

from dvi.bundled import bundled
from dvi.config import YAML_SUFFIXES, load_config, nested
from dvi.explained_yaml import explained_yaml
from dvi.settings import ServeConfig, TrainConfig

SOURCES = {"serve": "configs/online/serve.yaml", "train": "configs/online/reference.yaml"}
SCHEMAS = {"serve": ServeConfig, "train": TrainConfig}


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
    """The text: every key with its value and what it means. file: its name, for the first line."""
    values = [nested("output.folder", f"runs/{verb}"), *([] if model is None else [nested("model.path", model)])]
    config = load_config(bundled(SOURCES[verb]), values, schema=SCHEMAS[verb])
    return (
        f"# Settings of `dvi {verb}`, as dvi init writes them: dvi {verb} {file} [section.key=value ...]\n"
        "# Every key is here; what is deleted has its default. "
        f"Paths are relative to the folder the command is started in.\n{explained_yaml(config)}"
    )
