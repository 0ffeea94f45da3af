"""Where the time of a round goes, measured from outside: named calls are wrapped, nothing measured knows of it.

Knows clocks and names. Host time: what a GPU does meanwhile shows where the host waits for it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

Place = tuple[object, str, str]  # owner, name of its attribute, the part that its time belongs to


class PartClock:
    """Seconds by part. A call's time is its own: that of wrapped calls within it belongs to their parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._part: str | None = None
        self._since_s = 0.0

    @contextmanager
    def wrapping(self, places: Iterable[Place]) -> Iterator[None]:
        """Inside, the calls at these places are timed; afterwards they are as they were."""
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
            yield

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: object, **options: object) -> Any:
            outer = self._switch(part)
            try:
                return call(*args, **options)
            finally:
                self._switch(outer)

        return timed

    def _switch(self, part: str | None) -> str | None:
        """From now on the time is this part's; the part whose it was."""
        now_s = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] += now_s - self._since_s
        outer, self._part, self._since_s = self._part, part, now_s
        return outer
