"""How often proposed tokens were accepted of which the same was thought, learned while serving.

Knows estimates, kinds as numbers, and what became of them; knows no tokens, tensors or sources.
"""
# K kinds, J bins of the estimate.

from __future__ import annotations

from collections.abc import Sequence

NUM_BINS = 16
PRIOR = 20.0  # samples that an estimate itself weighs as much as
MAX_SAMPLES = 4096.0  # of a bin; then all it knows is halved, since traffic changes
NUM_ERROR_BINS = 10


class Calibration:
    """P(accepted | kind, estimate): the share accepted in the estimate's bin, drawn towards the estimate itself."""

    def __init__(self, num_kinds: int) -> None:
        self._accepted = [0.0] * (num_kinds * NUM_BINS)
        self._samples = [0.0] * (num_kinds * NUM_BINS)
        # By bins of what was told: sum of that, accepted, samples. All told, not the newest: halved like the others.
        self._told = [[0.0, 0.0, 0.0] for _ in range(NUM_ERROR_BINS)]

    def probability(self, kind: int, estimate: float) -> float:
        """In (0, 1) where the estimate is. kind: 0..K-1."""
        place = kind * NUM_BINS + int(estimate * NUM_BINS)
        return (self._accepted[place] + PRIOR * estimate) / (self._samples[place] + PRIOR)

    def observe(self, kind: int, estimate: float, is_accepted: bool) -> None:
        """Takes in one token of which it is known whether the verifier, having come so far, committed it."""
        told = self.probability(kind, estimate)
        error_bin = self._told[int(told * NUM_ERROR_BINS)]
        for index, value in enumerate((told, is_accepted, 1.0)):
            error_bin[index] += value
        if error_bin[2] > MAX_SAMPLES:
            error_bin[:] = (value / 2 for value in error_bin)
        place = kind * NUM_BINS + int(estimate * NUM_BINS)
        self._accepted[place] += is_accepted
        self._samples[place] += 1
        if self._samples[place] > MAX_SAMPLES:
            self._accepted[place] /= 2
            self._samples[place] /= 2

    @property
    def error(self) -> float | None:
        """Expected calibration error of what was told, each before its outcome; None before the first sample."""
        total = sum(samples for _, _, samples in self._told)
        return sum(abs(told - accepted) for told, accepted, _ in self._told) / total if total else None

    def state(self) -> list[list[float]]:
        """[2, K * J]: accepted, and samples. What was told is not saved."""
        return [[*self._accepted], [*self._samples]]

    def load_state(self, state: Sequence[Sequence[float]]) -> None:
        """Raises ValueError for other kinds or bins than there are here."""
        if [len(values) for values in state] != [len(self._samples)] * 2:
            raise ValueError(f"a calibration of {len(self._samples)} bins cannot take {[*map(len, state)]}")
        self._accepted, self._samples = ([*map(float, values)] for values in state)
