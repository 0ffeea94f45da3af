"""Calibration: what is told of estimates before, while and after the world turns out to be otherwise."""

from __future__ import annotations

import random

import pytest

from dvi.draft.calibration import MAX_SAMPLES, NUM_BINS, PRIOR, Calibration


def test_before_any_sample_an_estimate_is_told_as_it_is():
    calibration = Calibration(2)
    for estimate in (0.001, 0.3, 0.999):
        assert calibration.probability(1, estimate) == pytest.approx(estimate, rel=1e-12)
    assert calibration.error is None


def test_with_samples_the_share_accepted_is_told_for_that_kind_and_bin_alone():
    calibration = Calibration(3)
    for index in range(1000):
        calibration.observe(1, 0.51, index % 10 == 0)
    assert calibration.probability(1, 0.51) == pytest.approx((100 + PRIOR * 0.51) / (1000 + PRIOR))
    assert calibration.probability(1, 0.51) < calibration.probability(1, 0.56) < 0.12  # one bin
    for kind, estimate in ((0, 0.51), (2, 0.51), (1, 0.49), (1, 0.57)):
        assert calibration.probability(kind, estimate) == pytest.approx(estimate)


def test_what_is_told_stays_a_probability_whatever_happens():
    for is_accepted in (True, False):
        calibration = Calibration(1)
        for _ in range(3 * int(MAX_SAMPLES)):
            calibration.observe(0, 0.5, is_accepted)
            assert 0 < calibration.probability(0, 0.5) < 1


def test_it_follows_traffic_that_changes():
    """Catches counts that only grow: after a million samples nothing would be news."""
    calibration = Calibration(1)
    for _ in range(100_000):
        calibration.observe(0, 0.5, True)
    for _ in range(10_000):
        calibration.observe(0, 0.5, False)
    assert calibration.probability(0, 0.5) < 0.15


def test_the_error_is_large_where_estimates_are_wrong_and_small_once_they_were_corrected():
    rng, calibration = random.Random(0), Calibration(1)
    for _ in range(20):
        calibration.observe(0, 0.9, rng.random() < 0.3)
    early = calibration.error
    for _ in range(20_000):
        calibration.observe(0, 0.9, rng.random() < 0.3)
    assert early > 0.3 and calibration.error < 0.03


def test_a_saved_calibration_tells_the_same_and_one_of_other_kinds_is_refused():
    rng, calibration, other = random.Random(1), Calibration(2), Calibration(2)
    for _ in range(500):
        calibration.observe(rng.randrange(2), rng.random(), rng.random() < 0.5)
    other.load_state(calibration.state())
    calibration.observe(0, 0.5, True)  # the saved one is a copy
    calibration.load_state(other.state())
    places = [(kind, index / NUM_BINS) for kind in range(2) for index in range(NUM_BINS)]
    assert [other.probability(*place) for place in places] == [calibration.probability(*place) for place in places]
    with pytest.raises(ValueError, match=r"a calibration of 48 bins cannot take \[32, 32\]"):
        Calibration(3).load_state(other.state())
