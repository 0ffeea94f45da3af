"""Means with their spread: over seeds, and over questions by the bootstrap.

Knows numbers alone. Seeds are fixed, so that the same measurements give the same table.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval, over num_samples paired values."""

    value: float
    low: float
    high: float
    num_samples: int


def median_interval(values: list[float], *, seed: int = 0) -> Interval | None:
    """The median and the percentile interval of resampled medians; None of no values."""
    if not values:
        return None
    sample = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(sample), size=(NUM_RESAMPLES, len(sample)))
    low, high = np.quantile(np.median(sample[picks], axis=1), [0.025, 0.975])
    return Interval(float(np.median(sample)), float(low), float(high), len(sample))


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation with ddof=1; None where one value leaves it undefined."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
