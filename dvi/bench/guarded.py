"""A long check in parts, each in a process of its own: what one part breaks, hangs in or fills, the next never sees.

Knows processes, clocks and a file of JSON lines; knows nothing of what the parts measure. Parts run in forks of the
process that asks, which must not have touched a CUDA device: they could not use one.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.table import Table

GRACE = 1.1  # of its time a part is let run over before it is killed: it looks at its clock between steps
TRACEBACK_LINES = 12
FOR_THE_FILE = ("tail", "files")  # facts of a result that are too long for a table


class Skipped(Exception):
    """Raised by a part that cannot run here, with the reason."""


class Journal:
    """JSON lines, each on disk before `write` returns: a run that is cut off keeps what it has found."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, part: str, event: str, **facts: Any) -> None:
        """event: "begin", "result", "skipped", "error", "stopped" or "end"."""
        line = json.dumps({"part": part, "event": event, **facts}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines but one that was cut off."""
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


class Box:
    """What a part is given: its time, and where its results go."""

    def __init__(self, part: str, journal: Journal, seconds: float) -> None:
        self._part, self._journal, self._end_s = part, journal, time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def has_time(self, seconds: float = 0.0) -> bool:
        """Whether a step of so many seconds may begin. To be asked between steps."""
        return self.left_s > seconds

    def result(self, name: str, **facts: Any) -> None:
        self._journal.write(self._part, "result", name=name, **facts)


@dataclass(frozen=True)
class Part:
    """share: of the total time, what it may use; time that an earlier part left over is shared out again."""

    name: str
    share: float
    run: Callable[[Box], None]


def journal_table(lines: list[dict[str, Any]], *, title: str) -> Table:
    """What the parts have found, and what became of those that did not end well. lines: of `Journal.read`."""
    table = Table("part", "what", "found", title=title)
    for line in lines:
        if line["event"] == "result":
            facts = {k: v for k, v in line.items() if k not in ("part", "event", "name", *FOR_THE_FILE)}
            found = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
            table.add_row(line["part"], line["name"], found)
        elif line["event"] in ("skipped", "error", "stopped"):
            table.add_row(line["part"], line["event"].upper(), line.get("reason") or line.get("error"))
    return table


def run_parts(parts: Sequence[Part], journal: Journal, *, total_s: float, say: Callable[[str], None]) -> dict[str, str]:
    """Runs each part in a child; what became of it by name: "ok", "skipped", "error" or "stopped".

    A part that raises is recorded with the end of its traceback, one that outstays its box is killed with all that it
    started, and the next goes on. So does one that dies, by a signal or for want of memory.
    """
    end_s, outcomes = time.monotonic() + total_s, {}
    for index, part in enumerate(parts):
        left_s = max(end_s - time.monotonic(), 0.0)
        box_s = left_s * part.share / sum(p.share for p in parts[index:])
        say(f"{part.name}: at most {box_s:.0f} s of {left_s:.0f}")
        start_s = time.monotonic()
        outcomes[part.name] = _run_one(part, journal, box_s)
        seconds = round(time.monotonic() - start_s, 2)
        journal.write(part.name, "end", outcome=outcomes[part.name], seconds=seconds)
        say(f"{part.name}: {outcomes[part.name]} after {seconds:.1f} s")
    return outcomes


def _run_one(part: Part, journal: Journal, box_s: float) -> str:
    journal.write(part.name, "begin", box_s=round(box_s, 1))
    child = multiprocessing.get_context("fork").Process(target=guard, args=(part, journal, box_s))
    child.start()
    try:
        child.join(box_s * GRACE)
    finally:  # also where this process is being ended
        is_late = child.is_alive()
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left, or it has no group yet
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
    if is_late:
        journal.write(part.name, "stopped", reason=f"not at its end after {box_s * GRACE:.1f} s")
        return "stopped"
    outcome = {0: "ok", 1: "error", 2: "skipped"}.get(child.exitcode)
    if outcome is None:
        journal.write(part.name, "error", error=f"its process ended with {child.exitcode}")
        return "error"
    return outcome


def guard(part: Part, journal: Journal, box_s: float) -> NoReturn:
    """Runs the part and ends this process: with 0, 1 for an error, 2 where the part was skipped.

    By _exit: what a broken device leaves behind can hang an orderly end.
    """
    if os.getpid() != os.getpgrp():
        os.setsid()  # a group of its own, so that what it starts is killed with it
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(int(box_s * GRACE) + 2)  # should the parent be killed
    code = 0
    try:
        part.run(Box(part.name, journal, box_s))
    except Skipped as reason:
        journal.write(part.name, "skipped", reason=str(reason))
        code = 2
    except BaseException as error:
        lines = traceback.format_exc().rstrip().splitlines()[-TRACEBACK_LINES:]
        journal.write(part.name, "error", error=f"{type(error).__name__}: {error}", traceback=lines)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

