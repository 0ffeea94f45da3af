"""Length policies: what they may see, what they choose, and that switching drafting off stays cheap and reversible."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from dvi.decode.verification import count_leading
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companions import SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import (
    BURST_ROUNDS,
    HOPE,
    AcceptanceEstimate,
    ConfidenceStop,
    DraftContext,
    FixedLength,
    GoodputLength,
    LengthPolicy,
    RoundInfo,
    RoundOutcome,
)

ONE_ROW = RoundInfo(num_rows=1)
CHEAP = CostTable(draft_step_s={1: 0.1}, verify_s={1: 1.0, 9: 1.4})
DEAR = CostTable(draft_step_s={1: 0.5}, verify_s={1: 1.0, 9: 2.6})


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


def context(confidence_B: torch.Tensor, depth: int = 0) -> DraftContext:
    """Two tokens to draft from, the likelier one with this probability."""
    log_odds_B = torch.logit(confidence_B.clamp(min=0.5))
    logits_BV = torch.stack([torch.zeros_like(log_odds_B), log_odds_B], 1)
    return DraftContext(depth, torch.ones_like(log_odds_B, dtype=torch.bool), logits_BV)


def all_policies() -> list[LengthPolicy]:
    return [
        FixedLength(3), ConfidenceStop(3), GoodputLength((1, 3), CHEAP),
        CompanionLength((1, 3), CHEAP, SelfCompanion()),
    ]


@pytest.mark.parametrize("policy", all_policies(), ids=lambda p: type(p).__name__)
def test_every_policy_chooses_from_its_announced_buckets_and_masks_one_entry_a_row(policy):
    """Catches a T that no prepared shape fits."""
    assert list(policy.buckets) == sorted(set(policy.buckets))
    assert policy.choose(ONE_ROW) in policy.buckets
    mask_B = policy.keep(context(torch.tensor([0.1, 0.9])))
    assert mask_B.shape == (2,) and mask_B.dtype == torch.bool


@pytest.mark.parametrize("policy", all_policies(), ids=lambda p: type(p).__name__)
def test_no_policy_is_shown_a_token(policy):
    """Catches an interface that makes peeking possible: `keep` gets distributions and what is told of them."""
    assert list(inspect.signature(policy.keep).parameters) == ["context"]
    told = {field.name for field in dataclasses.fields(DraftContext)}
    assert told == {"depth", "is_open_B", "logits_BV", "agreements", "token_ratios"}


def test_confidence_stop_ends_before_the_first_unsure_position():
    """Catches counting later confident positions, and a NaN drafter that drafts on."""
    policy = ConfidenceStop(3, threshold=0.6)
    confidence_BT = torch.tensor([[0.9, 0.6, 0.9], [0.9, 0.5, 0.9], [0.5, 0.9, 0.9], [0.9, math.nan, 0.9]]).double()
    keep_BT = torch.stack([policy.keep(context(confidence_BT[:, depth], depth)) for depth in range(3)], 1)
    assert count_leading(keep_BT).tolist() == [3, 1, 0, 1]


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
    estimate = AcceptanceEstimate(3, prior_weight=1e-9, memory_rounds=1e9)
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


def test_evidence_of_a_depth_no_longer_tried_keeps_its_mean_but_a_burst_outweighs_it():
    """Catches both ends: forgetting what did not pay, and believing it for ever."""
    estimate = AcceptanceEstimate(1)
    for drafted, rounds in ((1, 200), (0, 2000)):
        for _ in range(rounds):
            estimate.observe(RoundOutcome([drafted], [0]))
    assert estimate.per_depth()[0] < 0.15
    for _ in range(12):
        estimate.observe(RoundOutcome([1], [1]))
    assert estimate.per_depth()[0] > 0.45


def test_hope_is_for_what_is_little_known():
    """Catches a bonus that never wears off, and probabilities above 1."""
    estimate = AcceptanceEstimate(2, prior=0.9)
    assert estimate.per_depth(hope=2.0) == [1.0, 1.0]
    for _ in range(500):
        estimate.observe(RoundOutcome([1], [0]))
    mean, hopeful = estimate.per_depth()[0], estimate.per_depth(hope=1.0)[0]
    assert mean < hopeful < mean + 0.03


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
    hopeful = 0.5 + HOPE * math.sqrt(0.25 / 4)
    assert policy.goodput(1) == pytest.approx({0: 1 / 1.0, 2: (1 + hopeful + hopeful**2) / (0.2 + 1.1)})


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
    assert set(probes) == {1, 4}  # the neighbour and the largest


def test_probes_look_at_the_neighbours_the_largest_length_and_plain_decoding():
    """Catches a reference that is never measured: plain decoding is what no round may be slower than."""
    policy = GoodputLength((1, 2, 4, 8), CHEAP)
    assert set(simulate(policy, 0.95, num_rounds=4000)[1000:]) == {8, 4, 0}


def test_a_length_that_would_lose_with_every_draft_accepted_is_not_probed():
    """Catches rounds of ten times the price, in large batches, that no acceptance could repay."""
    costs = CostTable(draft_step_s={1: 0.1}, verify_s={1: 1.0, 2: 1.2, 9: 12.0})
    lengths = simulate(GoodputLength((1, 8), costs), 0.0, num_rounds=2000)
    assert 1 in lengths and 8 not in lengths


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
    costs = CostTable(draft_step_s={1: 0.55}, verify_s={1: 1.0, 2: 1.0})
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


def test_a_new_drafter_version_is_probed_at_once_and_the_share_of_probes_stays_bounded():
    """Catches an untrained drafter that learns for thousands of rounds before anybody looks."""
    policy = GoodputLength((4,), CHEAP)
    lengths = []
    for round_index in range(20_000):
        length = policy.choose(RoundInfo(num_rows=1, drafter_version=round_index // 50))
        lengths.append(length)
        policy.observe(RoundOutcome([length], [0]))
    probed = [index for index, length in enumerate(lengths) if length]
    assert sum(index >= 100 for index in probed) <= 0.01 * len(lengths)
    gaps = [b - a for a, b in itertools.pairwise(probed) if a >= 100]
    assert gaps.count(2) > 0.7 * len(gaps)  # in bursts of every other round
    assert max(gaps) < 1.1 * BURST_ROUNDS / 0.01


def test_without_a_new_version_the_burst_stays_in_reserve():
    """Catches routine probes that leave nothing for news."""
    policy = GoodputLength((4,), CHEAP)
    for version, num_rounds in ((0, 6000), (1, 20)):
        lengths = []
        for _ in range(num_rounds):
            lengths.append(policy.choose(RoundInfo(num_rows=1, drafter_version=version)))
            policy.observe(RoundOutcome([lengths[-1]], [0]))
    assert lengths.count(4) >= 8


def test_each_number_of_rows_keeps_its_own_length():
    """Catches one length for all: with rows that come and go it would never have been beaten long enough."""
    costs = CostTable(draft_step_s={1: 0.1, 8: 0.4}, verify_s={1: 1.0, 8: 1.0, 64: 8.0})
    policy = GoodputLength((4,), costs, prior_acceptance=0.6, probe_share=0.0)
    assert [policy.choose(RoundInfo(num_rows)) for num_rows in (1, 8, 1, 8)] == [4, 0, 4, 0]


# --- regret, by simulation --------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 3, 4, 6, 8)
# In units of a plain step: a CPU at batch 1, docs/benchmarks.md; a pass whose price rises with its positions from the
# fourth on, and one that is proportional to them throughout.
CPU = CostTable(draft_step_s={1: 0.12}, verify_s={1: 1.0, 2: 1.26, 3: 1.4, 4: 1.4, 5: 1.5, 7: 1.56, 9: 1.66})
BENT = CostTable(draft_step_s={1: 0.1, 16: 0.6}, verify_s={1: 1.0, 4: 1.2, 16: 2.5, 144: 20.0})
PROPORTIONAL = CostTable(draft_step_s={1: 0.06, 16: 0.96}, verify_s={1: 0.5, 144: 72.0})
DEPTH_PROFILE = (0.46, 0.63, 0.74, 0.77, 0.77, 0.77, 0.77, 0.77)  # measured, docs/benchmarks.md


@dataclass(frozen=True)
class World:
    """A machine, a drafter and traffic, in rounds.

    table       what the rule is told; the truth is `costs`, and `overhead` in every round.
    acceptance  of (round, depth).
    rows        "one", or "random": 1..16 anew in every round.
    outliers    share of rounds that take ten times as long; the others' noise has a deviation of 5 %.
    """

    costs: CostTable
    acceptance: Callable[[int, int], float]
    table: CostTable | None = None
    overhead: float = 0.0
    rows: str = "one"
    outliers: float = 0.0
    load: Callable[[int], float] = lambda _round: 1.0

    def seconds(self, num_rows: int, length: int) -> float:
        return self.costs.round_s(num_rows, length) + self.overhead

    def tokens(self, round_index: int, length: int) -> float:
        tokens = reach = 1.0
        for depth in range(length):
            reach *= self.acceptance(round_index, depth)
            tokens += reach
        return tokens


def constant(acceptance: float) -> Callable[[int, int], float]:
    return lambda _round, _depth: acceptance


def mispriced(costs: CostTable, *, plain: float) -> CostTable:
    """The table with every part of a round that plain decoding lacks divided by `plain`."""
    base = costs.verify_s[1]
    return CostTable(
        draft_step_s={rows: s / plain for rows, s in costs.draft_step_s.items()},
        verify_s={rows: base + (s - base) / plain for rows, s in costs.verify_s.items()},
    )


def serve(world: World, *, num_rounds: int, seed: int = 0) -> list[tuple[int, int]]:
    """(rows, T) of every round as the goodput rule chose it, with a noisy clock and a new version every 40 rounds."""
    policy, chance, served = GoodputLength(LENGTHS, world.table or world.costs), random.Random(seed), []
    for index in range(num_rounds):
        num_rows = chance.randint(1, 16) if world.rows == "random" else 1
        length = policy.choose(RoundInfo(num_rows, drafter_version=index // 40))
        accepted = []
        for _ in range(num_rows):
            accepted.append(0)
            while accepted[-1] < length and chance.random() < world.acceptance(index, accepted[-1]):
                accepted[-1] += 1
        noise = 10.0 if chance.random() < world.outliers else math.exp(0.05 * chance.gauss(0, 1))
        seconds = world.seconds(num_rows, length) * world.load(index) * noise
        policy.observe(RoundOutcome([length] * num_rows, accepted, seconds))
        served.append((num_rows, length))
    return served


def speed_up(world: World, served: list[tuple[int, int]], *, over: int, start: int = 0) -> float:
    """Speed of the rounds from `start` on over that of a fixed T: its expected seconds for as many tokens."""
    theirs = ours = 0.0
    for index, (num_rows, length) in enumerate(served[start:], start):
        tokens_per_round = world.tokens(index, length) / world.tokens(index, over)
        theirs += tokens_per_round * world.seconds(num_rows, over)
        ours += world.seconds(num_rows, length)
    return theirs / ours


PLAIN_IS_BEST = {
    "untrained drafter": World(CPU, constant(0.02)),
    "drafter that nearly pays": World(CPU, constant(0.25)),
    "drafting priced at half": World(CPU, constant(0.25), table=mispriced(CPU, plain=2.0)),
    "drafting priced at double": World(CPU, constant(0.05), table=mispriced(CPU, plain=0.5)),
    "interrupted rounds": World(CPU, constant(0.05), outliers=0.05),
    "load comes and goes": World(CPU, constant(0.05), load=lambda index: 1.0 + index // 300 % 3),
    "batches, each position paid": World(PROPORTIONAL, constant(0.85), rows="random"),
    "the same, priced at half": World(
        PROPORTIONAL, constant(0.85), rows="random", table=mispriced(PROPORTIONAL, plain=2.0)
    ),
    "batches and an untrained drafter": World(BENT, constant(0.05), rows="random", table=mispriced(BENT, plain=2.0)),
}


@pytest.mark.parametrize("name", PLAIN_IS_BEST)
def test_where_plain_decoding_is_best_at_most_three_percent_are_lost_from_the_first_thousand_rounds_on(name):
    """Catches probes, noise and a wrong table that cost more than the law of 0.97 allows."""
    world = PLAIN_IS_BEST[name]
    served = serve(world, num_rounds=4000)
    for rounds in (served[:1000], served):
        assert speed_up(world, rounds, over=0) >= 0.97


DRAFTING_IS_BEST = {
    "trained drafter": World(CPU, lambda _round, depth: DEPTH_PROFILE[depth], overhead=0.15),
    "good drafter": World(CPU, constant(0.85)),
    "drafting priced at half": World(CPU, constant(0.85), table=mispriced(CPU, plain=2.0)),
    "drafting priced at double": World(CPU, constant(0.85), table=mispriced(CPU, plain=0.5)),
    "interrupted rounds": World(CPU, constant(0.85), outliers=0.05),
    "load comes and goes": World(CPU, constant(0.7), load=lambda index: 1.0 + index // 300 % 3),
    "batches": World(BENT, constant(0.85), rows="random"),
    "batches priced at half": World(BENT, constant(0.85), rows="random", table=mispriced(BENT, plain=2.0)),
}


@pytest.mark.parametrize("name", DRAFTING_IS_BEST)
def test_where_drafting_pays_the_long_run_is_within_five_percent_of_the_best_fixed_length(name):
    """Catches a rule that settles elsewhere, or that leaves a good length for noise."""
    world = DRAFTING_IS_BEST[name]
    served = serve(world, num_rounds=6000)
    assert min(speed_up(world, served, over=length, start=3000) for length in (0, *LENGTHS)) >= 0.95


def test_a_drafter_that_pays_a_little_is_not_given_up_in_its_first_bad_stretch():
    """Catches estimates without hope: three runs in four would decode plainly for thousands of rounds."""
    world = DRAFTING_IS_BEST["trained drafter"]
    runs = [serve(world, num_rounds=4000, seed=seed) for seed in range(4)]
    assert sum(speed_up(world, served, over=3) for served in runs) / len(runs) >= 0.96


def test_a_drafter_that_becomes_good_is_used_within_two_bursts():
    """Catches waiting for rare probes: at one in a hundred rounds the old evidence would outlast 5000."""
    world = World(CPU, lambda index, _depth: 0.05 if index < 2000 else 0.8)
    served = serve(world, num_rounds=8000)
    assert speed_up(world, served[:2000], over=0) >= 0.97
    start = 2000 + int(2 * BURST_ROUNDS / 0.01)
    assert min(speed_up(world, served, over=length, start=start) for length in LENGTHS) >= 0.95


def test_a_drafter_that_becomes_bad_is_given_up_within_two_hundred_rounds():
    """Catches old evidence that keeps drafting going."""
    world = World(CPU, lambda index, _depth: 0.8 if index < 2000 else 0.05)
    served = serve(world, num_rounds=4000)
    assert speed_up(world, served, over=0, start=2200) >= 0.97


def test_nothing_is_learnt_of_depths_past_a_rows_room_or_the_end_of_its_text():
    """Catches a row that could draft only one token, or whose text ended, taken for one that had the rest refused."""
    informed, limited = AcceptanceEstimate(4), AcceptanceEstimate(4)
    informed.observe(RoundOutcome([1, 2], [1, 2]))
    limited.observe(RoundOutcome([4, 4], [1, 2], limits=[1, 2]))
    assert limited.per_depth() == informed.per_depth()
    assert RoundOutcome([4, 4, 4], [1, 2, 0], limits=[1, 9, 3]).num_reached == [1, 3, 1]


def test_goodput_takes_the_longest_draft_that_the_round_has_room_for():
    """Catches a length, probes included, of which a part could not be kept."""
    costs = CostTable(draft_step_s={1: 0.01}, verify_s={1: 1.0, 9: 1.0})
    policy = GoodputLength((1, 2, 4, 8), costs, prior_acceptance=0.9)
    for index in range(200):
        length = policy.choose(RoundInfo(num_rows=1, max_draft_tokens=index % 8))
        assert length in policy.buckets and length <= index % 8
        policy.observe(RoundOutcome([length], [length], limits=[length]))
    assert policy.choose(RoundInfo(num_rows=1, max_draft_tokens=3)) == 2
