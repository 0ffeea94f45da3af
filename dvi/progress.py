"""What somebody who waits is told: what is being done, how far it is, how long it will still take.

Whoever does something long says so with `doing`. A library is silent; a process that has people before it, as the
command line has, shows what it does with `shown_on`. On a terminal everything under way has a bar; elsewhere a line
tells of the innermost, every LINE_EVERY_S, so that nothing is silent for longer and nothing short says a word.
Knows a console and a clock; nothing of what is done.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from dvi.signals import before_exit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_EVERY_S = 4.0
# A bar drawn more often would take its share of the cores while something is timed.
BAR_EVERY_S = 1.0
LEAST_BAR_S = 0.1  # between two drawings because something has advanced

Item, Result, P = TypeVar("Item"), TypeVar("Result"), ParamSpec("P")


class Stage:
    """One thing under way, from now on.

    doing    such as "measuring"; total, noun: how many of what, None where nobody knows.
    done     how many are done; figures: what else is worth saying, the most important first.
    """

    def __init__(
        self, doing: str, *, total: int | None, noun: str, done: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.doing, self.total, self.noun, self.done, self.figures = doing, total, noun, done, ""
        self._clock, self._start_s, self._first = clock, clock(), done
        self._on_change: Callable[[], None] = lambda: None

    def advance(self, count: int = 1, *, figures: str | None = None) -> None:
        """So many more are done."""
        self.done += count
        if figures is not None:
            self.figures = figures
        self._on_change()

    def skip(self, count: int) -> None:
        """So many need not be done: they were done before, and tell nothing of how long the others take."""
        self.done += count
        self._first += count
        self._on_change()

    def name(self, doing: str) -> None:
        """Something else is being done, as a part of the same."""
        self.doing = doing
        self._on_change()

    @property
    def left_s(self) -> float | None:
        """Seconds that it will still take if it goes on as it has gone; None where nobody can say yet."""
        if self.total is None or self.done <= self._first:
            return None
        return (self._clock() - self._start_s) / (self.done - self._first) * max(self.total - self.done, 0)

    @property
    def count(self) -> str:
        """How far it is."""
        if self.total is None:
            return f"{self.done:,}" if self.noun else ""
        return f"{self.done:,}/{self.total:,}"

    @property
    def time(self) -> str:
        """How long still, or how long until now."""
        left_s = self.left_s
        return f"{spoken(self._clock() - self._start_s)} so far" if left_s is None else f"{spoken(left_s)} left"

    def __str__(self) -> str:
        count = f"{self.count} {self.noun}".strip()
        return ", ".join(part for part in (f"{self.doing}: {count}" if count else self.doing, self.time, self.figures)
                         if part)  # fmt: skip


class Display:
    """A console on which the stages under way are shown: bars on a terminal, elsewhere lines now and then."""

    def __init__(self, console: Console) -> None:
        self._console, self._stages, self._tasks = console, [], {}
        self._lock, self._over = threading.RLock(), threading.Event()
        self._bars = _make_bars(console) if console.is_terminal else None
        self._drawn_s = 0.0
        self._period_s = LINE_EVERY_S if self._bars is None else BAR_EVERY_S
        threading.Thread(target=self._beat, name="progress", daemon=True).start()

    def open(self, stage: Stage) -> None:
        with self._lock:
            self._stages.append(stage)
            if self._bars is not None:
                if len(self._stages) == 1:
                    self._bars.start()
                self._tasks[stage] = self._bars.add_task("", total=stage.total)
                stage._on_change = self.draw
            self.draw()

    def close(self, stage: Stage) -> None:
        with self._lock:
            self._stages.remove(stage)
            if self._bars is not None:
                self._bars.remove_task(self._tasks.pop(stage))
                if not self._stages:
                    self._bars.stop()

    def end(self) -> None:
        """Shows nothing any more, and leaves the terminal as it was."""
        self._over.set()
        with self._lock:  # after whoever is writing now
            if self._bars is not None:
                self._bars.stop()

    def draw(self, *, is_due: bool = False) -> None:
        """Draws the bars anew, unless that has just been done."""
        if self._bars is None or (not is_due and time.monotonic() - self._drawn_s < LEAST_BAR_S):
            return
        with self._lock:
            if not self._stages:
                return
            for stage, task in self._tasks.items():
                self._bars.update(task, completed=stage.done, total=stage.total, stage=stage)
            self._bars.refresh()
            self._drawn_s = time.monotonic()

    def tell(self) -> None:
        """A line about the innermost stage."""
        with self._lock:
            if self._stages and not self._over.is_set():
                self._console.print(str(self._stages[-1]), soft_wrap=True)

    def _beat(self) -> None:
        while not self._over.wait(self._period_s):
            try:
                self.tell() if self._bars is None else self.draw(is_due=True)
            except OSError:  # nobody listens any more
                return


_display: Display | None = None


@contextmanager
def shown_on(console: Console) -> Iterator[None]:
    """Until the block ends, what is done in this process is shown there."""
    global _display
    previous, _display = _display, Display(console)
    before_exit.append(_display.end)
    try:
        yield
    finally:
        display, _display = _display, previous
        before_exit.remove(display.end)
        display.end()


@contextmanager
def doing(what: str, *, total: int | None = None, noun: str = "", done: int = 0) -> Iterator[Stage]:
    """Shows, until the block ends, that this is being done; the block tells the stage how far it is.

    what   such as "loading MODEL" or "measuring"; total, noun: how many of what there are to do; done: already.
    """
    stage, display = Stage(what, total=total, noun=noun, done=done), _display
    if display is None:
        yield stage
        return
    display.open(stage)
    try:
        yield stage
    finally:
        display.close(stage)


def shown_as(what: str | Callable[..., str]) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """A decorator: while the function runs, this is being done.

    what: the words, or what makes them of the function's arguments.
    """

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def shown(*args: P.args, **options: P.kwargs) -> Result:
            with doing(what if isinstance(what, str) else what(*args, **options)):
                return function(*args, **options)

        return shown

    return decorate


def each(items: Iterable[Item], what: str, *, noun: str, total: int | None = None) -> Iterator[Item]:
    """The items, one after the other, with a stage that shows how many the loop's body has done with."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with doing(what, total=total, noun=noun) as stage:
        for item in items:
            yield item
            stage.advance()


def spoken(seconds: float) -> str:
    """A duration as one says it: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes} min {rest_s} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _make_bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Part(ProgressColumn):
        """One text of a stage."""

        max_refresh = None

        def __init__(self, read: Callable[[Stage], str], **column: object) -> None:
            super().__init__(table_column=Column(no_wrap=True, **column))
            self._read = read

        def render(self, task: object) -> Text:
            stage = task.fields.get("stage")
            return Text("" if stage is None else self._read(stage))

    # The figures have the width that is left: what is left of the time is never pushed out by them.
    return Progress(
        Part(lambda stage: stage.doing, max_width=40, overflow="ellipsis"), BarColumn(bar_width=12),
        Part(lambda stage: stage.count), Part(lambda stage: stage.time),
        Part(lambda stage: stage.figures, ratio=1, overflow="ellipsis"),
        console=console, auto_refresh=False, transient=True, expand=True,
        # What goes to stdout is for a program, unless a person sees both on one screen.
        redirect_stdout=sys.stdout.isatty(),
    )
