"""Length policies: what they may see, what they choose, and that switching drafting off stays cheap and reversible."""

from __future__ import annotations

import inspect
import math
import random

import pytest
import torch

from dvi.draft_length import (
    AcceptanceEstimate,
    ConfidenceStop,
    CostTable,
    FixedLength,
    GoodputLength,
    LengthPolicy,
    RoundInfo,
    RoundOutcome,
)
from dvi.verification import count_leading

ONE_ROW = RoundInfo(num_rows=1)
CHEAP = CostTable(draft_step_s={1: 0.1}, verify_s={1: 1.0, 9: 1.4})
DEAR = CostTable(draft_step_s={1: 0.9}, verify_s={1: 1.0, 9: 5.0})


def simulate(policy: GoodputLength, acceptance: float, *, num_rounds: int, seed: int = 0) -> list[int]:
    """The T of each round, with drafts accepted independently with the given probability."""
    chance = random.Random(seed)
    lengths = []
    for _ in range(num_rounds):
        length = policy.choose(ONE_ROW)
        lengths.append(length)
        accepted = 0
        while accepted < length and chance.random() < acceptance:
            accepted += 1
        policy.observe(RoundOutcome([length], [accepted]))
    return lengths


def all_policies() -> list[LengthPolicy]:
    return [FixedLength(3), ConfidenceStop(3), GoodputLength((1, 3), CHEAP)]


@pytest.mark.parametrize("policy", all_policies(), ids=lambda p: type(p).__name__)
def test_every_policy_chooses_from_its_announced_buckets_and_masks_one_entry_a_row(policy):
    """Catches a T that no prepared shape fits."""
    assert list(policy.buckets) == sorted(set(policy.buckets))
    assert policy.choose(ONE_ROW) in policy.buckets
    mask_B = policy.keep(0, torch.tensor([0.1, 0.9]))
    assert mask_B.shape == (2,) and mask_B.dtype == torch.bool


@pytest.mark.parametrize("policy", all_policies(), ids=lambda p: type(p).__name__)
def test_no_policy_is_shown_a_token(policy):
    """Catches an interface that makes peeking possible: `keep` gets a depth and a confidence, nothing else."""
    assert list(inspect.signature(policy.keep).parameters) == ["depth", "confidence_B"]


def test_confidence_stop_ends_before_the_first_unsure_position():
    """Catches counting later confident positions, and a NaN drafter that drafts on."""
    policy = ConfidenceStop(3, threshold=0.6)
    confidence_BT = torch.tensor([[0.9, 0.6, 0.9], [0.9, 0.5, 0.9], [0.5, 0.9, 0.9], [0.9, math.nan, 0.9]])
    keep_BT = torch.stack([policy.keep(depth, confidence_BT[:, depth]) for depth in range(3)], 1)
    assert count_leading(keep_BT).tolist() == [3, 1, 0, 1]


def test_costs_are_interpolated_between_measurements_and_proportional_beyond():
    """Catches a batch whose verify pass is priced as one row, and an extrapolation that is free."""
    costs = CostTable(draft_step_s={1: 1.0, 5: 3.0}, verify_s={1: 10.0, 4: 13.0})
    assert costs.round_s(1, 0) == 10.0
    assert costs.round_s(1, 2) == 2 * 1.0 + 12.0
    assert costs.round_s(3, 1) == 2.0 + 13.0 * 6 / 4


def test_bad_settings_are_refused_with_the_value_and_the_bound():
    """Catches a typo that would silently never draft or never stop."""
    with pytest.raises(ValueError, match="draft tokens must be >= 0, got -1"):
        FixedLength(-1)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 60"):
        ConfidenceStop(4, threshold=60)
    with pytest.raises(ValueError, match="verify_s"):
        CostTable(draft_step_s={1: 1.0}, verify_s={})
    with pytest.raises(ValueError, match="draft_step_s"):
        CostTable(draft_step_s={1: 0.0}, verify_s={1: 1.0})
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\), got 1"):
        GoodputLength((1,), CHEAP, prior_acceptance=1.0)


# --- the estimate -----------------------------------------------------------------------------------------------------


def test_acceptance_is_counted_only_up_to_the_first_rejection():
    """Catches counting unreached depths as rejections, which would talk every deep draft down."""
    estimate = AcceptanceEstimate(3, prior_weight=1e-9, memory=1e9)
    for _ in range(10):
        estimate.observe(RoundOutcome([3, 3], [0, 3]))
    assert estimate.per_depth() == pytest.approx([0.5, 1.0, 1.0], abs=1e-6)


def test_a_full_acceptance_of_a_short_draft_is_no_rejection():
    """Catches num_accepted == num_drafted read as a rejection at the next depth."""
    estimate = AcceptanceEstimate(3, prior=0.5, prior_weight=1e-9)
    estimate.observe(RoundOutcome([1], [1]))
    assert estimate.per_depth()[0] == pytest.approx(1.0, abs=1e-6)


def test_before_any_evidence_every_depth_has_the_prior_and_untried_depths_follow_shallower_ones():
    """Catches depths never tried being judged hopeless or certain."""
    estimate = AcceptanceEstimate(4, prior=0.5)
    assert estimate.per_depth() == [0.5] * 4
    for _ in range(500):
        estimate.observe(RoundOutcome([1], [1]))
    first, *deeper = estimate.per_depth()
    assert 0.9 < first < 1 and deeper == pytest.approx([first] * 3)


def test_the_estimate_follows_a_drafter_that_improves():
    """Catches counts that never forget: 1000 bad rounds must not outweigh the last 200."""
    estimate = AcceptanceEstimate(1)
    for accepted, rounds in ((0, 1000), (1, 200)):
        for _ in range(rounds):
            estimate.observe(RoundOutcome([1], [accepted]))
    assert estimate.per_depth()[0] > 0.85


# --- goodput ----------------------------------------------------------------------------------------------------------


def test_goodput_is_expected_tokens_over_seconds():
    """The formula by hand at the prior: T = 2 gives 1 + .5 + .25 tokens."""
    policy = GoodputLength((2,), CHEAP)
    assert policy.goodput(1) == pytest.approx({0: 1 / 1.0, 2: 1.75 / (0.2 + 1.1)})


@pytest.mark.parametrize("acceptance, bounds", [(0.95, (8, 8)), (0.6, (2, 4)), (0.02, (0, 0))])
def test_the_length_settles_where_it_pays(acceptance, bounds):
    """Catches a controller stuck at its first choice, on either side."""
    lengths = simulate(GoodputLength((1, 2, 4, 8), CHEAP), acceptance, num_rounds=2000)[1000:]
    typical = sorted(lengths)[len(lengths) // 2]
    assert bounds[0] <= typical <= bounds[1]


def test_drafting_that_does_not_pay_is_switched_off_and_probes_cost_at_most_one_percent():
    """Law 4. Catches unbounded exploration: in rounds and in seconds, after the first hundred rounds."""
    policy = GoodputLength((1, 2, 4), DEAR)
    lengths = simulate(policy, 0.1, num_rounds=20_000)[100:]
    probes = [length for length in lengths if length > 0]
    seconds = sum(DEAR.round_s(1, length) for length in lengths)
    assert 0 < len(probes) <= 0.01 * len(lengths)
    assert sum(DEAR.round_s(1, length) for length in probes) <= 0.0101 * seconds
    assert set(probes) == {1, 2, 4}


def test_at_steady_state_at_most_three_percent_of_plain_throughput_is_lost():
    """Law 4, in modelled seconds, for acceptances from hopeless to good."""
    for acceptance in (0.0, 0.2, 0.4, 0.6, 0.9):
        for costs in (CHEAP, DEAR):
            lengths = simulate(GoodputLength((1, 2, 4), costs), acceptance, num_rounds=6000)[1000:]
            tokens = sum(sum(acceptance**j for j in range(length + 1)) for length in lengths)
            seconds = sum(costs.round_s(1, length) for length in lengths)
            assert tokens / seconds >= 0.97 / costs.round_s(1, 0)


def test_drafting_comes_back_when_the_drafter_has_learnt():
    """Catches an off state without return; probing alone must find out."""
    policy = GoodputLength((1, 4), CHEAP)
    assert simulate(policy, 0.0, num_rounds=700)[500:].count(0) >= 195
    assert simulate(policy, 0.9, num_rounds=10_000)[-1] == 4


def test_a_challenger_must_win_by_the_margin_for_several_rounds_running():
    """Catches a controller that flips with every round's noise."""
    policy = GoodputLength((1,), CHEAP, patience=3, probe_share=0.0)
    assert policy.choose(ONE_ROW) == 1
    for _ in range(300):
        policy.observe(RoundOutcome([1], [0]))
    assert [policy.choose(ONE_ROW) for _ in range(4)] == [1, 1, 0, 0]


def test_a_challenger_within_the_margin_does_not_take_over():
    """Catches a margin that is not applied: here plain decoding is better, but by less than the margin."""
    costs = CostTable(draft_step_s={1: 0.53}, verify_s={1: 1.0, 2: 1.0})
    policy = GoodputLength((1,), costs, prior_acceptance=0.6, margin=0.05, probe_share=0.0)
    lengths = []
    for round_index in range(400):
        lengths.append(policy.choose(ONE_ROW))
        policy.observe(RoundOutcome([1], [round_index % 2]))
    assert policy.goodput(1)[0] > policy.goodput(1)[1]
    assert set(lengths) == {1}


def test_a_larger_batch_is_priced_by_its_own_rows():
    """Catches choosing T for one row when eight are verified: their positions no longer come for free."""
    costs = CostTable(draft_step_s={1: 0.1, 8: 0.4}, verify_s={1: 1.0, 8: 1.0, 64: 8.0})
    assert GoodputLength((4,), costs, prior_acceptance=0.6).choose(RoundInfo(num_rows=1)) == 4
    assert GoodputLength((4,), costs, prior_acceptance=0.6).choose(RoundInfo(num_rows=8)) == 0
