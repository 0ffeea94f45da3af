"""The publish gate: which of the student's weights come to serve, and which it must go back to.

Knows the student, the drafter that serves and the versions; knows nothing of losses, replay or when a step is due. What
serves changes only in `_publish`: when its turn has come, after a rollback, and when the head is trimmed. A canary
compares the student with the best so far on stored blocks; whoever loses it starts from the best again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from dvi.distributed import Peers, Pieces, Progress
from dvi.model.transfers import to_host
from dvi.records import DrafterVersion, ReplayBatch
from dvi.settings import LearningSettings
from trainers.learning.student import Student, copy_state
from trainers.learning.versions import Snapshot, State, VersionHistory

CANARY_BLOCKS = 256  # fewer, and the score's noise alone looks like a loss of a tenth


class PublishGate:
    """Between a student and the drafter that serves.

    version         the newest number published.
    has_waived      a lossy rule has let pass some of what was learnt from; the next drafter published says so.
    num_rollbacks   returns to earlier weights.
    num_noop_swaps  publishes left out because the weights served already.
    """

    COUNTS: ClassVar = {  # names in saved states and here
        "num_rollbacks": "num_rollbacks", "num_noop_swaps": "num_noop_swaps", "_version": "version",
        "_has_waived": "has_waived",
    }  # fmt: skip

    def __init__(
        self, split: object, live: nn.Module, student: Student, config: LearningSettings, *, peers: Peers
    ) -> None:
        self._split, self._live, self._student, self._config, self._peers = split, live, student, config, peers
        self.version: int = live.version
        self.has_waived = False
        self.num_rollbacks = self.num_noop_swaps = 0
        self.history = VersionHistory(Snapshot(student.copy_state(), step=0))
        # An adapter that has learnt before goes on from its version.
        self.history.add(self.version, self.history.best, "resume" if self.version else "initial")

    # After a step

    def canary(self, blocks: Callable[[int], Iterable[ReplayBatch]]) -> Pieces[tuple[float, float]]:
        """Scores of the student and of the best so far on the same stored blocks, a piece at a time.

        The score is the expected accepted prefix of a block: sum over depths of the product of agreements so far. The
        blocks are those of all ranks that have some. blocks: so many of this rank's, in parts, or none.
        """
        totals = torch.zeros(3, dtype=torch.int64, device=self._split.device)
        for part in blocks(-(-CANARY_BLOCKS // self._peers.num_ranks)):
            yield Progress.WORKED
            totals[:2] += self._student.accepted_prefixes(part, self.history.best.state)
            totals[2] += len(part.mask_NT)
        learner, best, num_all = (yield from self._peers.total(to_host(totals))).tolist()
        return learner / num_all, best / num_all

    def settle(self, step: int, scores: tuple[float, float] | None) -> bool:
        """Ends a finite step: back to the best after a canary that was lost, else published when its turn has come.

        scores: what `canary` gave, None when it was not its turn. Returns whether the step's weights were published.
        """
        config, history = self._config, self.history
        candidate, best = (None, None) if scores is None else scores
        if scores is not None and candidate < best * (1 - config.canary_tolerance):
            self.return_to_best()
            if not self.serves(history.best.state):
                history.best = dataclasses.replace(history.best, canary_score=best)
                self._publish(history.best, "rollback")
            return False
        is_turn = step % config.steps_per_publish == 0
        is_best = scores is not None and candidate >= best
        if not (is_turn or is_best):
            return False
        snapshot = Snapshot(self._student.copy_state(), step, candidate)
        if is_best:
            history.best = snapshot
        if is_turn and self.serves(snapshot.state):
            self.num_noop_swaps += 1
            return False
        if is_turn:
            self._publish(snapshot, "learner")
        return is_turn

    def return_to_best(self) -> None:
        """The student goes back to the best weights; what serves does not change."""
        self.num_rollbacks += 1
        self._student.restart_from(self.history.best.state)

    # Out of turn

    def check_rollback(self, version: int | None) -> None:
        """Raises ValueError for a version that is not kept, and when the live weights are those already."""
        if self.serves(self._snapshot(version).state):
            raise ValueError(
                f"version must have other weights than the live version {self.version}, "
                f"got {'the best so far' if version is None else version}, which has the same"
            )

    def roll_back(self, version: int | None) -> None:
        """Publishes a kept version's weights again; they are the best so far from now on, and the student's."""
        snapshot = self._snapshot(version)
        self.history.best = snapshot
        self.return_to_best()
        self._publish(snapshot, "rollback")

    def publish_now(self, step: int) -> DrafterVersion:
        """Publishes the student's weights, unless they serve already; the version that is live then."""
        snapshot = Snapshot(self._student.copy_state(), step)
        if not self.serves(snapshot.state):
            self._publish(snapshot, "learner")
        return self.history.records()[-1]

    def is_trim_due(self, num_tokens: float) -> bool:
        """Whether so many generated tokens say which ones a head that is still whole is to keep."""
        is_wanted = 0 < self._live.config.draft_vocab_size < self._split.vocab_size
        is_whole = self._live.draft_head.draft_token_ids_V is None
        return is_wanted and is_whole and num_tokens >= self._config.tokens_before_trim

    def trim(self, token_ids_V: Tensor, step: int) -> None:
        """Trims the head of every copy to these tokens; learning goes on from the best weights, cut down."""
        self._student.restart_from(self.history.best.state)
        self._student.trim(token_ids_V)
        self._live.draft_head.trim(token_ids_V)
        self.history.drop_weights()
        self.history.best = Snapshot(self._student.copy_state(), step)
        self._publish(self.history.best, "learner")

    def load(self, versions: dict[str, object], live: State) -> None:
        """Serves the saved weights `live`, with `version` and `has_waived` as they were; versions: the history's."""
        self._live.load_state_dict(live)
        self.history.load_state_dict(versions, copy_state(self._live))
        self._live.publish(self._live, self.version)
        self._live.has_learnt_lossy |= self.has_waived

    def _snapshot(self, version: int | None) -> Snapshot:
        """None is the best so far."""
        return self.history.best if version is None else self.history.snapshot(version)

    def serves(self, state: State) -> bool:
        """Whether the serving drafter has these weights."""
        live = self._live.state_dict()
        differs = torch.stack([(live[name] != tensor).any() for name, tensor in state.items()])
        return not to_host(differs.any()).item()

    def _publish(self, snapshot: Snapshot, source: str) -> None:
        """Makes the student's weights serve under a new number. snapshot: a copy of them."""
        self.version += 1
        self._live.publish(self._student.drafter, self.version)
        self._live.has_learnt_lossy |= self.has_waived
        self.history.add(self.version, snapshot, source)
