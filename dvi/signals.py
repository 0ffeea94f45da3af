"""SIGTERM and SIGINT, from a process's first line to its last, also as PID 1, which the default action spares.

A process that handles them (`handled`) is ended by the first one: what it does is broken off by `Interrupted`, its
`finally` blocks run, one line says so and the exit code is 128 + the signal. Work that must end in order enters
`Signals` and looks at `received` between its rounds. Whatever comes second ends the process at once.
Imports nothing heavy: it comes before everything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNAL_BASE = 128  # exit code of what a signal ended: this and the signal's number
NUMBERS = (signal.SIGINT, signal.SIGTERM)
RETRY_S = 0.05  # until Interrupted is raised again where the first one was lost

Handler = Callable[[int, FrameType | None], object]
before_exit: list[Callable[[], None]] = []  # what must be put in order even where no `finally` block runs


class Interrupted(BaseException):
    """SIGINT or SIGTERM came, to this process or to another rank of its job; no error, so nobody catches it by chance.

    number  the signal's; None where another rank had it.
    again   the handler that raised it, for where it was lost.
    """

    def __init__(self, number: int | None = None, again: Handler | None = None) -> None:
        super().__init__(number)
        self.number, self.again = number, again


@contextmanager
def handled() -> Iterator[None]:
    """The whole of a process: the first signal raises Interrupted, which leaves here as SystemExit.

    A rank of a job keeps the default actions outside `Signals`: its launcher ends it, and it may wait in a collective
    where no Python runs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not _is_main_thread():
        yield
        return
    previous, previous_hook = _take(_raise), sys.unraisablehook
    sys.unraisablehook = lambda lost: _raise_again(lost.exc_value) or previous_hook(lost)
    try:
        yield
    except Interrupted as interruption:
        _say(interruption.number)
        sys.exit(SIGNAL_BASE + interruption.number)
    finally:
        sys.unraisablehook = previous_hook
        _give_back(previous)


class Signals:
    """While entered, the first SIGINT or SIGTERM is only noted in `received`, to be looked at between rounds."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_interrupting = False
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> Signals:
        if _is_main_thread():  # elsewhere Python allows no handlers
            self._previous = _take(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        _give_back(self._previous)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While entered, a signal raises Interrupted at once: for work that may be dropped anywhere."""
        self._is_interrupting = True
        try:
            self.check()
            yield
        finally:
            self._is_interrupting = False

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        _end_at_the_next()
        if self._is_interrupting:
            _break_off(number, frame, self._note)


def _raise(number: int, frame: FrameType | None) -> None:
    _end_at_the_next()
    _break_off(number, frame, _raise)


def _break_off(number: int, frame: FrameType | None, again: Handler) -> NoReturn:
    """Raises Interrupted where the main thread is."""
    if _is_importing(frame):
        # Half a module, or an extension that is being initialised, may not survive an exception, or swallow it.
        _say(number)
        _exit(number, frame)
    raise Interrupted(number, again)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _exit(number: int, _: FrameType | None) -> NoReturn:
    for put_in_order in before_exit:
        put_in_order()
    os._exit(SIGNAL_BASE + number)


def _say(number: int) -> None:
    """To the descriptor: a stream's lock may be held by what was broken off."""
    os.write(2, f"interrupted by {signal.Signals(number).name}\n".encode())


def _raise_again(lost: BaseException | None) -> bool:
    """Whether an exception that a finalizer or a callback has swallowed was Interrupted: then it comes once more."""
    if not isinstance(lost, Interrupted):
        return False
    signal.signal(signal.SIGALRM, lambda _, frame: lost.again(lost.number, frame))
    signal.setitimer(signal.ITIMER_REAL, RETRY_S)
    return True


def _end_at_the_next() -> None:
    """Another signal ends the process, wherever it is. PID 1 has no default action, so it is ended by itself."""
    for number in NUMBERS:
        signal.signal(number, _exit if os.getpid() == 1 else signal.SIG_DFL)


def _take(handler: Handler) -> dict[int, Handler]:
    """Has the handler called, and returns those before it."""
    return {number: signal.signal(number, handler) for number in NUMBERS}


def _give_back(handlers: dict[int, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
