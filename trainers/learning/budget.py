"""When learning may work beside serving: as far as rounds owe it steps, in the gaps of the traffic, else in its share.

Knows rounds and seconds, which it is told; reads no clock itself.
"""

from __future__ import annotations

import math

CREDIT_CAP_S = 0.2  # unused training time that may be saved up: a quiet minute must not buy a stalled second
GAP_MEMORY_S = 2.0  # traffic that paused so lately will pause again soon: work waits for that gap
# Some seconds of catching up after a long busy stretch; more would learn the same buffer over and over.
MAX_STEPS_OWED = 256


class TimeBudget:
    """The rounds not yet learnt from, and the time that learning has saved up.

    share            of all busy time that learning may take; 1 or more sets no limit, and then at most one step is
                     owed, so that steps follow rounds alone and a run can be repeated.
    rounds_per_step  rounds that owe one step.

    While the server is idle work costs nothing. While it is busy work draws on the credit, which fills by `share` and
    holds CREDIT_CAP_S. For GAP_MEMORY_S after a gap the lower half of the credit is left alone: traffic with enough
    gaps is learnt from in these alone, and where they do not suffice the share is still used in full.
    """

    def __init__(self, share: float, *, rounds_per_step: int, now_s: float) -> None:
        self.share = share
        self.rounds_per_step = rounds_per_step
        self.rounds_owed = 0.0
        self._credit_s = 0.0
        self.restart(now_s)

    def restart(self, now_s: float) -> None:
        """Forgets saved-up time and gaps; not the steps owed, nor time taken in advance."""
        self._credit_s, self._clock_s, self._gap_s = min(self._credit_s, 0.0), now_s, -math.inf

    @property
    def has_limit(self) -> bool:
        return self.share < 1

    def owe_round(self, *, part: float = 1.0) -> None:
        """part: how much of a round is to be learnt from, in 0..1."""
        most = MAX_STEPS_OWED if self.has_limit else 1
        self.rounds_owed = min(self.rounds_owed + part, most * self.rounds_per_step)

    def pay_step(self) -> None:
        self.rounds_owed = max(self.rounds_owed - self.rounds_per_step, 0.0)

    @property
    def is_step_owed(self) -> bool:
        return self.rounds_owed >= self.rounds_per_step

    def allows(self, now_s: float, *, is_idle: bool, part: float = 1.0) -> bool:
        """Whether work may begin now. part: how much of the share is to be used, in 0..1."""
        self._credit_s = min(self._credit_s + part * self.share * (now_s - self._clock_s), CREDIT_CAP_S)
        self._clock_s = now_s
        if is_idle:
            self._gap_s = now_s
        reserve_s = CREDIT_CAP_S / 2 if now_s - self._gap_s < GAP_MEMORY_S else 0.0
        return is_idle or not self.has_limit or self._credit_s > reserve_s

    def charge(self, seconds: float) -> None:
        """Takes time that learning used while requests waited; as part of all time it earns credit at the next look."""
        self._credit_s -= seconds
