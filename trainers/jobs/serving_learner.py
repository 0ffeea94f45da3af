"""The learner of a server: an OnlineTrainer whose state outlives the process.

Knows a trainer, counts of the traffic it learns from, a folder of checkpoints and a metrics file; knows nothing of
HTTP, engines or text. Every call comes from the engine's thread. Files are written by a thread of its own, and no disk
that is full, slow or read-only stops serving or learning.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from dvi.learner import Learner
from dvi.records import DrafterVersion, Transitions, UpdateReport
from dvi.telemetry import MetricsWriter
from trainers.jobs.traffic_counts import TrafficCounts
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OnlineTrainer
from trainers.ranks.shards import SavedRun

RECORD_EVERY_S = 1.0  # of updates in the metrics file: a server runs for months, and a line a second is 30 MB a day
STEP_PATIENCE_S = 10.0  # a due checkpoint waits so long for the step in progress, which it would have to hurry

logger = logging.getLogger(__name__)


class ServingLearner(Learner):
    """A `Learner` that checkpoints every checkpoint_every_s while it learns, and once more in `close`.

    A checkpoint costs the engine's thread a copy of the state; another thread hashes, writes and syncs it. One that
    falls due while another is being written is skipped. One that cannot be written is reported and tried again an
    interval later; those before it stay.

    save_replay False leaves the experience, which is users' text, out of the files: a resumed learner has all else
    and an empty replay. True keeps it, in files that only their owner can read.

    trainer, store          it closes the store.
    settings                of model and drafter; saved in each checkpoint, for the next start to compare.
    obsolete                folders of an earlier server's ranks that are no more, removed once there is a checkpoint.
    on_event                called with ("checkpoint", folder name) and ("checkpoint_failed", reason).
    last_write              the newest checkpoint, written or about to be: a future of its folder, or of the OSError.
    last_checkpoint_error   why the newest finished write failed; None when it did not.
    num_checkpoints, num_checkpoints_failed, num_checkpoints_skipped   since the start of the process.
    """

    def __init__(
        self,
        trainer: OnlineTrainer,
        store: CheckpointStore,
        *,
        checkpoint_every_s: float,
        save_replay: bool = False,
        metrics: MetricsWriter | None = None,
        settings: dict[str, object] | None = None,
        obsolete: Iterable[Path] = (),
    ) -> None:
        self.trainer, self.traffic = trainer, TrafficCounts()
        self.last_checkpoint_error: str | None = None
        self.num_checkpoints = self.num_checkpoints_failed = self.num_checkpoints_skipped = 0
        self._store, self._metrics, self._settings = store, metrics, settings or {}
        self._checkpoint_every_s, self._save_replay, self._obsolete = checkpoint_every_s, save_replay, list(obsolete)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: deque[tuple[Future[Path], bool]] = deque()  # each with whether it purges
        # is_changed: since the last snapshot. is_purge_due: older checkpoints hold what must be forgotten.
        self._is_changed = self._is_purge_due = self._is_metrics_full = False
        self._saved_s, self._recorded_s = time.monotonic(), -RECORD_EVERY_S

    # Learner protocol

    def observe(self, transitions: list[Transitions]) -> None:
        """See `Learner`."""
        self.trainer.observe(transitions)
        self.traffic.count(transitions)
        self._is_changed = True

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        """See `Learner`. Also begins a checkpoint when it is time, and looks after those that were begun."""
        report = self.trainer.step_if_due(is_idle=is_idle)
        if report is not None:
            self._is_changed = True
            self._record(report)
        self._collect()
        self._save_if_due(is_between_steps=report is not None or not self.trainer.is_busy)
        return report

    def _save_if_due(self, *, is_between_steps: bool) -> None:
        if self._is_checkpoint_due(late_s=0.0 if is_between_steps else STEP_PATIENCE_S):
            if self._writes:
                self._skip_checkpoint()
            else:
                self.checkpoint()

    @property
    def is_busy(self) -> bool:
        """See `Learner`. Becomes true by itself when a checkpoint falls due or ends: ask again now and then."""
        has_ended = bool(self._writes) and self._writes[0][0].done()
        return self.trainer.is_busy or has_ended or self._is_checkpoint_due()

    def versions(self) -> list[DrafterVersion]:
        """See `Learner`."""
        return self.trainer.versions()

    def rollback(self, version: int | None = None) -> DrafterVersion:
        """See `Learner`."""
        live = self.trainer.rollback(version)
        self._is_changed = True
        return live

    def forget(self, tenant: str) -> int:
        """See `Learner`. Where the replay is saved, the files have forgotten once `last_write` has succeeded.

        It then holds the only checkpoint left. Should it fail, the next one does the same.
        """
        num_positions = self._forget_here(tenant)
        if self._save_replay:
            self._is_purge_due = True
            self.checkpoint()
        return num_positions

    def _forget_here(self, tenant: str) -> int:
        return self.trainer.forget(tenant)

    def stats(self) -> dict[str, float]:
        """See `Learner`: the trainer's and the checkpoints' counts."""
        return self.trainer.stats() | {
            "checkpoints": self.num_checkpoints, "checkpoints_failed": self.num_checkpoints_failed,
            "checkpoints_skipped": self.num_checkpoints_skipped,
        }  # fmt: skip

    # Saving

    def checkpoint(self) -> Future[Path]:
        """A checkpoint of this moment, written behind those that still are: a future of its folder, or of OSError."""
        write = promise()
        self._begin_checkpoint(write)
        return write

    def _begin_checkpoint(self, write: Future[Path], *, step: int | None = None) -> None:
        """step: its number; None: the next one of the store."""
        state = _copy(self.state_dict())
        is_purge, self._is_purge_due, self._is_changed = self._is_purge_due, False, False
        self._saved_s = time.monotonic()
        self._writer.submit(self._write, write, state, is_purge, step)
        self._writes.append((write, is_purge))
        self.last_write = write

    def _skip_checkpoint(self) -> None:
        self.num_checkpoints_skipped += 1
        self._saved_s = time.monotonic()

    def close(self) -> None:
        """Saves what is not saved yet, waits until it is written, and lets another learner have the folder."""
        if self._is_changed:
            self.checkpoint()
        self._writer.shutdown(wait=True)
        self._collect()
        if self._metrics is not None:
            try:
                self._metrics.close()
            except OSError as error:
                logger.warning("the last metrics are lost: %s", error)
        self._store.close()

    def state_dict(self) -> dict[str, object]:
        """What a restarted server needs besides its settings. Its tensors are the live ones."""
        trainer = self.trainer.state_dict()
        if not self._save_replay:
            del trainer["replay"]
        return {
            "settings": self._settings,
            "trainer": trainer,
            "traffic": self.traffic.state_dict(),
            "provenance": self.provenance(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues where `state_dict` was taken, in a new process. Saved experience that it may not keep is purged."""
        trainer = dict(state["trainer"])
        if "replay" in trainer and not self._save_replay:
            del trainer["replay"]
            self._is_changed = self._is_purge_due = True
        replay = self.trainer.replay
        self.trainer.load_state_dict({"replay": replay.state_dict()} | trainer)
        # Their requests ended with the old process: a new one with the same id must not go on with their segments.
        for request_id in replay.state_dict()["open"][:, 0].tolist():
            replay.end(request_id)
        self.traffic.load_state_dict(state["traffic"])

    def load(self, saved: SavedRun) -> None:
        """Goes on from what an earlier server left, of as many ranks or of others; see `load_state_dict`."""
        state, own = saved.state, saved.own
        if own is not None:
            return self.load_state_dict(state | own | {"trainer": state["trainer"] | own["trainer"]})
        if self._save_replay:
            for replay, part, num_parts in saved.replays:
                self.trainer.replay.adopt(replay, part=part, num_parts=num_parts)
        elif saved.replays:
            self._is_changed = self._is_purge_due = True
        self.load_state_dict(state)
        self.trainer.take_over(saved.taken_over)

    def provenance(self) -> dict[str, object]:
        """How the drafter came about, as plain values for `save_drafter(metrics=...)` and its model card.

        Counts are of the traffic it learnt from, over all restarts. *_before and *_after are of the first and the
        newest full window of the traffic, and missing until there is one; acceptance leaves out what was waived.
        """
        total, trainer = self.traffic.total, self.trainer
        facts: dict[str, object] = {
            "requests": self.traffic.num_requests, "prompt_tokens": total.prompt_tokens,
            "tokens": total.new_tokens, "rounds": total.num_rounds, "drafted": total.num_drafted,
            "accepted": total.num_accepted, "waived": total.num_waived, "schedule": trainer.config.schedule,
            "phase": trainer.schedule.phase(max(trainer.num_steps - 1, 0)), "steps": trainer.num_steps,
            "skipped_steps": trainer.num_skipped, "rollbacks": trainer.num_rollbacks,
            "versions": next(v.version for v in trainer.versions() if v.is_live),
        }  # fmt: skip
        for moment, window in (("before", self.traffic.first), ("after", self.traffic.newest)):
            if window is not None:
                facts[f"acceptance_{moment}"] = round(window.honest_acceptance_rate, 4)
                facts[f"mean_accepted_tokens_{moment}"] = round(window.mean_accepted_tokens, 4)
        return facts

    def _is_checkpoint_due(self, *, late_s: float = 0.0) -> bool:
        return self._is_changed and time.monotonic() - self._saved_s >= self._checkpoint_every_s + late_s

    def _write(self, write: Future[Path], state: dict[str, object], is_purge: bool, step: int | None) -> None:
        """On the writer's thread, the only one that uses the store."""
        try:
            self._store.renew()
            step = self._store.next_step if step is None else step
            folder = self._store.save(state, step, is_private=self._save_replay)
            if is_purge:
                self._store.keep_only(step)
            while self._obsolete:
                shutil.rmtree(self._obsolete[-1])
                self._obsolete.pop()
        except BaseException as error:  # for `_collect` to judge
            write.set_exception(error)
        else:
            write.set_result(folder)

    def _collect(self) -> None:
        """Takes note of the writes that have ended."""
        while self._writes and self._writes[0][0].done():
            write, is_purge = self._writes.popleft()
            try:
                folder = write.result()
            except OSError as error:
                self.num_checkpoints_failed += 1
                self.last_checkpoint_error = str(error)
                self._is_changed, self._is_purge_due = True, self._is_purge_due or is_purge
                logger.warning("no checkpoint: %s; trying again in %g s", error, self._checkpoint_every_s)
                self.on_event("checkpoint_failed", str(error))
            else:
                self.num_checkpoints += 1
                self.last_checkpoint_error = None
                self.on_event("checkpoint", folder.name)

    def _record(self, report: UpdateReport) -> None:
        """Writes down a skipped step, and of the others at most one every RECORD_EVERY_S."""
        now = time.monotonic()
        if self._metrics is None or (report.skipped_reason is None and now - self._recorded_s < RECORD_EVERY_S):
            return
        self._recorded_s = now
        try:
            self._metrics.write("update", **dataclasses.asdict(report))
        except OSError as error:
            if not self._is_metrics_full:  # once, not once a second
                logger.warning("updates are not recorded: %s", error)
            self._is_metrics_full = True
        else:
            self._is_metrics_full = False


def promise() -> Future[Path]:
    """A future that whoever waits for it may give up, but cannot cancel."""
    future: Future[Path] = Future()
    future.set_running_or_notify_cancel()
    return future


def _copy(value: object) -> object:
    """The same tree with tensors of its own, on the CPU."""
    if isinstance(value, Tensor):
        # Not in the writer's thread: a transfer there would break into the capture of a CUDA graph here.
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value
