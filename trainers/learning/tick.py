"""The tick: all ranks say their reports, and the step that it may lead to is worked off a piece at a time.

Knows reports, peers, pieces and seconds; knows nothing of what a step does. Now and then a rank says its `RankReport`;
when all have, their sum tells every rank the same. No rank waits for another while it serves: what is under way is
looked at between rounds. A rank without peers agrees with itself at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import ClassVar

import torch

from dvi.distributed import POLL_S, PeerLostError, Peers, Pieces, Progress
from dvi.model.transfers import to_device, to_host
from dvi.records import UpdateReport
from trainers.learning import rank_report
from trainers.learning.budget import TimeBudget
from trainers.learning.losses import BatchTotals
from trainers.learning.rank_report import Notices, RankReport

TICK_S = 0.1  # between reports of a rank that owes no step: how long the others may have to wait for it
IDLE_S = 0.005  # a rank that only waits for others sleeps so long at a time


class Tick:
    """The tick in progress, if one is, with the step that was agreed on.

    notices      what this rank's job has to tell the others at the next one.
    agreed       the sum of all ranks' reports at the last one; None before the first, and where there are no peers.
    is_waiting   for other ranks, when the last piece ended.
    last_report  the newest step's; None before the first.
    train_s      seconds that the pieces took; the trainer adds its other ones.
    """

    COUNTS: ClassVar = {"train_s": "train_s"}  # names in saved states and here

    def __init__(
        self, begin: Callable[[], Pieces[UpdateReport | None]], *, peers: Peers, budget: TimeBudget, is_sliced: bool
    ) -> None:
        """begin: the pieces of a new one, which `agree` on a report, and end with that of the step made, if one was."""
        self._begin, self._peers, self._budget, self._is_sliced = begin, peers, budget, is_sliced
        self.notices = Notices()
        self.agreed: RankReport | None = None
        self.is_waiting = self._is_agreed = False
        self.last_report: UpdateReport | None = None
        self.train_s = self._work_s = 0.0
        self._work: Pieces[UpdateReport | None] | None = None
        self._said_s = -math.inf
        self._unreported: UpdateReport | None = None

    @property
    def is_open(self) -> bool:
        return self._work is not None

    def is_overdue(self, now_s: float) -> bool:
        """Whether the other ranks have to wait for this one's report."""
        return not self._peers.is_alone and now_s - self._said_s >= TICK_S

    def rest(self, *, is_idle: bool) -> None:
        """A little sleep, where this rank has nothing to do but wait for others."""
        if is_idle and not self._peers.is_alone:
            time.sleep(IDLE_S)

    def take_report(self) -> UpdateReport | None:
        """Of a step that ended while nobody asked for its report."""
        report, self._unreported = self._unreported, None
        return report

    def drop(self) -> None:
        """Gives up what is in progress."""
        self._work = None

    def finish(self) -> None:
        """Works off what is in progress; the next `take_report` tells of its step."""
        self.work_while(lambda: self.is_open)

    def work_while(self, is_so: Callable[[], bool]) -> None:
        """Works on this tick and the next ones, waiting for the others, until something has come about."""
        while is_so():
            self._unreported = self.advance(is_whole=True) or self._unreported
            if self.is_waiting:
                time.sleep(IDLE_S)

    def next_report(self) -> UpdateReport:
        """Of the next step made; waits for it."""
        while (report := self.advance(is_whole=True)) is None:
            if self.is_waiting:
                time.sleep(IDLE_S)
        return report

    def advance(self, *, is_whole: bool = False) -> UpdateReport | None:
        """Works on the tick or step in progress, or on a new one, up to the end of a piece; the report when it is done.

        is_whole, or a step that is not sliced: up to its end, or until it has to wait for other ranks. After a wait,
        which takes no time that counts, whether there is time to go on is for the caller to see.
        """
        while True:
            has_waited = self.is_waiting
            start_s = time.perf_counter()
            if self._work is None:
                self._work_s = 0.0
            # Not kept meanwhile: a step that raises is over.
            work, self._work = self._work or self._begin(), None
            report, self.is_waiting = None, False
            try:
                self.is_waiting = next(work) is Progress.WAITS
                self._work = work
            except StopIteration as end:
                report = end.value
            except PeerLostError as error:
                self._work = _raising(error)
                raise
            seconds = time.perf_counter() - start_s
            self.train_s += seconds
            self._work_s += seconds
            if report is not None:
                report.seconds = self._work_s
                self.last_report = report
            if self.is_waiting and self._is_agreed and not self._budget.has_limit:
                time.sleep(POLL_S)  # steps are to follow rounds, whatever time they take: also the others'
                continue
            is_piece = (has_waited and self._budget.has_limit) or self._is_sliced
            if self._work is None or self.is_waiting or (is_piece and not is_whole):
                return report

    def agree(self, mine: RankReport, totals: BatchTotals) -> Pieces[tuple[RankReport, BatchTotals]]:
        """The sums of all ranks' reports and of their batches' totals."""
        self._is_agreed = False
        if not self._peers.is_alone:
            # One device sync: what the ranks say goes through the CPU.
            message = torch.cat([mine.tensor(), to_host(totals.values_K)])
            yield from self._peers.total(message)
            self._said_s = time.perf_counter()
            self.agreed = mine = RankReport.of(message[: rank_report.SIZE])
            yield Progress.WORKED
            totals = BatchTotals(to_device(message[rank_report.SIZE :], totals.values_K.device))
        self._is_agreed = True
        return mine, totals


def _raising(error: PeerLostError) -> Pieces[None]:
    """What is in progress for ever once a rank is lost."""
    raise error
    yield
