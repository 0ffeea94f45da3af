"""What the ranks of a job tell each other at a tick: one number for each thing that only all of them can decide.

Knows numbers; knows nothing of processes. Reports are added up over the ranks, and every rank reads the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

BEST = -1  # of Notices.rollback


@dataclass
class Notices:
    """What the job, not the learner, has to say on this rank; it stays until it is taken back.

    is_done         this rank has no more traffic.
    is_interrupted  this rank was asked to end.
    wants_save      a checkpoint is due.
    num_done        requests finished, here and in earlier runs: numbers the checkpoints.
    is_resting      nobody is to learn.
    rollback        0, or 1 + the version to return to, or -1 for the best so far. Only one rank may ask.
    """

    is_done: float = 0
    is_interrupted: float = 0
    wants_save: float = 0
    num_done: float = 0
    is_resting: float = 0
    rollback: float = 0


@dataclass
class RankReport(Notices):
    """One rank's word at a tick, or the sum of all.

    wants_step      a step is owed here, with data and time for it.
    num_drafted, num_accepted   since the last step; accepted by the honest test.
    num_tokens      generated tokens counted so far, for the trim.
    has_woken       acceptance here has drifted.
    has_waived      a lossy rule has let tokens pass that are learnt from.
    """

    wants_step: float = 0
    num_drafted: float = 0
    num_accepted: float = 0
    num_tokens: float = 0
    has_woken: float = 0
    has_waived: float = 0

    def tensor(self) -> Tensor:
        """float64 [SIZE]: counts up to 2^53 survive."""
        return torch.tensor([getattr(self, entry.name) for entry in fields(self)], dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> RankReport:
        return cls(*values.tolist())


SIZE = len(fields(RankReport))
