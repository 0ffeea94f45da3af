"""What a round costs: a table measured once, and its correction by the rounds that are really run.

Knows row counts, draft lengths and seconds; knows no clock, no acceptance and no tensors.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

# Odd, so that a median is one of the values. Nine rounds follow a machine that has become slower within five.
PACE_ROUNDS = 9
# The median of 31 with 5 % of noise each is right to 1 %; that of 3 survives one round that was interrupted.
MAX_SAMPLES, MIN_SAMPLES = 31, 3
# A length in constant use must not renew its samples faster than probes renew those of the others: what it drifts by
# would look like a change of the others. At one round in 100 probed, each of three others is met every 300 rounds.
ROUNDS_PER_SAMPLE = 300


@dataclass(frozen=True)
class CostTable:
    """Measured seconds by number of token rows in the pass; between measurements linear, beyond the last proportional.

    draft_step_s  one draft step for that many rows.
    verify_s      all the rest of a round that verifies that many positions (batch rows times T + 1); with T = 0 it is
                  one plain decoding step.
    Example: CostTable(draft_step_s={1: 0.3e-3}, verify_s={1: 1.0e-3, 2: 1.1e-3, 5: 1.3e-3}).
    """

    draft_step_s: Mapping[int, float]
    verify_s: Mapping[int, float]

    def __post_init__(self) -> None:
        for name, seconds in (("draft_step_s", self.draft_step_s), ("verify_s", self.verify_s)):
            if not seconds or min(seconds) < 1 or not all(0 < s < float("inf") for s in seconds.values()):
                raise ValueError(f"{name} must map row counts >= 1 to positive seconds, got {dict(seconds)}")

    def round_s(self, num_rows: int, num_draft_tokens: int) -> float:
        """Expected seconds of a round of num_rows rows with T = num_draft_tokens."""
        drafting_s = num_draft_tokens * _interpolate(self.draft_step_s, num_rows) if num_draft_tokens else 0.0
        return drafting_s + _interpolate(self.verify_s, num_rows * (num_draft_tokens + 1))


def _interpolate(seconds: Mapping[int, float], num_rows: int) -> float:
    measured = sorted(seconds)
    if num_rows >= measured[-1]:
        return seconds[measured[-1]] * num_rows / measured[-1]
    above = bisect.bisect_left(measured, num_rows)
    high = measured[above]
    low = measured[max(above - 1, 0)]
    share = (num_rows - low) / (high - low) if high > low else 0.0
    return seconds[low] + share * (seconds[high] - seconds[low])


class LiveCosts:
    """Seconds of a round as the machine runs them now: table x correction(rows, T) x pace.

    The *pace* is the machine's: other load, a longer context, a slower clock. It follows every round within a few, and
    does not move one length against another. A *correction* belongs to one length at one size of batch: what synthetic
    passes leave out. It is the median of that length's rounds over the pace of their time, so that a length last met
    when the machine was idle can be compared with the one in use under load. Both are medians: a round with a learner's
    step, a prefill or a page fault in it counts for one, however long it took.

    Batches share a correction between powers of two (1, 2, 3..4, 5..8, 9..16 ...): the table prices rows exactly, and
    lengths that are only probed would take too long to know at every number of rows. Where there are less than three
    samples, the correction is that of the same length at the nearest size of batch, scaled by what the two sizes show
    for other lengths; or, where no batch has met that length, that of the nearest length.
    """

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._table_s: dict[tuple[int, int], float] = {}
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._newest: dict[tuple[int, int], int] = {}
        self._medians: dict[tuple[int, int], float] = {}
        self._borrowed: dict[tuple[int, int], float] = {}
        self._recent: deque[tuple[tuple[int, int], float]] = deque(maxlen=PACE_ROUNDS)
        self._num_rounds = 0
        self.pace = 1.0

    def round_s(self, num_rows: int, num_draft_tokens: int) -> float:
        """Expected seconds of such a round now."""
        correction = self._correction((_size(num_rows), num_draft_tokens))
        return self._by_table(num_rows, num_draft_tokens) * correction * self.pace

    def observe(self, num_rows: int, num_draft_tokens: int, seconds: float) -> None:
        """Takes in the time of one round."""
        cell = _size(num_rows), num_draft_tokens
        relative = seconds / self._by_table(num_rows, num_draft_tokens)
        self._num_rounds += 1
        samples = self._samples.setdefault(cell, deque(maxlen=MAX_SAMPLES))
        is_due = len(samples) < MAX_SAMPLES or self._num_rounds - self._newest[cell] >= ROUNDS_PER_SAMPLE
        # The first rounds of all have no pace to be measured by, and are the slowest.
        if is_due and len(self._recent) > PACE_ROUNDS // 2:
            samples.append(relative / self.pace)
            self._newest[cell] = self._num_rounds
            if len(samples) >= MIN_SAMPLES:
                self._medians[cell] = statistics.median(samples)
                self._borrowed.clear()
        self._recent.append((cell, relative))
        self.pace = statistics.median(r / self._correction(c) for c, r in self._recent)

    def _by_table(self, num_rows: int, num_draft_tokens: int) -> float:
        key = num_rows, num_draft_tokens
        if key not in self._table_s:
            self._table_s[key] = self.table.round_s(num_rows, num_draft_tokens)
        return self._table_s[key]

    def _correction(self, cell: tuple[int, int]) -> float:
        if cell in self._medians:
            return self._medians[cell]
        if cell not in self._borrowed:
            self._borrowed[cell] = self._borrow(*cell)
        return self._borrowed[cell]

    def _borrow(self, size: int, length: int) -> float:
        known = self._medians
        if sizes := [s for s, t in known if t == length]:
            near = min(sizes, key=lambda s: abs(s - size))
            shared = [known[size, t] / known[near, t] for s, t in known if s == size and (near, t) in known]
            return known[near, length] * (statistics.median(shared) if shared else 1.0)
        lengths = [t for s, t in known if s == size]
        return known[size, min(lengths, key=lambda t: abs(t - length))] if lengths else 1.0


def _size(num_rows: int) -> int:
    return (num_rows - 1).bit_length()
