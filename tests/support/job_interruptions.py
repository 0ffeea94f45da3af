"""Ways to break off a job at a chosen request."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from trainers.jobs.progress import RunDisplay


class Crash(Exception):
    """What nobody catches."""


def crash() -> None:
    raise Crash


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def after_requests(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None]) -> None:
    """Has `action` done when the count-th request has finished, or the count-th text has been learnt from."""
    finish, seen = RunDisplay.finish_request, []

    def finish_request(self: RunDisplay, *args: object, **options: object) -> None:
        finish(self, *args, **options)
        seen.append(None)
        if len(seen) == count:
            action()

    monkeypatch.setattr(RunDisplay, "finish_request", finish_request)
