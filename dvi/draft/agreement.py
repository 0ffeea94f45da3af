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


def fit_bins(agreements: Floats, ratios: Floats, accepted: Floats) -> AcceptanceBins:
    """Bins with edges at the quantiles of S, and in each of them at the quantiles of A.

    A cell's mean is shrunk towards its bin of S, that towards the mean of all, and that towards PRIOR. Equal values
    share a bin, so that some bins may be empty: what is said of them is what is said of their parents.
    """
    num, num_s, num_a = len(agreements), NUM_AGREEMENT_BINS, NUM_RATIO_BINS
    edges = np.sort(agreements)[np.arange(1, num_s) * num // num_s]
    bins = np.searchsorted(edges, agreements, side="right")
    counts = np.bincount(bins, minlength=num_s)
    firsts = np.cumsum(counts) - counts
    rank_JK = firsts[:, None] + np.arange(1, num_a) * counts[:, None] // num_a
    ratio_edges_JK = ratios[np.lexsort((ratios, bins))][rank_JK.clip(max=num - 1)]
    cells = bins * num_a + (ratios[:, None] >= ratio_edges_JK[bins]).sum(1)
    count_JK, hits_JK = (
        np.bincount(cells, weights, minlength=num_s * num_a).reshape(num_s, num_a) for weights in (None, accepted)
    )
    overall = _shrunk(np.array([accepted.sum()]), np.array([num]), np.array([PRIOR]))
    by_agreement = _shrunk(hits_JK.sum(1), counts, overall.repeat(num_s))
    by_both_JK = _shrunk(hits_JK, count_JK, by_agreement[:, None].repeat(num_a, axis=1))
    return AcceptanceBins(edges.tolist(), by_agreement.tolist(), ratio_edges_JK.tolist(), by_both_JK.tolist())


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
        _, _, accepted, by_agreement, by_both = self._newest()
        acceptance = float(accepted.mean())
        entropy = _log_loss(np.full_like(accepted, acceptance), accepted)
        return AgreementFigures(
            num_samples=len(accepted), acceptance=acceptance, entropy_bits=entropy,
            gain_of_agreement_bits=entropy - _log_loss(by_agreement, accepted),
            gain_of_both_bits=entropy - _log_loss(by_both, accepted),
            ece_of_agreement=calibration_error(by_agreement, accepted),
            ece_of_both=calibration_error(by_both, accepted),
        )

    def _newest(self) -> Floats:
        """[5, N], in no particular order."""
        return self._samples_N5[: self.num_samples].T


def calibration_error(predicted: Floats, accepted: Floats) -> float:
    """|mean prediction - share accepted| in bins of equal width of the prediction, averaged over the samples."""
    bins = (predicted * NUM_CALIBRATION_BINS).astype(int).clip(max=NUM_CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bins, predicted - accepted)).sum() / len(predicted))


def _log_loss(predicted: Floats, accepted: Floats) -> float:
    """Mean bits by which the outcomes surprise who predicted so."""
    likelihoods = np.where(accepted > 0, predicted, 1 - predicted)
    return float(-np.log(likelihoods).mean()) / math.log(2)
