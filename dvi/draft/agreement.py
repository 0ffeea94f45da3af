"""How often drafted tokens are accepted that look alike to a companion: P(accept | S, A), learned while serving.

S and A are of `dvi.draft.companions`. Knows such pairs, as numbers of the host, and what became of them; knows no
tensors, models, rows or costs. After Speculative Verification (Kim et al. 2025, arXiv 2509.24328), whose adaptive bins
have come to 272, 16 of S times 17 of A.
"""
# N samples, J bins of S, K bins of A in each of them.

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_AGREEMENT_BINS, NUM_RATIO_BINS = 16, 17
MAX_SAMPLES = 4096  # 15 per cell, and some minutes of one user's tokens: a drafter that learns is then another one
SAMPLES_PER_FIT = 512  # a fit takes about a millisecond, two microseconds a sample
FIRST_FIT = 32
# Of a parent's mean in its bins' means, in samples; see `_shrunk`. 2: so little evidence is never all that is believed.
LEAST_WEIGHT, MOST_WEIGHT = 2.0, 64.0
PRIOR = 0.5
NUM_CALIBRATION_BINS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AcceptanceBins:
    """P(accept | S) and P(accept | S, A) by bins; a value on an edge belongs above it.

    agreement_edges, by_agreement  J - 1 edges, ascending, and J means.
    ratio_edges, by_both           in each bin of S, K - 1 edges, ascending, and K means.
    """

    agreement_edges: list[float]
    by_agreement: list[float]
    ratio_edges: list[list[float]]
    by_both: list[list[float]]

    def given_agreement(self, agreement: float) -> float:
        """P(accept | S): all that may be asked before the token is drawn."""
        return self.by_agreement[bisect_right(self.agreement_edges, agreement)]

    def given_both(self, agreement: float, ratio: float) -> float:
        """P(accept | S, A)."""
        place = bisect_right(self.agreement_edges, agreement)
        return self.by_both[place][bisect_right(self.ratio_edges[place], ratio)]


NO_BINS = AcceptanceBins([], [PRIOR], [[]], [[PRIOR]])


def fit_bins(agreement_N: Floats, ratio_N: Floats, accepted_N: Floats) -> AcceptanceBins:
    """Bins with edges at the quantiles of S, and in each of them at the quantiles of A.

    A cell's mean is shrunk towards its bin of S, that towards the mean of all, and that towards PRIOR. Equal values
    share a bin, so that some bins may be empty: what is said of them is what is said of their parents.
    """
    num, num_s, num_a = len(agreement_N), NUM_AGREEMENT_BINS, NUM_RATIO_BINS
    edges_J = np.sort(agreement_N)[np.arange(1, num_s) * num // num_s]
    bin_N = np.searchsorted(edges_J, agreement_N, side="right")
    count_J = np.bincount(bin_N, minlength=num_s)
    first_J = np.cumsum(count_J) - count_J
    rank_JK = first_J[:, None] + np.arange(1, num_a) * count_J[:, None] // num_a
    ratio_edges_JK = ratio_N[np.lexsort((ratio_N, bin_N))][rank_JK.clip(max=num - 1)]
    cell_N = bin_N * num_a + (ratio_N[:, None] >= ratio_edges_JK[bin_N]).sum(1)
    count_JK, hits_JK = (
        np.bincount(cell_N, weights, minlength=num_s * num_a).reshape(num_s, num_a) for weights in (None, accepted_N)
    )
    overall_1 = _shrunk(np.array([accepted_N.sum()]), np.array([num]), np.array([PRIOR]))
    by_agreement_J = _shrunk(hits_JK.sum(1), count_J, overall_1.repeat(num_s))
    by_both_JK = _shrunk(hits_JK, count_JK, by_agreement_J[:, None].repeat(num_a, axis=1))
    return AcceptanceBins(edges_J.tolist(), by_agreement_J.tolist(), ratio_edges_JK.tolist(), by_both_JK.tolist())


def _shrunk(hits: Floats, count: NDArray[np.int64], parent: Floats) -> Floats:
    """Means of bins, drawn towards their parents' means the more, the less the bins differ beyond noise.

    Empirical Bayes by moments: with n samples, a mean m and its parent's mean p in each bin, the sum of
    n (m - p)^2 / (p (1 - p)) is expected to be the number of bins + N v, where v is the variance between bins in units
    of a single sample's. The parent then weighs as much as 1 / v samples.
    """
    is_met = count > 0
    excess = ((hits - count * parent) ** 2)[is_met] / (count * parent * (1 - parent))[is_met] - 1
    weight = np.clip(count.sum() / max(excess.sum(), 1e-9), LEAST_WEIGHT, MOST_WEIGHT)
    return (hits + weight * parent) / (count + weight)


@dataclass(frozen=True)
class AgreementFigures:
    """How good the predictions of the newest samples were, each made before its outcome was known.

    acceptance    share of the samples that were accepted.
    entropy_bits  of accept, at that share: what there is to know.
    gain_of_agreement_bits, gain_of_both_bits  what P(accept | S), and P(accept | S, A), told of it: entropy_bits less
                  the mean log-loss. Wrong predictions cost bits, so it may be negative.
    ece_of_agreement, ece_of_both  expected calibration errors, see `calibration_error`.
    """

    num_samples: int
    acceptance: float
    entropy_bits: float
    gain_of_agreement_bits: float
    gain_of_both_bits: float
    ece_of_agreement: float
    ece_of_both: float

    @property
    def gain_of_agreement_share(self) -> float:
        """Of the entropy; 0 where there is none."""
        return self.gain_of_agreement_bits / self.entropy_bits if self.entropy_bits else 0.0

    @property
    def gain_of_both_share(self) -> float:
        """Of the entropy; 0 where there is none."""
        return self.gain_of_both_bits / self.entropy_bits if self.entropy_bits else 0.0


class AgreementEstimate:
    """`bins`, fitted to the newest MAX_SAMPLES drafted tokens that were reached, and how well they predicted those."""

    def __init__(self) -> None:
        self.bins = NO_BINS
        self.num_samples = 0  # ever
        self._next_fit = FIRST_FIT
        self._samples_N5 = np.zeros((MAX_SAMPLES, 5))  # a ring: S, A, accepted, and the predictions of both kinds

    def observe(self, samples: Sequence[tuple[float, float, bool]]) -> None:
        """Takes in (S, A, accepted) of tokens whose fate is known, in the order in which they were drafted."""
        for agreement, ratio, is_accepted in samples:
            self._samples_N5[self.num_samples % MAX_SAMPLES] = (
                agreement, ratio, is_accepted, self.bins.given_agreement(agreement),
                self.bins.given_both(agreement, ratio),
            )
            self.num_samples += 1
        if self.num_samples >= self._next_fit:
            self._next_fit = self.num_samples + min(self.num_samples, SAMPLES_PER_FIT)
            self.bins = fit_bins(*self._newest()[:3])

    def figures(self) -> AgreementFigures | None:
        """None before the first sample."""
        if not self.num_samples:
            return None
        _, _, accepted_N, by_agreement_N, by_both_N = self._newest()
        acceptance = float(accepted_N.mean())
        entropy = _log_loss(np.full_like(accepted_N, acceptance), accepted_N)
        return AgreementFigures(
            num_samples=len(accepted_N), acceptance=acceptance, entropy_bits=entropy,
            gain_of_agreement_bits=entropy - _log_loss(by_agreement_N, accepted_N),
            gain_of_both_bits=entropy - _log_loss(by_both_N, accepted_N),
            ece_of_agreement=calibration_error(by_agreement_N, accepted_N),
            ece_of_both=calibration_error(by_both_N, accepted_N),
        )

    def _newest(self) -> Floats:
        """[5, N], in no particular order."""
        return self._samples_N5[: self.num_samples].T


def calibration_error(predicted_N: Floats, accepted_N: Floats) -> float:
    """|mean prediction - share accepted| in bins of equal width of the prediction, averaged over the samples."""
    bin_N = (predicted_N * NUM_CALIBRATION_BINS).astype(int).clip(max=NUM_CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bin_N, predicted_N - accepted_N)).sum() / len(predicted_N))


def _log_loss(predicted_N: Floats, accepted_N: Floats) -> float:
    """Mean bits by which the outcomes surprise who predicted so."""
    likelihood_N = np.where(accepted_N > 0, predicted_N, 1 - predicted_N)
    return float(-np.log(likelihood_N).mean()) / math.log(2)
