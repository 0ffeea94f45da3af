"""Spreads: of medians over questions, of means over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dvi.bench.statistics import mean_and_std, median_interval


def test_the_interval_of_equal_values_is_that_value():
    """Catches resampling of something else than the values."""
    interval = median_interval([1.5] * 9)
    assert (interval.value, interval.low, interval.high, interval.num_samples) == (1.5, 1.5, 1.5, 9)


def test_the_interval_holds_the_true_median_about_as_often_as_it_says():
    """Catches quantiles of the values instead of their medians (never outside), and a wrong level."""
    rng = np.random.default_rng(0)
    num_held = 0
    for _ in range(200):
        interval = median_interval(list(rng.normal(2.0, 1.0, size=41)))
        num_held += interval.low <= 2.0 <= interval.high
    assert 0.88 <= num_held / 200 <= 0.99


def test_the_same_values_give_the_same_interval():
    """A report made twice must not differ."""
    values = list(np.random.default_rng(1).random(30))
    assert median_interval(values) == median_interval(values)


def test_no_values_have_no_interval():
    assert median_interval([]) is None


def test_one_run_has_a_mean_and_no_spread():
    """Catches a spread of 0, which would claim that nothing varies."""
    assert mean_and_std([2.0]) == (2.0, None)


def test_the_spread_is_of_a_sample():
    """ddof = 1, as the harness has it."""
    mean, std = mean_and_std([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert std == pytest.approx(math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2))
