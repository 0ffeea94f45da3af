"""The estimate of P(accept | S, A): its bins, what it says of little evidence, and how it judges itself."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from dvi.draft.agreement import (
    FIRST_FIT,
    LEAST_WEIGHT,
    MAX_SAMPLES,
    MOST_WEIGHT,
    NO_BINS,
    NUM_AGREEMENT_BINS,
    NUM_RATIO_BINS,
    PRIOR,
    SAMPLES_PER_FIT,
    AgreementEstimate,
    calibration_error,
    fit_bins,
)

Sample = tuple[float, float, bool]


def drawn(chance_of: Callable[[float, float], float], num: int, *, seed: int = 0) -> list[Sample]:
    """S and A uniform, accepted with the given chance."""
    rng = random.Random(seed)
    pairs = [(rng.random(), rng.random()) for _ in range(num)]
    return [(s, a, rng.random() < chance_of(s, a)) for s, a in pairs]


def fitted(samples: list[Sample]):
    return fit_bins(*np.array(samples, dtype=float).T)


def trained(samples: list[Sample], *, at_a_time: int = 3) -> AgreementEstimate:
    estimate = AgreementEstimate()
    for start in range(0, len(samples), at_a_time):
        estimate.observe(samples[start : start + at_a_time])
    return estimate


# --- bins -------------------------------------------------------------------------------------------------------------


def test_there_are_as_many_bins_as_in_the_paper_with_edges_at_quantiles():
    """Catches edges at equal distances: S crowds near 1, where all the difference is."""
    rng = random.Random(1)
    samples = [(rng.random() ** 0.1, rng.random() ** 4, True) for _ in range(MAX_SAMPLES)]
    bins = fitted(samples)
    assert NUM_AGREEMENT_BINS * NUM_RATIO_BINS == 272
    assert [len(edges) for edges in bins.ratio_edges] == [NUM_RATIO_BINS - 1] * NUM_AGREEMENT_BINS
    assert bins.agreement_edges == sorted(bins.agreement_edges)
    assert all(edges == sorted(edges) for edges in bins.ratio_edges)
    shares = np.histogram([s for s, _, _ in samples], [0.0, *bins.agreement_edges, 1.0])[0] / len(samples)
    assert shares == pytest.approx(1 / NUM_AGREEMENT_BINS, abs=0.002)


def test_each_mean_is_that_of_its_own_cell_drawn_towards_its_parents():
    """By the slow literal form, cell by cell. Catches cells counted under another bin's edges, and a missed parent."""
    samples = drawn(lambda s, a: s * a, 900, seed=2)
    bins = fitted(samples)

    def drawn_to_parents(cells: list[list[Sample]], parents: list[float]) -> list[float]:
        """Noise of one sample is p (1 - p); what the cells' means spread beyond it sets the weight of all parents."""
        pairs = [(len(cell), sum(x for _, _, x in cell), p) for cell, p in zip(cells, parents, strict=True)]
        excess = sum((hits - n * p) ** 2 / (n * p * (1 - p)) - 1 for n, hits, p in pairs if n)
        weight = min(max(len(samples) / max(excess, 1e-9), LEAST_WEIGHT), MOST_WEIGHT)
        return [(hits + weight * p) / (n + weight) for n, hits, p in pairs]

    [overall] = drawn_to_parents([samples], [PRIOR])
    outer = itertools.pairwise([-math.inf, *bins.agreement_edges, math.inf])
    by_s = [[sample for sample in samples if low <= sample[0] < high] for low, high in outer]
    means = drawn_to_parents(by_s, [overall] * NUM_AGREEMENT_BINS)
    assert bins.by_agreement == pytest.approx(means)
    cells = [
        [sample for sample in mine if least <= sample[1] < most]
        for mine, edges in zip(by_s, bins.ratio_edges, strict=True)
        for least, most in itertools.pairwise([-math.inf, *edges, math.inf])
    ]
    expected = drawn_to_parents(cells, [mean for mean in means for _ in range(NUM_RATIO_BINS)])
    assert [mean for row in bins.by_both for mean in row] == pytest.approx(expected)


def test_bins_that_differ_keep_their_means_and_bins_of_noise_take_their_parents():
    """Catches one weight for all companions: one that tells nothing must not, by noise, stop drafts that are all alike,
    and one that tells much must be heard."""
    flat = fitted(drawn(lambda s, a: 0.9, MAX_SAMPLES, seed=7))
    assert np.std(flat.by_both) < 0.03  # of 15 samples each, 0.08 if taken at their word
    step = fitted(drawn(lambda s, a: 0.95 if a > 0.5 else 0.05, MAX_SAMPLES, seed=8))
    assert step.given_both(0.5, 0.9) > 0.85 and step.given_both(0.5, 0.1) < 0.15


def test_a_lookup_finds_the_bin_that_the_fit_counted_a_value_in():
    """Catches edges that belong below here and above there: the values that stand on edges are the most frequent."""
    samples = [(round(s, 1), round(a, 1), x) for s, a, x in drawn(lambda s, a: s, 2000, seed=3)]
    bins = fitted(samples)
    for s, a in {(s, a) for s, a, _ in samples}:
        place = sum(s >= edge for edge in bins.agreement_edges)
        column = sum(a >= edge for edge in bins.ratio_edges[place])
        assert bins.given_agreement(s) == bins.by_agreement[place]
        assert bins.given_both(s, a) == bins.by_both[place][column]


def test_values_that_are_all_equal_make_no_trouble():
    """A companion that always agrees, or whose A is always 1, as the drafter's own in greedy rounds."""
    bins = fitted([(1.0, 1.0, i % 4 > 0) for i in range(400)])
    assert bins.given_both(1.0, 1.0) == pytest.approx(0.75, abs=0.03)
    assert bins.given_agreement(1.0) == pytest.approx(0.75, abs=0.03)
    assert 0.5 < bins.given_both(0.3, 0.2) < 0.8  # never met: what is known of all


def test_few_samples_give_sane_answers():
    """Catches means of 0 and 1 from single samples, which nothing would ever be allowed to correct."""
    assert NO_BINS.given_both(0.1, 0.9) == NO_BINS.given_agreement(0.1) == PRIOR
    estimate = trained([(0.9, 1.0, True)] * FIRST_FIT)
    assert 0.8 < estimate.bins.given_both(0.9, 1.0) < 1
    assert all(0 < mean < 1 for row in fitted(drawn(lambda s, a: 1.0, 40)).by_both for mean in row)


def test_acceptance_is_learned_from_both():
    """Catches a table read across, S and A exchanged, or one of them ignored: each would be off by 0.14 or more."""

    def chance(s: float, a: float) -> float:
        return 0.05 + 0.9 * s * a**3

    bins = trained(drawn(chance, MAX_SAMPLES, seed=4)).bins
    places = [(s, a) for s, a, _ in drawn(chance, 500, seed=5)]
    assert np.mean([abs(bins.given_both(s, a) - chance(s, a)) for s, a in places]) < 0.07
    assert np.mean([abs(bins.given_agreement(s) - (0.05 + 0.9 * s / 4)) for s, _ in places]) < 0.03


# --- over time --------------------------------------------------------------------------------------------------------


def test_the_newest_samples_alone_count():
    """Catches an estimate that a drafter's first bad minutes stay in for ever."""
    estimate = trained([(0.5, 0.5, False)] * 3000 + [(0.5, 0.5, True)] * (MAX_SAMPLES + SAMPLES_PER_FIT))
    assert estimate.bins.given_both(0.5, 0.5) > 0.99


def test_fits_are_rare_and_begin_early():
    """Catches a fit at every round, which would take longer than the round, and one that waits for thousands."""
    estimate, fits = AgreementEstimate(), []
    for sample in drawn(lambda s, a: s, 4000):
        before = estimate.bins
        estimate.observe([sample])
        if estimate.bins is not before:
            fits.append(estimate.num_samples)
    assert fits[0] == FIRST_FIT
    assert len(fits) <= 6 + 4000 / SAMPLES_PER_FIT
    assert max(b - a for a, b in itertools.pairwise(fits)) <= SAMPLES_PER_FIT


# --- figures ----------------------------------------------------------------------------------------------------------


def test_without_samples_there_are_no_figures():
    """Catches a division by zero in a report of a server that has not drafted yet."""
    assert AgreementEstimate().figures() is None


def test_predictions_are_judged_before_their_outcome_is_known():
    """Catches tables fitted to the very samples they are then judged by: noise would look like information."""
    figures = trained(drawn(lambda s, a: 0.5, MAX_SAMPLES, seed=5)).figures()
    assert figures.entropy_bits == pytest.approx(1.0, abs=0.001)
    assert figures.gain_of_agreement_bits < 0 and figures.gain_of_both_bits < 0
    assert figures.gain_of_both_bits > -0.05


def test_gain_and_error_by_hand_before_the_first_fit():
    """All is predicted at 1/2, three of four are accepted: the gain is H(3/4) - 1 bit, the error 1/4."""
    figures = trained([(0.1, 0.2, True), (0.3, 0.4, True), (0.5, 0.6, False), (0.7, 0.8, True)]).figures()
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert (figures.num_samples, figures.acceptance) == (4, 0.75)
    assert figures.entropy_bits == pytest.approx(entropy)
    assert figures.gain_of_agreement_bits == figures.gain_of_both_bits == pytest.approx(entropy - 1)
    assert figures.gain_of_both_share == figures.gain_of_agreement_share == pytest.approx(1 - 1 / entropy)
    assert figures.ece_of_agreement == figures.ece_of_both == pytest.approx(0.25)


def test_a_certain_outcome_has_no_entropy_and_no_share():
    """Catches log 0 and 0 / 0."""
    figures = trained([(0.5, 0.5, True)] * 100).figures()
    assert figures.entropy_bits == 0 and figures.gain_of_both_share == figures.gain_of_agreement_share == 0


def test_what_a_says_is_counted_only_where_a_is_known():
    """Acceptance that A alone decides: S tells nothing, both tell 0.53 of the entropy. Catches figures exchanged."""
    figures = trained(drawn(lambda s, a: 0.9 if a > 0.5 else 0.1, MAX_SAMPLES, seed=6)).figures()
    assert abs(figures.gain_of_agreement_share) < 0.05
    assert 0.35 < figures.gain_of_both_share < 0.53


def test_calibration_error_by_hand():
    """Two bins: 0.2 predicted for 0 of 2, 0.9 for 1 of 2; |0.2 - 0| / 2 + |0.9 - 0.5| / 2 = 0.3. A prediction of 1
    belongs to the last bin."""
    predicted, accepted = np.array([0.2, 0.2, 0.9, 0.9]), np.array([0.0, 0.0, 1.0, 0.0])
    assert calibration_error(predicted, accepted) == pytest.approx(0.3)
    assert calibration_error(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(0.5)


def test_predictions_off_in_both_directions_do_not_cancel():
    """Catches a calibration error taken over all samples at once."""
    predicted, accepted = np.array([0.05, 0.95] * 50), np.array([1.0, 0.0] * 50)
    assert calibration_error(predicted, accepted) == pytest.approx(0.95)
