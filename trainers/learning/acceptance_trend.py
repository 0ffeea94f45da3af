"""Is the drafter still rising, settled, or has the traffic moved? Decided from acceptance alone.

Knows acceptance rates, one per round batch; knows nothing of models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dvi.settings import LearningSettings

# A request's acceptance varies by half of itself, and lasts some 25 rounds: the fast average must span many requests,
# or it calls every hard prompt a drift (and did, at 0.02 and a drop of 0.15: LOG.md 2026-11-22).
FAST_RATE, SLOW_RATE = 0.0025, 0.00025
RISE = 0.005


@dataclass
class AcceptanceTrend:
    """Two moving averages of the acceptance rate and what their gap says.

    is_settled  True once the fast average has not beaten its best by 0.005 for `patience` observations; 0: never.
    A fall of the fast average to less than (1 - drop) of the slow one is drift: it unsettles and counts in num_drifts.
    wakes       False: settled once is settled for good, and there is no drift.
    """

    patience: int = LearningSettings.settle_rounds
    drop: float = 0.3
    wakes: bool = LearningSettings.drift_wakeup
    fast: float = 0.0
    slow: float = 0.0
    best: float = 0.0
    num_seen: int = 0
    num_since_best: int = 0
    num_drifts: int = 0
    is_settled: bool = False

    def observe(self, num_drafted: int, num_accepted: int) -> bool:
        """Takes in one round; True when this round shows drift. Rounds without drafts say nothing."""
        if num_drafted == 0:
            return False
        rate = num_accepted / num_drafted
        self.num_seen += 1
        # Until a window has been seen, plain means: an average that starts at 0 would look like a rise.
        self.fast += max(FAST_RATE, 1 / self.num_seen) * (rate - self.fast)
        self.slow += max(SLOW_RATE, 1 / self.num_seen) * (rate - self.slow)
        # The mean of a few rounds may be anything: as a best it could stand for ever.
        is_young = self.num_seen <= 1 / FAST_RATE
        if is_young or self.fast > self.best + RISE:
            self.best, self.num_since_best = self.fast, 0
        else:
            self.num_since_best += 1
        is_flat = 0 < self.patience <= self.num_since_best
        self.is_settled = is_flat or (self.is_settled and not self.wakes)
        is_drift = self.wakes and not is_young and self.fast < (1 - self.drop) * self.slow
        if is_drift:
            self.num_drifts += 1
            self.is_settled = False
            self.best, self.num_since_best, self.slow = self.fast, 0, self.fast
        return is_drift

    def state_dict(self) -> dict[str, float | int | bool]:
        """What it has seen; its settings are the run's."""
        return {name: value for name, value in asdict(self).items() if name not in _SETTINGS}

    def load_state_dict(self, state: dict[str, float | int | bool]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


_SETTINGS = ("patience", "drop", "wakes")
