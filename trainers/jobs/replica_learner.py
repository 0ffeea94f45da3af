"""The learner of a server that is one of several: all learn one drafter, and save, rest and end together.

Knows what `trainers.jobs.serving_learner` knows, and the ranks. What a lone server's learner decides for itself is
said to the others at the next tick, and done when all have agreed; so every rank does it between the same two steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from dvi.distributed import PeerLostError, Peers
from dvi.records import DrafterVersion, Transitions, UpdateReport
from trainers.jobs.serving_learner import ServingLearner, logger, promise
from trainers.jobs.traffic_counts import TrafficCounts
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OWN, OnlineTrainer
from trainers.learning.rank_report import RankReport
from trainers.ranks.shards import SavedRun

END_PATIENCE_S = 10.0  # beyond the time for draining: for clients to read their answers, and for the last tick


class ReplicaLearner(ServingLearner):
    """A `ServingLearner` on one of several ranks, with a store of its own. Counts of traffic are this rank's.

    Any rank begins a checkpoint for all, by its clock or by `checkpoint`, and any that ends ends all. A rollback is the
    first's to ask for. It holds up the engine for a tick, about 0.1 s, and so do `rest` and `forget`.

    lost     why nothing is learnt any more: another rank is lost, or learning failed here, which the others then take
             for the loss of this one. None while all is well.
    """

    has_peers = True

    def __init__(
        self,
        trainer: OnlineTrainer,
        store: CheckpointStore,
        *,
        peers: Peers,
        first_step: int,
        drain_s: float,
        **options: object,
    ) -> None:
        """first_step: of the checkpoints, the same on all ranks. drain_s: so long may another rank take to end."""
        super().__init__(trainer, store, **options)
        self.lost: Exception | None = None
        self._peers, self._next_step, self._drain_s = peers, first_step, drain_s
        self._asked: Future[Path] | None = None  # a checkpoint that somebody here waits for
        self._agreed: RankReport | None = None  # the last one acted on
        self._is_ending = False

    # Learner protocol

    def observe(self, transitions: list[Transitions]) -> None:
        """See `Learner`."""
        with self._fatal():
            super().observe(transitions)

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        """See `Learner`. Also does what the ranks have agreed on. Raises PeerLostError once a rank is lost."""
        with self._fatal():
            self._act()  # on a tick that was finished out of turn
            self._announce()
            return super().step_if_due(is_idle=is_idle)

    def rest(self, is_resting: bool) -> None:
        """While it is told to rest, no rank learns, and it is called on all the same: the others wait for it."""
        if self.lost is None:
            self._finish_tick()
        self.trainer.notices.is_resting = is_resting

    def rollback(self, version: int | None = None) -> DrafterVersion:
        """See `Learner`; on all ranks. Raises ValueError where this is not the first, `lost` without the others."""
        self._finish_tick()
        return super().rollback(version)

    def _forget_here(self, tenant: str) -> int:
        try:
            return self.trainer.forget(tenant)
        except PeerLostError:  # nobody learns from it any more, and it is dropped all the same
            return self.trainer.replay.forget_tenant(tenant)

    # Saving

    def checkpoint(self) -> Future[Path]:
        """Asks all ranks for one at the next tick; a future of this rank's folder. Raises `lost`."""
        if self.lost is not None:
            raise self.lost
        if self._asked is None:
            self._asked = self.last_write = promise()
        return self._asked

    def close(self) -> None:
        """Goes on ticking until all ranks close, saves with them, and lets another learner have the folder.

        Saves nothing without the others: theirs would be of another moment. Raises the PeerLostError then.
        """
        try:
            if self.lost is None:
                self._end_together()
        except PeerLostError as error:
            self._lose(error)
        if self.lost is not None:
            logger.warning("no last checkpoint: %s", self.lost)
            self._is_changed = False
        super().close()
        if isinstance(self.lost, PeerLostError):
            raise self.lost

    def state_dict(self) -> dict[str, object]:
        """As ever; of what all ranks have alike, the first's holds it."""
        state = super().state_dict()
        if not self._peers.is_first:
            state["trainer"] = {key: state["trainer"][key] for key in OWN if key in state["trainer"]}
        return state | {"num_ranks": self._peers.num_ranks}

    def load(self, saved: SavedRun) -> None:
        """See `ServingLearner`."""
        super().load(saved)
        if saved.own is None and not self._peers.is_first:
            self.traffic = TrafficCounts()  # it was the first's

    def provenance(self) -> dict[str, object]:
        """See `ServingLearner`; counts of requests and tokens are of this rank, one of `ranks`."""
        return super().provenance() | {"ranks": self._peers.num_ranks}

    # The others

    def begin_end(self) -> None:
        """This server ends; the others are told. From any thread."""
        self._is_ending = True

    def _announce(self) -> None:
        notices = self.trainer.notices
        is_due = self._is_checkpoint_due() and not self._writes
        notices.wants_save, notices.is_interrupted = self._asked is not None or is_due, self._is_ending

    def _save_if_due(self, *, is_between_steps: bool) -> None:
        """All ranks agree on when."""
        self._act()

    def _act(self) -> None:
        """Does what the newest tick agreed on, once."""
        agreed = self.trainer.agreed
        if agreed is self._agreed:
            return
        self._agreed = agreed
        if agreed.wants_save and not self._has_all_done:
            self._save()
        if agreed.is_interrupted and not self._is_ending:
            self._is_ending = True
            self.on_end()

    def _save(self) -> None:
        """On all ranks under one number. A rank whose disk is slow leaves one out."""
        step, self._next_step = self._next_step, self._next_step + 1
        if self._writes and self._asked is None:
            self.state_dict()  # which all ranks make together where they share its optimizer's state out
            self._skip_checkpoint()
        else:
            self._begin_checkpoint(self._asked or promise(), step=step)
            self._asked = None

    def _finish_tick(self) -> None:
        if self.lost is not None:
            raise self.lost
        try:
            self.trainer.finish_tick()
            self._act()
        except PeerLostError as error:
            self._lose(error)
            raise
        self._announce()

    @property
    def _has_all_done(self) -> bool:
        return self._agreed is not None and self._agreed.is_done == self._peers.num_ranks

    def _end_together(self) -> None:
        self._is_ending = True
        self.trainer.notices.is_done = self.trainer.notices.is_resting = True
        deadline_s = time.monotonic() + self._drain_s + END_PATIENCE_S
        while not self._has_all_done:
            if time.monotonic() > deadline_s:
                raise PeerLostError(
                    f"rank {self._peers.rank} of {self._peers.num_ranks} has ended, and another rank has not within "
                    f"serve.drain_s + {END_PATIENCE_S:g} s; its own log says why"
                )
            self.step_if_due(is_idle=True)
        self._save()

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._lose(error)
            raise

    def _lose(self, error: Exception) -> None:
        if self.lost is not None:
            return
        self.lost = error
        if self._asked is not None:
            self._asked.set_exception(error)
            self._asked = None
        if not isinstance(error, PeerLostError):
            self._peers.leave()  # so that the others need not wait for this rank
