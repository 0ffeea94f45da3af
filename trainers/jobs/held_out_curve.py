"""The learning curve of a run: what the drafter of each moment would draft on held-out requests.

Knows held-out requests, metrics and a clock; knows nothing of serving or learning.
"""

from __future__ import annotations

import time

from dvi.telemetry import MetricsWriter
from trainers.jobs.evaluation import HeldOutRequests

CURVE_SHARE = 0.03  # of the run's time


class HeldOutCurve:
    """Writes "held_out" events. A look replays recorded answers, see `HeldOutRequests.replay`, so it decodes nothing.

    All looks together take at most `share` of the time; none is taken where answers cannot be replayed.
    """

    def __init__(self, held_out: HeldOutRequests, metrics: MetricsWriter, *, share: float = CURVE_SHARE) -> None:
        self._held_out, self._metrics, self._share = held_out, metrics, share
        self._drafter = held_out.speculator.drafter
        self._version, self._next_s = self._drafter.version, 0.0

    def update(self, *, num_tokens: int) -> None:
        """Looks, where the drafter is another than at the last look and it is time. num_tokens: learnt from so far."""
        start_s, version = time.monotonic(), self._drafter.version
        if not self._held_out.is_replayable or version == self._version or start_s < self._next_s:
            return
        rounds = self._held_out.replay()
        self._version, end_s = version, time.monotonic()
        self._next_s = end_s + (end_s - start_s) * (1 / self._share - 1)
        self._metrics.write(
            "held_out", tokens_seen=num_tokens, drafter_version=version, acceptance=rounds.acceptance_rate,
            mean_accepted_tokens=rounds.mean_accepted_tokens, acceptance_per_depth=rounds.acceptance_per_depth,
            num_draft_tokens=self._held_out.num_draft_tokens, seconds=end_s - start_s,
        )  # fmt: skip
