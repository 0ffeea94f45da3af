"""Companion length: which positions are worth their time, what the parent rule is told, and how it is set up."""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.draft.agreement import FIRST_FIT, AcceptanceBins
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companions import EmaCompanion, ExitCompanion, OlderCompanion, SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import (
    HOPE,
    AcceptanceEstimate,
    ConfidenceStop,
    DraftContext,
    FixedLength,
    GoodputLength,
    RoundInfo,
    RoundOutcome,
)
from dvi.records import SamplingParams
from dvi.serving.engine import Engine
from dvi.serving.request import DraftChoice
from dvi.serving.scheduler import SchedulerLimits
from dvi.settings import DraftSettings
from tests.support.drafter_doubles import random_drafter, small_config
from tests.support.tiny_models import tiny_model

# One position costs 0.1 s, a draft step 0.05 s, beside 1 s.
FLAT = CostTable(draft_step_s={1: 0.05, 64: 0.05}, verify_s={1: 1.1, 640: 65.0})
# Tables that give S itself as P(accept | S), and A as P(accept | S, A) but for a tenth where S < 0.5, by hundredths.
EDGES = [i / 100 for i in range(1, 100)]
MIDDLES = [(i + 0.5) / 100 for i in range(100)]
S_AND_A = AcceptanceBins(EDGES, MIDDLES, [EDGES] * 100, [[0.1] * 100] * 50 + [MIDDLES] * 50)


def ruling(
    costs: CostTable = FLAT, *, tokens_per_s: float, num_rows: int = 1, length: int = 4, can_pack: bool = True
) -> CompanionLength:
    """A policy about to draft by its rule, with S_AND_A for tables and a second worth so many tokens."""
    policy = CompanionLength((length,), costs, None, can_pack=can_pack, probe_share=0.0, prior_acceptance=0.999)
    policy.estimate.observe([(0.5, 0.5, True)] * FIRST_FIT)
    policy.estimate.bins = S_AND_A
    policy.buckets = (length,)  # not 0, whatever it costs
    assert policy.choose(RoundInfo(num_rows)) == length
    policy._tokens_per_s = tokens_per_s
    return policy


def lengths_of(
    policy: CompanionLength, s_BT: list[list[float]], a_BT: list[list[float]], *, is_told: bool = False
) -> list[int]:
    """num_drafted of each row. is_told: A of each position with its S, as in greedy rounds."""
    s_TB, a_TB = torch.tensor(s_BT).T, torch.tensor(a_BT).T
    is_open_B = torch.ones(len(s_BT), dtype=torch.bool)
    counts_B = torch.zeros(len(s_BT), dtype=torch.int64)
    for depth in range(len(s_TB)):
        told = list(a_TB[: depth + is_told])
        context = DraftContext(depth, is_open_B, torch.zeros(len(s_BT), 1), list(s_TB[: depth + 1]), told)
        is_open_B = is_open_B & policy.keep(context)
        counts_B += is_open_B
    return counts_B.tolist()


# --- within a round ---------------------------------------------------------------------------------------------------


def test_a_position_counts_while_its_reach_is_worth_its_time():
    """By hand: 0.15 s at 4 tokens a second cost 0.6 tokens. Catches reach that leaves out the positions before."""
    policy = ruling(tokens_per_s=4.0)
    # 0.9; 0.9 x 0.8 = 0.72; 0.9 x 0.9 x 0.7 = 0.567 stops, whatever comes later.
    assert lengths_of(policy, [[0.9, 0.8, 0.7, 1.0]], [[0.9, 0.9, 0.9, 0.9]]) == [2]
    assert lengths_of(policy, [[0.55, 0.99, 0.99, 0.99]], [[1.0] * 4]) == [0]
    assert lengths_of(policy, [[0.99] * 4], [[0.99] * 4]) == [4]


def test_a_of_a_position_steers_the_later_ones_alone_unless_it_is_told():
    """Under sampling A_0 is known from depth 1 on. Catches A used one position late, or not at all."""
    policy = ruling(tokens_per_s=4.0)
    assert lengths_of(policy, [[0.9, 0.9, 0.9]], [[0.3, 1.0, 1.0]]) == [1]
    assert lengths_of(policy, [[0.9, 0.9, 0.9]], [[0.3, 1.0, 1.0]], is_told=True) == [0]
    assert lengths_of(policy, [[0.55, 0.9, 0.9]], [[0.95, 0.9, 0.5]], is_told=True) == [2]
    assert lengths_of(policy, [[0.55, 0.9, 0.9]], [[0.95, 0.9, 0.5]]) == [0]


def test_a_goes_with_the_s_of_its_own_position():
    """At S_0 = 0.4 a high A_0 says little. Catches the newest S taken together with the A before it."""
    policy = ruling(tokens_per_s=2.0)
    assert lengths_of(policy, [[0.4, 0.9, 0.9]], [[0.95, 0.9, 0.9]]) == [1]
    assert lengths_of(policy, [[0.6, 0.9, 0.9]], [[0.95, 0.9, 0.9]]) == [3]


def test_a_second_round_begins_without_the_first_ones_survival():
    """Catches state that is left over where a round was given up half-way."""
    policy = ruling(tokens_per_s=4.0)
    s, a = [[0.9, 0.9]], [[0.01, 0.01]]
    assert lengths_of(policy, s, a) == lengths_of(policy, s, a) == [1]


def test_positions_go_to_the_rows_most_likely_to_use_them():
    """Verification that is free up to six positions and then dear: two of four rows go on, those with the best reach.
    Catches rows served in their own order, and a price that forgets what the batch has spent already."""
    costs = CostTable(draft_step_s={1: 0.01, 64: 0.01}, verify_s={1: 1.0, 6: 1.0, 7: 2.0, 30: 25.0})
    policy = ruling(costs, tokens_per_s=2.0, num_rows=4, length=2)
    s_BT, a_BT = [[0.5, 0.9], [0.9, 0.9], [0.3, 0.9], [0.8, 0.9]], [[0.9, 0.9]] * 4
    assert lengths_of(policy, s_BT, a_BT) == [0, 1, 0, 1]


def test_a_dear_first_position_is_taken_with_the_cheap_ones_behind_it():
    """One draft step for the whole batch: alone no row is worth it, together they are. Catches taking rows one by one
    until the first that does not pay."""
    costs = CostTable(draft_step_s={1: 0.5, 64: 0.5}, verify_s={1: 1.0, 64: 1.0})
    assert lengths_of(ruling(costs, tokens_per_s=2.0, num_rows=1), [[0.7]], [[0.9]]) == [0]
    assert lengths_of(ruling(costs, tokens_per_s=2.0, num_rows=3), [[0.7], [0.2], [0.6]], [[0.9]] * 3) == [1, 1, 1]


def test_without_packing_a_depth_costs_the_same_for_one_row_as_for_all():
    """The whole rectangle of 4 rows, 0.45 s, or nothing. Catches rows left out that would have cost nothing."""
    good = [[0.9], [0.8], [0.7], [0.1]]
    assert lengths_of(ruling(tokens_per_s=4.0, num_rows=4, can_pack=False), good, [[0.9]] * 4) == [1, 1, 1, 1]
    assert lengths_of(ruling(tokens_per_s=8.0, num_rows=4, can_pack=False), good, [[0.9]] * 4) == [0, 0, 0, 0]
    assert lengths_of(ruling(tokens_per_s=5.0, num_rows=4), good, [[0.9]] * 4) == [1, 1, 1, 0]


def test_the_worth_of_a_second_is_what_the_batch_makes_of_it():
    """lambda is the present goodput of all rows, in the table's seconds. Catches one row's, and a second correction by
    the machine's pace: costs twice the table's are worth half as much."""
    policy = ruling(tokens_per_s=0.0, num_rows=8)
    goodput = 8 * policy.goodput(8)[4]
    for _ in range(40):
        policy.costs.observe(8, 4, 2 * FLAT.round_s(8, 4))
    policy.choose(RoundInfo(8))
    assert policy.goodput(8)[4] * 8 == pytest.approx(goodput / 2, rel=1e-6)
    assert policy._tokens_per_s == pytest.approx(goodput, rel=1e-6)


def test_elsewhere_than_on_cpus_nothing_is_left_out_and_nothing_is_looked_at():
    """There a stop saves nothing, and to read S is a wait. On meta tensors every look raises."""
    policy = CompanionLength((4,), FLAT, None, is_on_cpu=False, probe_share=0.0, prior_acceptance=0.999)
    policy.estimate.observe([(0.5, 0.5, False)] * FIRST_FIT)
    assert policy.choose(RoundInfo(2)) == 4
    open_B, numbers_B = torch.ones(2, dtype=torch.bool, device="meta"), torch.zeros(2, device="meta")
    assert policy.keep(DraftContext(0, open_B, numbers_B[:, None], [numbers_B], [])) is open_B


# --- between rounds ---------------------------------------------------------------------------------------------------


def outcome(
    num_drafted: list[int], num_accepted: list[int], *, length: int, seconds: float | None = None
) -> RoundOutcome:
    return RoundOutcome(num_drafted, num_accepted, seconds, [[(0.5, 0.5)] * length] * len(num_drafted))


def test_before_enough_is_known_everything_is_verified():
    """Catches a rule of priors that leaves all out, and so never learns that it would have paid."""
    policy = CompanionLength((4,), FLAT, None, prior_acceptance=0.999, probe_share=0.0)
    assert policy.choose(RoundInfo(1)) == 4
    policy._tokens_per_s = 1e6
    assert lengths_of(policy, [[0.01] * 4], [[0.01] * 4]) == [4]


def test_samples_are_the_positions_that_were_reached():
    """(S, A) of accepted positions and of the first rejected one. Catches unreached ones counted as rejected, and one
    left out by the rule taken for verified."""
    policy = ruling(tokens_per_s=0.0, num_rows=3)
    seen = []
    policy.estimate.observe = seen.extend
    companion_scores = [[(0.1 * depth, 0.5) for depth in range(4)] for _ in range(3)]
    policy._num_wanted = [4, 2, 0]
    policy.observe(RoundOutcome([4, 2, 0], [1, 2, 0], None, companion_scores))
    assert seen == [(0.0, 0.5, True), (0.1, 0.5, False), (0.0, 0.5, True), (0.1, 0.5, True)]


def test_a_stop_counts_as_not_accepted():
    """A rule that lets half of the rows draft, all of them accepted, gains half a token at depth 0: were only counted
    positions told, T = 4 would seem to be worth four tokens a row."""
    policy = ruling(tokens_per_s=0.0, num_rows=2)
    plain = AcceptanceEstimate(4, prior=0.999)
    for _ in range(300):
        policy.choose(RoundInfo(2))
        policy._num_wanted = [4, 0]
        policy.observe(outcome([4, 0], [4, 0], length=4))
        plain.observe(RoundOutcome([4, 0], [4, 0]))
    assert policy.acceptance.per_depth()[0] == pytest.approx(0.5, abs=0.02)
    assert policy.acceptance.per_depth()[1] > 0.95
    assert plain.per_depth()[0] > 0.98


def test_what_a_length_costs_is_what_its_rounds_cost_with_their_stops():
    """Rounds that verify two of five positions. Catches short rounds taken for a cheap machine, and a long length
    judged by what it would cost without the rule."""
    policy = ruling(tokens_per_s=0.0)
    seconds = 2 * 0.05 + 1.2  # the second step is the one that stopped
    for _ in range(1000):
        policy.choose(RoundInfo(1))
        policy._num_wanted = [1]
        policy.observe(outcome([1], [1], length=4, seconds=seconds))
    assert policy.costs.pace == pytest.approx(1.0, rel=0.01)
    assert policy.costs.round_s(1, 4) == pytest.approx(FLAT.round_s(1, 4), rel=0.01)
    expected_tokens = 1 + sum(itertools.accumulate(policy.acceptance.per_depth(hope=HOPE), operator.mul))
    assert policy.goodput(1)[4] == pytest.approx(expected_tokens / seconds, rel=0.05)


@pytest.mark.parametrize("can_pack, num_positions", [(True, 8), (False, 20)])
def test_ragged_rounds_cost_their_positions_where_packed_and_their_rectangle_where_not(can_pack, num_positions):
    """Four rows, one of them four deep, in seconds that a machine like the table takes. Catches a pace that follows
    how ragged rounds are."""
    policy = ruling(tokens_per_s=0.0, num_rows=4, can_pack=can_pack)
    for _ in range(40):
        policy.choose(RoundInfo(4))
        policy._num_wanted = [4, 0, 0, 0]
        seconds = 4 * 0.05 + 1 + 0.1 * num_positions
        policy.observe(outcome([4, 0, 0, 0], [4, 0, 0, 0], length=4, seconds=seconds))
    assert policy.costs.pace == pytest.approx(1.0, rel=0.01)


def test_a_probe_verifies_all_and_is_judged_by_what_the_rule_would_have_left_out():
    """Catches positions that nothing is ever heard of again, and a rule judged by rounds that it did not rule."""
    policy = ruling(tokens_per_s=0.0)
    policy._keeps_all, policy._tokens_per_s = True, 4.0
    before = policy.estimate.num_samples
    assert lengths_of(policy, [[0.9, 0.3, 0.9, 0.9]], [[0.9] * 4]) == [4]
    assert policy._num_wanted == [1]
    told = []
    policy.acceptance.observe = told.append
    policy.observe(outcome([4], [4], length=4))
    assert policy.estimate.num_samples == before + 4
    assert told == [RoundOutcome([4], [1])]


def test_plain_rounds_pass_through():
    """T = 0 has no companion scores, no stops and no share. Catches a division by a table entry that does not exist."""
    costs = CostTable(draft_step_s={1: 5.0}, verify_s={1: 1.0})
    policy = CompanionLength((2,), costs, None, probe_share=0.0)
    for _ in range(3):
        assert policy.choose(RoundInfo(1)) == 0
        policy.observe(RoundOutcome([0], [0], seconds=1.0))
    assert policy.goodput(1)[0] == pytest.approx(1.0)


# --- simulation -------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Rows whose drafts are accepted with a chance that varies from token to token and that S and A tell of.

    costs: of a round of so many rows, draft steps and positions, beyond what any stop can save.
    """

    costs: CostTable
    num_rows: int
    chance: Callable[[random.Random], float]
    seed: int = 0

    def serve(self, policy: GoodputLength, *, num_rounds: int) -> tuple[float, float, float]:
        """Tokens a second, positions verified per token, and the share of rounds that drafted, of the second half."""
        rng = random.Random(self.seed)
        tokens = seconds = positions = drafting = 0.0
        for number in range(num_rounds):
            length = policy.choose(RoundInfo(self.num_rows))
            chances = [[self.chance(rng) for _ in range(length)] for _ in range(self.num_rows)]
            scores = [[(c, min(1.0, c + 0.05)) for c in row] for row in chances]
            counts = [length] * self.num_rows
            if length and policy.companion is not None:
                counts = lengths_of(policy, [[s for s, _ in r] for r in scores], [[a for _, a in r] for r in scores])
            accepted = []
            for row, count in zip(chances, counts, strict=True):
                draws = [rng.random() < chance for chance in row]
                accepted.append(next((i for i, hit in enumerate(draws[:count]) if not hit), count))
            num_positions, num_steps = sum(counts) + self.num_rows, min(max(counts) + 1, length)
            step_s = self.costs.round_s(self.num_rows, 1) - self.costs.round_s(2 * self.num_rows, 0)
            took = num_steps * step_s + self.costs.round_s(num_positions, 0)
            policy.observe(RoundOutcome(counts, accepted, took * rng.uniform(0.97, 1.03), scores if length else None))
            if number >= num_rounds // 2:
                tokens += sum(accepted) + self.num_rows
                seconds, positions, drafting = seconds + took, positions + num_positions, drafting + (length > 0)
        return tokens / seconds, positions / tokens, drafting / (num_rounds - num_rounds // 2)


# A deep pass that one row more makes 15 % dearer, and one proportional to its rows from the eighth on.
SMALL = CostTable(draft_step_s={1: 0.05, 64: 0.3}, verify_s={1: 1.0, 9: 2.2, 72: 12.0})
LENGTHS = (1, 2, 4, 8)


def between(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda rng: rng.uniform(low, high)


def either(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda rng: rng.choice((low, high))


def companion_length() -> CompanionLength:
    return CompanionLength(LENGTHS, SMALL, SelfCompanion(), can_pack=True)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_it_beats_the_goodput_rule_where_s_tells_which_tokens_are_good(num_rows):
    """In modelled seconds; at 8 rows the goodput rule finds that nothing pays. Catches a rule that stops too early, too
    late, or serves the wrong rows, and one that is never asked because drafts without it do not pay."""
    world = World(SMALL, num_rows, either(1 / 16, 15 / 16))
    goodput, _, _ = world.serve(GoodputLength(LENGTHS, SMALL), num_rounds=2400)
    ours, positions, _ = world.serve(companion_length(), num_rounds=2400)
    assert ours > 1.07 * goodput
    assert positions < 1.1  # nearly all that it verifies becomes text


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("chance", [(0.0, 0.1), (0.4, 0.6), (0.0, 1.0), (0.9, 1.0)])
def test_it_is_never_much_slower_than_plain_decoding_or_than_the_goodput_rule(chance, num_rows):
    """From hopeless drafts to good ones, of which S tells much or nothing. Catches drafting that goes on where it does
    not pay, and a rule that stops what does."""
    world = World(SMALL, num_rows, between(*chance))
    ours, _, _ = world.serve(companion_length(), num_rounds=1500)
    goodput, _, _ = world.serve(GoodputLength(LENGTHS, SMALL), num_rounds=1500)
    assert ours >= 0.97 * num_rows / SMALL.round_s(num_rows, 0)
    assert ours >= 0.97 * goodput


def test_drafting_comes_back_when_the_drafter_has_learnt():
    """After thousands of rejections the rule would leave everything out. Catches an off state without return."""
    policy = companion_length()
    _, _, drafting = World(SMALL, 1, between(0.0, 0.1)).serve(policy, num_rounds=1000)
    assert drafting < 0.1
    _, positions, drafting = World(SMALL, 1, between(0.8, 1.0)).serve(policy, num_rounds=2000)
    assert drafting > 0.9 and positions > 1.1


# --- how it is set up -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    model = tiny_model("llama", num_layers=2, hidden_size=16, dtype=torch.float64, seed=1)
    made = SelfSpeculator(model, None, drafter=small_config(), policy="companion", companion="exit")
    made.drafter = random_drafter(made.split, seed=1)
    return made


@pytest.mark.parametrize(
    "name, kind",
    [
        ("fixed", FixedLength), ("confidence", ConfidenceStop), ("goodput", GoodputLength), ("auto", GoodputLength),
        ("companion", CompanionLength),
    ],
)
def test_every_name_makes_its_policy_and_costs_are_asked_for_where_they_count(speculator, name, kind):
    """Catches names mixed up in the one table of makers, and seconds of measuring for a fixed length."""
    asked = []
    policy = speculator.new_policy(name, 4, costs=lambda: asked.append(1) or FLAT)
    assert type(policy) is kind
    assert bool(asked) == (kind in (GoodputLength, CompanionLength))
    assert type(speculator.new_policy(name, 0, costs=lambda: pytest.fail("measured"))) is FixedLength


@pytest.mark.parametrize(
    "name, kind", [("self", SelfCompanion), ("exit", ExitCompanion), ("older", OlderCompanion), ("ema", EmaCompanion)]
)
def test_every_companion_has_a_name(speculator, name, kind):
    """Catches names mixed up, and one companion for two policies."""
    assert type(speculator.new_companion(name)) is kind
    assert speculator.new_companion(name) is not speculator.new_companion(name)
    assert type(speculator.new_companion()) is ExitCompanion


def test_an_engine_makes_the_policy_that_a_request_asks_for(speculator):
    """Catches a second table of policies beside the speculator's."""
    engine = Engine(speculator, SchedulerLimits(max_rows=2), costs=FLAT)
    assert type(engine._policy_of(DraftChoice(policy="companion"))) is CompanionLength
    assert type(engine._policy_of(DraftChoice(policy="auto"))) is GoodputLength
    assert type(engine._policy_of(DraftChoice(policy="companion", num_draft_tokens=0))) is FixedLength


def test_what_it_learnt_outlives_a_call(speculator):
    """Catches costs measured and samples gathered anew for every call of `generate`."""
    prompts, params = [[1, 2, 3]] * 2, SamplingParams(max_new_tokens=6, ignore_eos=True)
    for _ in range(2):
        list(speculator.generate(prompts, params, batch_size=2))
    [policy] = speculator._policies.values()
    assert type(policy) is CompanionLength and policy.estimate.num_samples > 0
    assert math.isfinite(policy.estimate.figures().gain_of_both_bits)


def test_settings_name_a_model_for_the_kind_that_needs_one_and_for_no_other():
    """Catches a setting that nothing reads."""
    assert DraftSettings(policy="companion", companion="model", companion_model="folder").companion == "model"
    with pytest.raises(ValueError, match="needs companion_model"):
        DraftSettings(companion="model")
    with pytest.raises(ValueError, match="goes with companion 'model', got 'ema'"):
        DraftSettings(companion="ema", companion_model="folder")
