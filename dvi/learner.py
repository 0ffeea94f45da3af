"""Learner: all that decoding and serving know of training.

Knows records and futures; knows nothing of losses, checkpoints or ranks. Every method has a body that does nothing,
so a learner says only what it does, and nobody asks what another one has.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from dvi.records import DrafterVersion, Transitions, UpdateReport


def _unheard(*_news: object) -> None:
    """What is told where nobody listens."""


class Learner:
    """What learns from the rounds; as it stands here, nothing.

    Every call comes between rounds, from the serving thread, unless it says otherwise.

    on_event    set by a server, and called with the kind and a text of what people should know of.
    on_end      set by a server, and called between rounds when another rank ends: this server is to end, too.
    last_write  the newest checkpoint, written or about to be: a future of its folder, or of the OSError.
    has_peers   other ranks wait for it: while it rests it is called on all the same.
    """

    on_event: Callable[[str, str], None] = staticmethod(_unheard)
    on_end: Callable[[], None] = staticmethod(_unheard)
    last_write: Future[Path] | None = None
    has_peers: bool = False

    # Rounds

    def observe(self, transitions: list[Transitions]) -> None:
        """Takes the experience of a round. Copies what it keeps."""

    def end_request(self, request_id: int) -> None:
        """Nothing more comes of this request."""

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        """Does at most one bounded piece of work on an update, if the cadence and the time budget allow it.

        Returns the report of the step that this piece finished, else None. is_idle: nobody waits for the next round,
        so the time costs nothing; None then also says that there is nothing more to do, see `is_busy`.
        """

    @property
    def is_busy(self) -> bool:
        """Whether another call of `step_if_due` with is_idle would do more work."""
        return False

    def restart_clock(self) -> None:
        """Forgets saved-up training time: after a pause in which nothing was served."""

    # Administration

    def versions(self) -> list[DrafterVersion]:
        """The published versions it knows of, oldest first, the live one among them."""
        return []

    def rollback(self, version: int | None = None) -> DrafterVersion:
        """Publishes the weights of a kept version again, under a new number; None is the best so far.

        Raises ValueError for a version that is not kept, and when the live weights are those already.
        """
        raise ValueError("this learner keeps no versions to return to")

    def rest(self, is_resting: bool) -> None:
        """Whether learning rests, the drafter being pinned. Without peers it is not called on then."""

    def forget(self, tenant: str) -> int:
        """Drops and wipes all stored experience of one API key; returns the number of positions dropped."""
        return 0

    def stats(self) -> dict[str, float]:
        """Counts and sizes for metrics: steps, skipped, rollbacks, train_s, replay_positions, replay_capacity ..."""
        return {}

    def provenance(self) -> dict[str, object]:
        """How the drafter came about, as plain values for `save_drafter(metrics=...)` and its model card."""
        return {}

    def checkpoint(self) -> Future[Path]:
        """A checkpoint of this moment: a future of its folder, or of the OSError. ValueError where it saves none."""
        raise ValueError("this learner saves no checkpoints")

    # The end

    def begin_end(self) -> None:
        """This server begins to end, which a rank tells the others. From any thread."""

    def close(self) -> None:
        """Serving has ended: saves what is not saved yet. The last call."""
