"""Results of an experiment's cells, one JSON file each: what is finished is never lost, and never mixed.

Knows names, settings and JSON; knows nothing of what a cell is.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvi.settings import TrainConfig
from dvi.whole_files import write_whole


def with_one_mode(config: TrainConfig) -> TrainConfig:
    """The settings with mode "auto" as the fast passes that it runs: cells have one word for them on every machine."""
    mode = "fast" if config.model.mode == "auto" else config.model.mode
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mode=mode))


class CellFolder:
    """A folder with NAME.json of every finished cell, which several processes may fill at once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """A cell's result, None while there is none.

        settings: what `write` was given; ValueError when that was something else.
        """
        path = self._path(name)
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        expected, found = json.loads(json.dumps(settings)), result["settings"]
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise ValueError(
                    f"{path} was made with {key} = {found.get(key)!r}, now it is {expected.get(key)!r}; give another "
                    "folder, or delete the cell"
                )
        return result

    def write(self, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Stores a finished cell: after a crash it is there whole or not at all."""
        write_whole(self._path(name), json.dumps({"settings": dict(settings), **result}, allow_nan=False) + "\n")

    @contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether the cell is this process's to work on, until the block ends or the process does.

        wait: until another process lets go of it, which may have finished it by then.
        """
        with (self.folder / f".{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
