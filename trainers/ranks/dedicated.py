"""The rank that only learns: takes experience from the ranks that serve, and sends them every drafter it publishes.

Knows a trainer, one channel to each serving rank and a clock; knows nothing of models or traffic. A rank that is slow
gets the newest drafter when it has taken the one before; those between it never sees.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dvi.distributed import POLL_S, PeerLostError
from dvi.records import UpdateReport
from trainers.learning.online import OnlineTrainer
from trainers.ranks.channel import Channel, Kind, Message
from trainers.ranks.messages import (
    NONE,
    MessageError,
    Published,
    pack_drafter,
    pack_facts,
    unpack_experience,
    unpack_facts,
)
from trainers.ranks.shipping import Ending

logger = logging.getLogger(__name__)


@dataclass
class ServingRank:
    """What the learner knows of one serving rank.

    sent_version, taken_version  of drafters; None before the first. While they differ, one is on its way.
    is_done, has_left            its traffic is served, and it may leave; it has left.
    """

    channel: Channel
    sent_version: int | None = None
    taken_version: int | None = None
    is_done: bool = False
    has_left: bool = False


class DedicatedLearner:
    """Feeds an OnlineTrainer from other ranks. Nobody waits for a round here, so it works off all steps that are owed.

    A step is owed for every rounds_per_step rounds of all ranks together, as many as `TimeBudget` remembers; where the
    trainer's budget is 1, one at a time, between two looks at what has arrived.

    num_received        positions.        num_received_bytes   of the messages that held them.
    num_bad_messages    that did not parse and were dropped.
    num_forgotten       positions dropped because a tenant was to be forgotten.
    staleness           versions between the drafter that made the newest round and the live one, on average over it.
    """

    def __init__(
        self, trainer: OnlineTrainer, speculator: object, channels: Mapping[int, Channel], *,
        checkpoint_every_s: float, on_save: Callable[[int], None], first_step: int = 1,
        on_report: Callable[[UpdateReport], None] = lambda report: None,
    ) -> None:
        """trainer: of this rank alone, over `speculator`'s drafter, which nothing else uses.

        channels      to each serving rank, by rank.
        on_save       called with the step under which this rank is to save the trainer; the others are told the same.
        first_step    of the checkpoints, which then count on.
        """
        self.trainer, self._split, self._drafter = trainer, speculator.split, speculator.drafter
        self._ranks = {rank: ServingRank(channel) for rank, channel in channels.items()}
        self._checkpoint_every_s, self._on_save, self._on_report = checkpoint_every_s, on_save, on_report
        self._save_step, self._saved_s = first_step, time.monotonic()
        self._packed: tuple[int, Message] | None = None  # the newest version sent to anybody
        self._is_interrupted = False
        self.num_received = self.num_received_bytes = self.num_bad_messages = self.num_forgotten = 0
        self.staleness = 0.0

    def run(self, is_stopped: Callable[[], bool] = lambda: False) -> Ending:
        """Learns until all ranks are done, or one of them, or this one by is_stopped, is interrupted.

        The channels are closed then, and all ranks serve the last version. Raises PeerLostError when a rank is lost;
        the others are told.
        """
        try:
            while not (self._is_interrupted or self._are_all_done):
                self._is_interrupted |= is_stopped()
                if not self.turn():
                    time.sleep(POLL_S)
            return self._end()
        except PeerLostError as error:
            self._tell_all(pack_facts(Kind.END, is_interrupted=False, save_step=self._save_step, lost=str(error)))
            raise
        finally:
            self._close()

    def turn(self) -> bool:
        """Takes in what has arrived, does a piece of learning, sends what is due. Whether there was anything to do.

        Raises PeerLostError when a rank is lost.
        """
        num_taken = self._take_in_all()
        is_working = self.trainer.is_busy
        report = self.trainer.step_if_due(is_idle=True)
        if report is not None:
            self._on_report(report)
        self._send_drafters()
        if time.monotonic() - self._saved_s >= self._checkpoint_every_s:
            self._tell_all(pack_facts(Kind.SAVE, step=self._save_step))
            self._on_save(self._save_step)
            self._save_step += 1
            self._saved_s = time.monotonic()
        return bool(num_taken) or is_working

    def stats(self) -> dict[str, float]:
        """The trainer's counts, and those of what came from the serving ranks."""
        version, serving = self._drafter.version, [rank for rank in self._ranks.values() if not rank.is_done]
        behind = [version - (rank.taken_version or 0) for rank in serving]
        return self.trainer.stats() | {
            "received_positions": float(self.num_received),
            "received_bytes": float(self.num_received_bytes),
            "bad_messages": float(self.num_bad_messages),
            "forgotten_positions": float(self.num_forgotten),
            "staleness": self.staleness,
            "versions_behind": float(max(behind, default=0)),
            "ranks_serving": float(len(serving)),
        }

    @property
    def _are_all_done(self) -> bool:
        return all(rank.is_done for rank in self._ranks.values())

    def _end(self) -> Ending:
        """Sends the last drafter and the end to all, and takes in what they still send, until all are done."""
        self._send_drafters(is_last=True)
        ending = Ending(self._is_interrupted, self._save_step)
        self._tell_all(pack_facts(Kind.END, **ending._asdict(), lost=None))
        while not self._are_all_done:
            self._take_in_all()
            time.sleep(POLL_S)
        return ending

    def _close(self) -> None:
        for rank in self._ranks.values():
            rank.channel.close()

    # Messages

    def _tell_all(self, message: Message) -> None:
        for rank in self._ranks.values():
            rank.channel.send(message)

    def _send_drafters(self, *, is_last: bool = False) -> None:
        """The live drafter to each rank that has not got it and has taken the one before."""
        version = self._drafter.version
        for rank in self._ranks.values():
            is_waiting = rank.sent_version == rank.taken_version
            if rank.sent_version != version and (is_waiting or is_last):
                rank.channel.send(self._packed_drafter(version))
                rank.sent_version = version

    def _packed_drafter(self, version: int) -> Message:
        if self._packed is None or self._packed[0] != version:
            published = Published(self._drafter.state_dict(), self.trainer.versions(), self.trainer.last_report)
            self._packed = version, pack_drafter(published)
        return self._packed[1]

    def _take_in_all(self) -> int:
        """Takes in all messages that have arrived; their number."""
        num_taken = 0
        for number, rank in self._ranks.items():
            while rank.channel.has_arrived and not rank.has_left:
                num_taken += 1
                try:
                    self._take_in(number, rank, rank.channel.receive())
                except MessageError as error:
                    self.num_bad_messages += 1
                    logger.warning("a message of rank %d is dropped: %s", number, error)
                except PeerLostError:
                    if not rank.is_done:
                        raise
                    rank.has_left = True
        return num_taken

    def _take_in(self, number: int, rank: ServingRank, message: Message) -> None:
        match message.kind:
            case Kind.EXPERIENCE:
                # Taken, whatever it holds: the next one may do better.
                rank.channel.send(Message(Kind.TAKEN))
                self._learn_from(number, message.body)
            case Kind.TAKEN:
                rank.taken_version = rank.sent_version
            case Kind.FORGET:
                tenant = unpack_facts(message.body, tenant=str)["tenant"]
                # Their experience of that tenant may be on its way; each answers behind it.
                self._tell_all(pack_facts(Kind.FORGET, tenant=tenant))
                self.num_forgotten += self.trainer.forget(tenant)
            case Kind.FORGOTTEN:
                self.num_forgotten += self.trainer.forget(unpack_facts(message.body, tenant=str)["tenant"])
            case Kind.ROLLBACK:
                self._roll_back(unpack_facts(message.body, version=(int, NONE))["version"])
            case Kind.DONE:
                self._is_interrupted |= unpack_facts(message.body, is_interrupted=bool)["is_interrupted"]
                rank.is_done = True
            case _:
                raise MessageError(f"the learner takes no {message.kind.name} message")

    def _learn_from(self, number: int, body: bytes) -> None:
        split = self._split
        rounds, ended = unpack_experience(
            body, rank=number, hidden_size=split.hidden_size, vocab_size=split.vocab_size, device=split.device
        )
        self.num_received_bytes += len(body)
        for transitions in rounds:
            self.trainer.observe(transitions)
            self.num_received += sum(map(len, transitions))
        newest = rounds[-1]
        self.staleness = self._drafter.version - sum(s.drafter_version for s in newest) / len(newest)
        for request_id in ended:
            self.trainer.end_request(request_id)

    def _roll_back(self, version: int | None) -> None:
        try:
            self.trainer.rollback(version)
        except ValueError as error:  # what the rank knew of the versions is out of date
            logger.warning("no rollback: %s", error)
