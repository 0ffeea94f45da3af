"""What rounds cost: the table, its correction by live rounds, and the measurement behind it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from dvi import SelfSpeculator
from dvi.draft.costs import CostTable, LiveCosts
from dvi.draft.measure_costs import measure_costs
from tests.support.tiny_models import tiny_model

TABLE = CostTable(draft_step_s={1: 0.1, 16: 0.4}, verify_s={1: 1.0, 16: 2.0, 144: 8.0})


def observe(costs: LiveCosts, rounds: list[tuple[int, int]], *, times: float = 1.0, plain_times: float = 1.0) -> None:
    """Rounds of (rows, T) that take `times` the table's seconds, those with T = 0 `plain_times` as much again."""
    for num_rows, length in rounds:
        factor = times * (1.0 if length else plain_times)
        costs.observe(num_rows, length, factor * TABLE.round_s(num_rows, length))


def relative(costs: LiveCosts, num_rows: int, length: int, *, to: int = 0) -> float:
    """The live price of one length in the other's, over the table's."""
    live = costs.round_s(num_rows, length) / costs.round_s(num_rows, to)
    return live * TABLE.round_s(num_rows, to) / TABLE.round_s(num_rows, length)


def test_costs_are_interpolated_between_measurements_and_proportional_beyond():
    """Catches a batch whose verify pass is priced as one row, and an extrapolation that is free."""
    costs = CostTable(draft_step_s={1: 1.0, 5: 3.0}, verify_s={1: 10.0, 4: 13.0})
    assert costs.round_s(1, 0) == 10.0
    assert costs.round_s(1, 2) == 2 * 1.0 + 12.0
    assert costs.round_s(3, 1) == 2.0 + 13.0 * 6 / 4


def test_before_any_round_the_table_is_the_cost():
    """Catches an estimate that needs rounds to exist."""
    costs = LiveCosts(TABLE)
    assert costs.round_s(3, 2) == TABLE.round_s(3, 2) and costs.pace == 1.0


def test_what_synthetic_passes_left_out_is_learnt_for_each_length():
    """Catches a table that stays in force: here only plain rounds take 1.5 times as long as it says."""
    costs = LiveCosts(TABLE)
    observe(costs, [(1, 4), (1, 0)] * 20, times=3.0, plain_times=1.5)
    assert relative(costs, 1, 4) == pytest.approx(1 / 1.5)
    assert costs.round_s(1, 4) == pytest.approx(3.0 * TABLE.round_s(1, 4))


def test_a_loaded_machine_makes_the_length_in_use_no_dearer_than_the_others():
    """Catches lengths measured at different times being compared by the clock: the one in use would always lose."""
    costs = LiveCosts(TABLE)
    observe(costs, [(1, 4), (1, 0)] * 40)
    observe(costs, [(1, 4)] * 6000, times=3.0)
    assert relative(costs, 1, 4) == pytest.approx(1.0)
    assert costs.round_s(1, 4) == pytest.approx(3.0 * TABLE.round_s(1, 4))


def test_interrupted_rounds_do_not_move_a_cost():
    """Catches means: a round in 20 that takes ten times as long would add half of the price."""
    costs, chance = LiveCosts(TABLE), random.Random(0)
    for length in [4, 0] * 300:
        observe(costs, [(1, length)], times=10.0 if chance.random() < 0.05 else chance.uniform(0.95, 1.05))
    assert relative(costs, 1, 4) == pytest.approx(1.0, abs=0.03)
    assert costs.pace == pytest.approx(1.0, abs=0.05)


def test_the_first_round_of_a_length_does_not_price_it():
    """Catches a length judged by one sample, which may hold an interruption or the warm-up of its shapes."""
    costs = LiveCosts(TABLE)
    observe(costs, [(1, 4)] * 20)
    observe(costs, [(1, 0)], times=10.0)
    assert relative(costs, 1, 4) == pytest.approx(1.0)


def test_a_length_in_constant_use_does_not_drift_against_the_probed_ones():
    """Catches correction and pace moving together, round by round, while nothing measures the others."""
    costs, chance = LiveCosts(TABLE), random.Random(1)
    observe(costs, [(1, 4), (1, 0)] * 40)
    for _ in range(6000):
        observe(costs, [(1, 4)], times=chance.uniform(0.8, 1.2))
    assert relative(costs, 1, 4) == pytest.approx(1.0, abs=0.05)


def test_a_batch_never_met_borrows_from_the_nearest_that_was():
    """Catches errors of the table that must be found out anew at every number of rows."""
    costs = LiveCosts(TABLE)
    observe(costs, [(4, 4), (4, 0)] * 20, plain_times=2.0)
    assert relative(costs, 3, 4) == pytest.approx(0.5)  # 3 and 4 rows share a correction
    assert relative(costs, 16, 4) == pytest.approx(0.5)


def test_a_borrowed_cost_is_scaled_by_what_both_batches_know():
    """Catches the whole level of a batch, wrong in the table, taken for the price of one length."""
    costs = LiveCosts(TABLE)
    observe(costs, [(4, 4), (4, 0)] * 20, plain_times=2.0)
    for num_rows in (4, 16) * 10:
        observe(costs, [(num_rows, 0)], times=1.0 if num_rows == 4 else 3.0, plain_times=2.0)
    assert relative(costs, 16, 4) == pytest.approx(0.5, rel=0.01)


def test_a_length_no_batch_has_met_is_priced_like_its_neighbour():
    """Catches a bargain that is none: the table's price beside corrected ones."""
    costs = LiveCosts(TABLE)
    observe(costs, [(1, 4), (1, 0)] * 20, plain_times=2.0)
    assert relative(costs, 1, 6, to=4) == pytest.approx(1.0)
    assert relative(costs, 1, 6) == pytest.approx(0.5)


# --- the measurement --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    return SelfSpeculator(tiny_model("llama"), None, split_layer=1)


def test_every_batch_and_length_is_measured_within_the_budget(speculator):
    """Catches a number of rows left to extrapolation although there was time."""
    costs = measure_costs(speculator.split, speculator.drafter, buckets=(1, 3), rows=(1, 2, 4), budget_s=60.0)
    assert set(costs.draft_step_s) == {1, 2, 4}
    assert set(costs.verify_s) == {1, 2, 4, 8, 16}


def test_a_spent_budget_leaves_the_first_batch_measured_and_begins_no_other(speculator, monkeypatch):
    """Catches a start-up that takes minutes on a slow model. The clock counts passes: every reading is a second."""
    readings = iter(range(10_000))
    monkeypatch.setattr("dvi.draft.measure_costs.time", SimpleNamespace(perf_counter=lambda: float(next(readings))))
    costs = measure_costs(speculator.split, speculator.drafter, buckets=(1, 3), rows=(4, 1, 2), budget_s=0.5)
    assert set(costs.draft_step_s) == {1}
    assert set(costs.verify_s) == {1, 2, 4}
