"""The learner as a serving rank has it, where another rank does the learning: ships experience, takes over drafters.

Knows an outbox, a channel and the drafter that serves; knows nothing of steps. Serving never waits for it: what cannot
be sent in time is shed, and counted.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from dvi.distributed import POLL_S, PeerLostError
from dvi.learner import Learner
from dvi.records import DrafterVersion, Transitions, UpdateReport
from dvi.settings import LearningSettings
from trainers.learning.experience import last_positions
from trainers.ranks.channel import Channel, Kind, Message
from trainers.ranks.messages import (
    NONE,
    MessageError,
    Round,
    copy_to_host,
    pack_experience,
    pack_facts,
    publish,
    unpack_drafter,
    unpack_facts,
)

FRAME_POSITIONS = 64  # a message is sent with so many, or while nobody waits: one costs about as much as they do
MAX_UNTAKEN = 2  # messages on their way: one that the learner works on, one that waits there

logger = logging.getLogger(__name__)


class Ending(NamedTuple):
    """How a job on several ranks came to its end.

    is_interrupted  by a signal on one of the ranks; otherwise all had served their traffic.
    save_step       under which every rank saves its part of the last checkpoint.
    """

    is_interrupted: bool
    save_step: int


class Outbox:
    """Experience that is not sent yet, oldest first, on the CPU: at most `capacity` positions.

    num_positions   held now.        num_shed   positions that had to make room for newer ones, so far.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rounds: deque[Round] = deque()
        self.num_positions = self.num_shed = 0

    def add(self, transitions: list[Transitions]) -> None:
        """Takes copies. No wait for the device that the stretches are on."""
        fitting = [last_positions(s, self._capacity) if s.is_prefill else s for s in transitions if len(s)]
        self.num_shed += _num_positions(transitions) - _num_positions(fitting)
        if not fitting:
            return
        self._rounds.append(copy_to_host(fitting))
        self.num_positions += _num_positions(fitting)
        while self.num_positions > self._capacity:
            self.num_shed += self._drop_oldest()

    def take(self, num_positions: int) -> list[list[Transitions]]:
        """The oldest rounds, enough for so many positions where there are, of those that have arrived on the CPU."""
        taken, num_taken = [], 0
        while self._rounds and num_taken < num_positions and self._rounds[0].has_arrived:
            taken.append(self._rounds.popleft().stretches)
            num_taken += _num_positions(taken[-1])
        self.num_positions -= num_taken
        return taken

    def forget(self, tenant: str) -> int:
        """Drops what is a tenant's; the number of positions."""
        num_before = self.num_positions
        kept = [Round([s for s in r.stretches if s.tenant != tenant], r.arrival) for r in self._rounds]
        self._rounds = deque(r for r in kept if r.stretches)
        self.num_positions = sum(_num_positions(r.stretches) for r in self._rounds)
        return num_before - self.num_positions

    def shed_all(self) -> None:
        while self._rounds:
            self.num_shed += self._drop_oldest()

    def _drop_oldest(self) -> int:
        """Drops the oldest stretch; its positions."""
        stretches = self._rounds[0].stretches
        num_dropped = len(stretches.pop(0))
        if not stretches:
            self._rounds.popleft()
        self.num_positions -= num_dropped
        return num_dropped


class ShippingLearner(Learner):
    """A `Learner` whose steps another rank makes.

    on_save             called between rounds with the step under which this rank is to save what is its own.
    lost                why there is no learner any more; None while there is. Serving goes on with the drafter as it
                        is, and what is observed is shed.
    ending              set once the learner has ended the job: this rank is to stop soon, and to call `finish`.
    num_steps           the learner's, as of the newest drafter that has come.
    train_s             seconds that shipping and taking over took here.
    last_report         the learner's, of the step behind the newest drafter.
    num_bad_messages    that did not parse and were dropped.
    """

    def __init__(
        self, speculator: object, channel: Channel, config: LearningSettings, *, outbox_positions: int,
        on_save: Callable[[int], None] = lambda step: None,
    ) -> None:
        """speculator: anything with `drafter`. channel: to the learner's rank.

        Raises ValueError when the outbox could not hold a message.
        """
        if outbox_positions < FRAME_POSITIONS:
            raise ValueError(
                f"outbox_positions must be >= {FRAME_POSITIONS}, one message's, got {outbox_positions}; try 4096"
            )
        self.config, self.on_save = config, on_save
        self._drafter: nn.Module = speculator.drafter
        self._channel, self._outbox = channel, Outbox(outbox_positions)
        self._ended: list[int] = []
        self._num_untaken = 0
        self.lost: PeerLostError | None = None
        self.ending: Ending | None = None
        self.num_steps = self.num_sent = self.num_messages = self.num_bytes = self.num_bad_messages = 0
        self.train_s = 0.0
        self.last_report: UpdateReport | None = None
        self._versions = [DrafterVersion(
            version=self._drafter.version, created_s=time.time(), source="initial", step=0, canary_score=None,
            is_live=True, is_kept=False,
        )]  # fmt: skip

    # Learner protocol

    def observe(self, transitions: list[Transitions]) -> None:
        """Puts the experience of one round (or prefill) into the outbox. Never waits."""
        start_s = time.perf_counter()
        if not self.config.learn_from_prompts:
            # The last prompt position stays: it is the anchor of the first round's drafts.
            transitions = [last_positions(s, 1) if s.is_prefill else s for s in transitions]
        self._outbox.add(transitions)
        if self.lost is not None:
            self._outbox.shed_all()
        self.train_s += time.perf_counter() - start_s

    def step_if_due(self, *, is_idle: bool = False) -> UpdateReport | None:
        """Takes in what has come from the learner, and sends what it can. Never waits.

        Returns the report of the step behind a drafter that serves from now on, else None.
        """
        start_s = time.perf_counter()
        report_before = self.last_report
        try:
            # Not after the end: what comes then is the learner's leaving.
            while self._is_open and self._channel.has_arrived:
                self._take_in(self._channel.receive())
        except PeerLostError as error:
            self._lose(error)
        if self._may_send(is_all=is_idle):
            self._send_experience()
        self.train_s += time.perf_counter() - start_s
        return None if self.last_report is report_before else self.last_report

    @property
    def is_busy(self) -> bool:
        """Whether something has come, or can be sent. Becomes true by itself: ask again now and then."""
        return self._is_open and (self._channel.has_arrived or self._may_send(is_all=True))

    def versions(self) -> list[DrafterVersion]:
        """The versions that the learner knew of when it sent the newest drafter; that one is live."""
        return list(self._versions)

    def rollback(self, version: int | None = None) -> DrafterVersion:
        """Asks the learner to publish a kept version's weights again, for all ranks; None is the best so far.

        Returns the version that is live now: the new one comes with a later `step_if_due`, if the learner still has
        the weights. Raises ValueError for a version that is not kept, or is live; PeerLostError without a learner.
        """
        live = self._versions[-1]
        if self.lost is not None:
            raise self.lost
        kept = [record.version for record in self._versions if record.is_kept and record is not live]
        if version is not None and version not in kept:
            raise ValueError(
                f"version must be one whose weights are kept and not live, {', '.join(map(str, kept)) or 'none yet'}; "
                f"got {version}"
            )
        self._channel.send(pack_facts(Kind.ROLLBACK, version=version))
        return live

    def forget(self, tenant: str) -> int:
        """Drops a tenant's experience here at once, and on the learner and all other ranks by message.

        Returns the number of positions dropped here; what the learner drops is in its own `stats`.
        """
        self._channel.send(pack_facts(Kind.FORGET, tenant=tenant))
        return self._outbox.forget(tenant)

    def stats(self) -> dict[str, float]:
        """Counts, seconds, bytes and positions, for metrics."""
        return {
            "steps": float(self.num_steps),
            "train_s": self.train_s,
            "sent_positions": float(self.num_sent),
            "shed_positions": float(self._outbox.num_shed),
            "outbox_positions": float(self._outbox.num_positions),
            "sent_messages": float(self.num_messages),
            "sent_bytes": float(self.num_bytes),
            "bad_messages": float(self.num_bad_messages),
            "learner_lost": float(self.lost is not None),
        }

    # The job's

    def end_request(self, request_id: int) -> None:
        """Tells the learner, with the next experience, that nothing more comes of this request."""
        if self.lost is None:
            self._ended.append(request_id)

    def finish(self, is_stopped: Callable[[], bool] = lambda: False) -> Ending:
        """Says that this rank has served its traffic, or was interrupted, and waits until the learner ends the job.

        Until then it takes over drafters and saves when it is told to. Sends what is left in the outbox first; once
        is_stopped says that this rank is interrupted, it sheds it. Raises PeerLostError when a rank is lost, now or
        since whenever.
        """
        told: bool | None = None  # what was said last
        while True:
            self.step_if_due(is_idle=True)
            if self.lost is not None:
                raise self.lost
            is_interrupted = is_stopped()
            if is_interrupted:
                self._outbox.shed_all()
            if told != is_interrupted and (not self._outbox.num_positions or self.ending is not None):
                self._channel.send(pack_facts(Kind.DONE, is_interrupted=is_interrupted))
                told = is_interrupted
            if told is not None and self.ending is not None:
                return self.ending
            time.sleep(POLL_S)

    def close(self) -> None:
        """A server's end: says that this rank serves no more, and leaves; learning goes on for the others."""
        if self._is_open:
            self._channel.send(pack_facts(Kind.DONE, is_interrupted=False))
        self.leave()

    def leave(self) -> None:
        """Takes leave of the learner, for whom this rank is lost unless it was done. Waits at most for the timeout."""
        self._channel.close()

    # Messages

    @property
    def _is_open(self) -> bool:
        return self.lost is None and self.ending is None

    def _may_send(self, *, is_all: bool) -> bool:
        has_enough = self._outbox.num_positions >= (1 if is_all else FRAME_POSITIONS)
        return has_enough and self._num_untaken < MAX_UNTAKEN and self._is_open

    def _send_experience(self) -> None:
        rounds = self._outbox.take(FRAME_POSITIONS)
        if not rounds:  # not on the CPU yet
            return
        message = pack_experience(rounds, self._ended)
        self._channel.send(message)
        self._ended = []
        self._num_untaken += 1
        self.num_messages += 1
        self.num_sent += sum(_num_positions(transitions) for transitions in rounds)
        self.num_bytes += len(message.body)

    def _take_in(self, message: Message) -> None:
        try:
            match message.kind:
                case Kind.TAKEN:
                    self._num_untaken -= 1
                case Kind.DRAFTER:
                    # Taken, whatever it holds: the next one may do better.
                    self._channel.send(Message(Kind.TAKEN))
                    self._take_over(message.body)
                case Kind.FORGET:
                    tenant = unpack_facts(message.body, tenant=str)["tenant"]
                    self._outbox.forget(tenant)
                    # Behind everything of that tenant's that is on its way.
                    self._channel.send(pack_facts(Kind.FORGOTTEN, tenant=tenant))
                case Kind.SAVE:
                    self.on_save(unpack_facts(message.body, step=int)["step"])
                case Kind.END:
                    self._end(**unpack_facts(message.body, is_interrupted=bool, save_step=int, lost=(str, NONE)))
                case _:
                    raise MessageError(f"a serving rank takes no {message.kind.name} message")
        except MessageError as error:
            self.num_bad_messages += 1
            logger.warning("a message of the learner is dropped: %s", error)

    def _take_over(self, body: bytes) -> None:
        published = unpack_drafter(body, self._drafter)
        if published.version != self._drafter.version:
            publish(published, self._drafter)
        self._versions, self.last_report = published.versions, published.report
        self.num_steps = published.versions[-1].step

    def _end(self, *, is_interrupted: bool, save_step: int, lost: str | None) -> None:
        if lost is not None:
            self._lose(PeerLostError(lost))
        else:
            self.ending = Ending(is_interrupted, save_step)

    def _lose(self, error: PeerLostError) -> None:
        self.lost = error
        self._outbox.shed_all()
        logger.warning("learning has ended, serving goes on: %s", error)


def _num_positions(stretches: list[Transitions]) -> int:
    return sum(map(len, stretches))
