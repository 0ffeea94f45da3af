"""What a run tells the outside: metrics as JSON lines, and TensorBoard scalars.

Knows events by name and numbers by key; computes nothing but a running mean, and decides nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PROGRESS_KEYS = {"request": "tokens_seen", "update": "step"}  # the horizontal axis of each event in TensorBoard


class MetricsWriter:
    """Appends one JSON object per event to folder/metrics.jsonl, handed to the system before `write` returns.

    A folder or file that was removed or replaced meanwhile is made again: what is written can be found.

    tensorboard: also writes every number of a "request" event over tokens_seen, and of an "update" event over step,
    to folder/tensorboard. Other events are only lines.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool = False) -> None:
        folder = Path(folder)
        self._path = folder / METRICS_FILE
        self._file = _open(self._path)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, and not every run wants it

            self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER))

    def write(self, event: str, **values: Any) -> None:
        """Records one event, such as `write("update", step=3, phase="kl", losses={"forward_kl": 1.2})`.

        The line also holds time_s, seconds since the epoch. Numbers that are not finite become null, for which JSON
        has no word. Raises KeyError when TensorBoard is on and the event lacks its key of PROGRESS_KEYS.
        """
        line = {"event": event, "time_s": round(time.time(), 3), **values}
        if not self._is_in_place():
            file = _open(self._path)
            self._file.close()
            self._file = file
        self._file.write(json.dumps(_without_non_finite(line), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None and event in PROGRESS_KEYS:
            progress = values[PROGRESS_KEYS[event]]
            for name, number in _numbers(values, prefix=event):
                self._board.add_scalar(name, number, progress)

    def _is_in_place(self) -> bool:
        """Whether what is written goes to the file of this name, and not to one that no name leads to any more."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Flushes and closes both outputs; writing afterwards is an error."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if is_torn:
        file.write("\n")  # a killed run's last line must not swallow our first
    return file


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, oldest first, without lines that a killed run left torn."""
    events = []
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return events


def running_mean(values: list[float], window: int) -> list[float]:
    """At each value, the mean of it and of up to window - 1 values before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _numbers(values: Mapping[str, Any], *, prefix: str) -> Iterable[tuple[str, float]]:
    """("update/losses/forward_kl", 1.2) and the like: every number of a nested mapping under its path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, prefix=f"{prefix}/{key}")
        elif isinstance(value, int | float):
            yield f"{prefix}/{key}", value


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
