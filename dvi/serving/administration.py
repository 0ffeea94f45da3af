"""What an operator does to a server's drafters and its learner while it serves.

Every verb gives a future: it happens between two rounds, on the engine's thread. Knows the engine, the learner and who
is told of events; knows nothing of requests, HTTP or who may ask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dvi.learner import Learner
from dvi.model.adapter_store import load_drafter
from dvi.records import DrafterVersion
from dvi.serving.engine import Engine
from dvi.serving.metrics.monitor import Monitor
from dvi.serving.request import DEFAULT_DRAFTER


class Administration:
    """Versions, pins, adapters and what is forgotten.

    is_pinned   the drafter stays as it is, and the learner rests.
    started_s   seconds since the epoch: when the drafter that a server without a learner has began to serve.
    """

    def __init__(
        self, engine: Engine, learner: Learner | None, monitor: Monitor,
        *, call: Callable[[Callable[[], Any]], Future[Any]],
    ) -> None:
        """call: runs an action between rounds on the engine's thread."""
        self._engine, self._learner, self._monitor, self._call = engine, learner, monitor, call
        self.is_pinned, self.started_s = False, time.time()
        self._version = engine.drafters[DEFAULT_DRAFTER].version  # the newest that the monitor knows of

    def versions(self) -> Future[list[DrafterVersion]]:
        return self._call(self._versions)

    def rollback(self, version: int | None) -> Future[DrafterVersion]:
        """Publishes a kept version's weights again (None: the best) under a new number. ValueError when it cannot."""
        return self._call(lambda: self._roll_back(version))

    def pin(self, version: int | None) -> Future[DrafterVersion]:
        """Drafts with this version (None: the live one), and the learner rests, until `unpin`."""

        def pin() -> DrafterVersion:
            self._rest(True)
            try:
                live = self._live()
                if version is not None and version != live.version:
                    live = self._roll_back(version)
            except BaseException:
                self._rest(self.is_pinned)
                raise
            self.is_pinned = True
            self._monitor.on_event("pin", version=live.version)
            return live

        return self._call(pin)

    def unpin(self) -> Future[None]:
        def unpin() -> None:
            if not self.is_pinned:
                raise ValueError("no drafter version is pinned")
            self._rest(False)
            self.is_pinned = False
            self._monitor.on_event("unpin")

        return self._call(unpin)

    def forget(self, tenant: str) -> Future[int]:
        """Drops a tenant's experience and prefixes; the number of positions dropped. What was learnt stays learnt."""

        def forget() -> int:
            num_dropped = self._engine.prefixes.forget(tenant)
            return num_dropped + (0 if self._learner is None else self._learner.forget(tenant))

        return self._call(forget)

    def load_adapter(self, name: str, folder: Path) -> Future[None]:
        """Makes a saved drafter available as `name`. ValueError when the name is taken or the folder does not fit.

        It is read and checked on a thread of its own, which for a gigabyte takes seconds; nobody's round waits for it.
        """
        loaded: Future[None] = Future()

        def check_name() -> None:
            if name in self._engine.drafters:
                raise ValueError(f"an adapter {name!r} is loaded already; unload it first or choose another name")

        def load() -> None:
            try:
                check_name()
                drafter = load_drafter(folder, self._engine.speculator.split)
                drafter.requires_grad_(False)

                def publish() -> None:
                    check_name()  # again: another may have come meanwhile
                    self._engine.drafters[name] = drafter
                    self._monitor.on_event("load", name, version=drafter.version)

                self._call(publish).result()
            except BaseException as error:
                loaded.set_exception(error)
            else:
                loaded.set_result(None)

        threading.Thread(target=load, name=f"load {name}", daemon=True).start()
        return loaded

    def unload_adapter(self, name: str) -> Future[None]:
        def unload() -> None:
            if name == DEFAULT_DRAFTER or name not in self._engine.drafters:
                raise ValueError(f"no adapter {name!r} is loaded")
            self._engine.unload(name)
            self._monitor.on_event("unload", name)

        return self._call(unload)

    def save_adapter(self, folder: Path) -> Future[None]:
        """Writes the default drafter as it drafts now."""

        def save() -> None:
            metrics = {} if self._learner is None else self._learner.provenance()
            self._engine.speculator.save_drafter(folder, metrics=metrics)
            self._monitor.on_event("save", folder.name, version=self._live().version)

        return self._call(save)

    # On the engine's thread

    def tell_of_publish(self) -> None:
        """An event, where another version drafts than the monitor knows of."""
        if self._engine.drafters[DEFAULT_DRAFTER].version != self._version:
            live = self._live()
            self._monitor.on_event("rollback" if live.source == "rollback" else "publish", version=live.version)
            self._version = live.version

    def _versions(self) -> list[DrafterVersion]:
        if self._learner is not None:
            return self._learner.versions()
        version = self._engine.drafters[DEFAULT_DRAFTER].version
        return [DrafterVersion(
            version=version, created_s=self.started_s, source="initial", step=0, canary_score=None, is_live=True,
            is_kept=False,
        )]  # fmt: skip

    def _roll_back(self, version: int | None) -> DrafterVersion:
        if self._learner is None:
            raise ValueError("this server does not learn, so it has no other version to return to")
        published = self._learner.rollback(version)
        self._version = published.version
        self._monitor.on_event("rollback", f"to {version}" if version is not None else "to the best", published.version)
        return published

    def _live(self) -> DrafterVersion:
        return next(version for version in self._versions() if version.is_live)

    def _rest(self, is_resting: bool) -> None:
        if self._learner is not None:
            self._learner.rest(is_resting)
