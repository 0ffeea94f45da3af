"""How a rank of a job keeps company with the others between its rounds: who learns, when all save, when all end.

Knows a learner, ranks, signals and a clock; knows nothing of models or traffic. There are four ways: alone (which
ranks in lock-step are, too, each for itself and all alike), learning together by reports, and, with a dedicated
learner, serving for it or being it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.distributed import PeerLostError, wait
from dvi.learner import Learner
from dvi.records import Transitions, UpdateReport
from dvi.signals import Interrupted, Signals
from dvi.telemetry import MetricsWriter
from dvi.terminal import say
from trainers.learning.online import OnlineTrainer
from trainers.learning.rank_report import RankReport
from trainers.ranks.channel import GlooChannel
from trainers.ranks.dedicated import DedicatedLearner
from trainers.ranks.launch import Launch
from trainers.ranks.shipping import ShippingLearner

SHIPPING = ("sent_positions", "shed_positions", "sent_bytes")  # of ShippingLearner.stats, for the summary


@dataclasses.dataclass(frozen=True)
class JobHooks:
    """What an role has of its job.

    save        writes this rank's checkpoint, under this number or, if None, the one that all ranks come to.
    num_done    requests done, of which the earlier runs' are rank 0's.
    first_step  a number for the first checkpoint, above all that there are.
    """

    launch: Launch
    metrics: MetricsWriter
    signals: Signals
    save: Callable[[int | None], object]
    num_done: Callable[[], int]
    first_step: int


def take_role(hooks: JobHooks, speculator: SelfSpeculator, trainer: OnlineTrainer | None) -> Role:
    """The role that a rank's launch asks for. trainer: None where nothing is learnt, or another rank does it."""
    if hooks.launch.peers.is_alone:
        return LocalRole(hooks, trainer)
    if not hooks.launch.is_dedicated:
        return VotingRole(hooks, trainer)
    if hooks.launch.peers.is_first:
        return LearningRole(hooks, trainer, speculator)
    return ShippingRole(hooks, speculator)


class Role(Learner):
    """The learner as a job's serving sees it, with its updates written down; between rounds it saves, or ends the job.

    `step_if_due` raises Interrupted when the job is to end; it is not asked of a rank that serves nobody.

    serves       False on a rank that takes no requests.
    last_report  of the newest update here.
    lost         why nothing is learnt any more; then what is running is to be finished, and nothing begun.
    save_step    under which to save at the end, where the learner's rank says so; else None.
    """

    serves = True
    save_step: int | None = None
    lost: PeerLostError | None = None
    last_report: UpdateReport | None = None

    def __init__(self, hooks: JobHooks, learner: Learner | None = None) -> None:
        self._hooks, self._launch, self._learner = hooks, hooks.launch, learner or Learner()
        self._saved_s = time.monotonic()

    def observe(self, transitions: list[Transitions]) -> None:
        if self.lost is None:
            self._learner.observe(transitions)

    def end_request(self, request_id: int) -> None:
        """Nothing more comes of this request."""
        self._learner.end_request(request_id)

    def save_if_due(self) -> None:
        """To be called when a request has ended; where ranks agree on the moment, they have saved already."""

    def wait_for_others(self) -> None:
        """Does its part until no rank has any traffic. Raises Interrupted, and PeerLostError when a rank is lost."""

    def facts(self) -> dict[str, object]:
        """What the company costs, for the summary: numbers that can be added up over the ranks."""
        return {}

    def leave(self) -> None:
        """Takes leave of the others."""

    def _write(self, report: UpdateReport) -> None:
        self.last_report = report
        self._hooks.metrics.write("update", **dataclasses.asdict(report))

    def _is_stopped(self) -> bool:
        return self._hooks.signals.received is not None

    @property
    def _is_save_due(self) -> bool:
        return time.monotonic() - self._saved_s >= self._launch.config.output.checkpoint_every_s

    def _save(self) -> None:
        self._hooks.save(None)
        self._saved_s = time.monotonic()


class LocalRole(Role):
    """What learns is here and alone. In lock-step all its processes do the same, and agree on when they do."""

    _may_save = False

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        report = self._learner.step_if_due(is_idle=is_idle)
        if report is not None:
            self._write(report)
        # A clock and a signal are one process's own.
        said = torch.tensor([self._is_stopped(), self._is_save_due], dtype=torch.float64)
        is_stopped, self._may_save = wait(self._launch.processes.total(said)).tolist()
        if is_stopped:
            raise Interrupted
        return report

    def save_if_due(self) -> None:
        if self._may_save:
            self._may_save = False
            self._save()


class VotingRole(Role):
    """All ranks learn together. At every tick this one says what its job has to say, and does what was agreed on.

    When a rank is lost it lets what is running be finished, without learning.
    """

    _agreed: RankReport | None = None  # the last one acted on

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        if self.lost is not None:
            return None
        self._announce()
        try:
            report = self._learner.step_if_due(is_idle=is_idle)
            if report is not None:
                self._write(report)
            if self._learner.agreed is not self._agreed:
                self._agreed = self._learner.agreed
                self._act(self._agreed)
        except PeerLostError as error:
            self.lost = error
            say(f"{error}; finishing what is running")
            return None
        return report

    def _announce(self) -> None:
        notices = self._learner.notices
        notices.is_interrupted = self._is_stopped()
        notices.wants_save = self._launch.peers.is_first and self._is_save_due
        notices.num_done = self._hooks.num_done()

    def _act(self, agreed: RankReport) -> None:
        if agreed.wants_save:
            self._save()
        if agreed.is_interrupted:
            raise Interrupted

    def wait_for_others(self) -> None:
        self._learner.notices.is_done = True
        num_ranks = self._launch.peers.num_ranks
        while self.lost is None and not (self._agreed is not None and self._agreed.is_done == num_ranks):
            self.step_if_due(is_idle=True)
        if self.lost is not None:
            raise self.lost


class ShippingRole(Role):
    """This rank serves, and rank 0 learns from what it ships there; rank 0 says when to save and when to end."""

    def __init__(self, hooks: JobHooks, speculator: SelfSpeculator) -> None:
        train = hooks.launch.config.train
        channel = GlooChannel(0, timeout_s=train.peer_timeout_s)
        super().__init__(hooks, ShippingLearner(
            speculator, channel, train, outbox_positions=train.outbox_positions, on_save=hooks.save
        ))  # fmt: skip

    @property
    def lost(self) -> PeerLostError | None:
        return self._learner.lost

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        report = self._learner.step_if_due(is_idle=is_idle)
        if report is not None:
            self._write(report)
        if self.lost is None and (self._is_stopped() or self._learner.ending is not None):
            self.wait_for_others()
        return report

    def wait_for_others(self) -> None:
        ending = self._learner.finish(self._is_stopped)
        self.save_step = ending.save_step
        if ending.is_interrupted:
            raise Interrupted

    def facts(self) -> dict[str, object]:
        stats = self._learner.stats()
        return {name: int(stats[name]) for name in SHIPPING}

    def leave(self) -> None:
        self._learner.leave()


class LearningRole(Role):
    """This rank only learns, from what all others ship."""

    serves = False

    def __init__(self, hooks: JobHooks, trainer: OnlineTrainer, speculator: SelfSpeculator) -> None:
        super().__init__(hooks)
        config, peers = hooks.launch.config, hooks.launch.peers
        self._channels = {
            rank: GlooChannel(rank, timeout_s=config.train.peer_timeout_s) for rank in range(1, peers.num_ranks)
        }
        self._dedicated = DedicatedLearner(
            trainer, speculator, self._channels, checkpoint_every_s=config.output.checkpoint_every_s,
            on_save=self._save_as, first_step=hooks.first_step, on_report=self._write,
        )  # fmt: skip

    def wait_for_others(self) -> None:
        ending = self._dedicated.run(self._is_stopped)
        self.save_step = ending.save_step
        if ending.is_interrupted:
            raise Interrupted

    def facts(self) -> dict[str, object]:
        return dict.fromkeys(SHIPPING, 0)

    def leave(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _save_as(self, step: int) -> None:
        self._hooks.save(step)
        stats = self._dedicated.stats()
        self._launch.console.print(
            f"step {stats['steps']:.0f}, {stats['received_positions']:.0f} positions received, "
            f"{stats['ranks_serving']:.0f} ranks serving"
        )
