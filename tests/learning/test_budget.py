"""When learning may work: credit, gaps and steps owed, with a clock told by hand."""

from __future__ import annotations

import pytest

from trainers.learning.budget import CREDIT_CAP_S, GAP_MEMORY_S, MAX_STEPS_OWED, TimeBudget


def used_s(budget: TimeBudget, *, until_s: float, piece_s: float = 0.005, gap_every_s: float | None = None) -> float:
    """Seconds of work done in busy time from 0 on; a gap of one free piece every so often."""
    now_s = used = 0.0
    next_gap_s = gap_every_s
    while now_s < until_s:
        now_s += 0.01
        if next_gap_s is not None and now_s >= next_gap_s:
            assert budget.allows(now_s, is_idle=True)
            now_s += piece_s
            next_gap_s += gap_every_s
        elif budget.allows(now_s, is_idle=False):
            now_s += piece_s
            used += piece_s
            budget.charge(piece_s)
    return used


def test_busy_time_is_used_up_to_the_share():
    """Catches a charge that is lost or taken twice."""
    budget = TimeBudget(0.1, rounds_per_step=1, now_s=0.0)
    assert used_s(budget, until_s=100.0) == pytest.approx(10.0, rel=0.01)


def test_traffic_with_gaps_is_left_alone_until_half_the_credit_is_saved():
    """Catches work put between two tokens that the next gap would have taken; and a share that gaps swallow."""
    budget = TimeBudget(0.05, rounds_per_step=1, now_s=0.0)
    assert budget.allows(0.0, is_idle=True)
    half_s = CREDIT_CAP_S / 2 / 0.05
    assert used_s(budget, until_s=half_s - 0.1, gap_every_s=1.0) == 0.0
    # Too few gaps for the work: what is saved up beyond the half is used, the share in full.
    budget = TimeBudget(0.05, rounds_per_step=1, now_s=0.0)
    assert used_s(budget, until_s=200.0, gap_every_s=1.0) == pytest.approx(0.05 * (200.0 - half_s), rel=0.05)


def test_after_a_gap_long_ago_work_begins_with_the_first_credit():
    """Catches a learner that waits for gaps which do not come."""
    budget = TimeBudget(0.05, rounds_per_step=1, now_s=0.0)
    budget.allows(0.0, is_idle=True)
    assert not budget.allows(GAP_MEMORY_S - 0.1, is_idle=False)
    assert budget.allows(GAP_MEMORY_S + 0.1, is_idle=False)


def test_a_quiet_hour_buys_no_stall():
    """Catches credit without bound."""
    budget = TimeBudget(0.5, rounds_per_step=1, now_s=0.0)
    budget.allows(3600.0, is_idle=False)
    budget.charge(CREDIT_CAP_S)
    assert not budget.allows(3600.0, is_idle=False)


def test_rounds_owe_steps_up_to_a_bound():
    """Catches rounds that are forgotten while a step waits for its time, and hours of catching up."""
    budget = TimeBudget(0.05, rounds_per_step=3, now_s=0.0)
    for _ in range(7):
        budget.owe_round()
    budget.pay_step()
    assert budget.is_step_owed
    budget.pay_step()
    assert not budget.is_step_owed
    for _ in range(10 * MAX_STEPS_OWED):
        budget.owe_round()
    assert budget.rounds_owed == 3 * MAX_STEPS_OWED


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_rounds_of_which_a_part_is_wanted_owe_that_part_of_the_steps(share):
    """Catches a settled learner that works on where there is no time to be saved: idle, or without a limit."""
    budget, num_steps = TimeBudget(share, rounds_per_step=2, now_s=0.0), 0
    for _ in range(1000):
        budget.owe_round(part=0.1)
        if budget.is_step_owed:
            budget.pay_step()
            num_steps += 1
    assert num_steps in (49, 50)  # a tenth is no binary fraction


def test_without_a_limit_at_most_one_step_is_owed():
    """Catches steps that depend on when data came rather than on rounds."""
    budget = TimeBudget(1.0, rounds_per_step=3, now_s=0.0)
    for _ in range(100):
        budget.owe_round()
    assert budget.is_step_owed and budget.allows(0.0, is_idle=False)
    budget.pay_step()
    assert budget.rounds_owed == 0


def test_a_restart_forgets_what_was_saved_and_not_what_was_taken():
    """Catches a learner beside pauses that takes more than its share: each pause would forgive the last overdraft."""
    budget = TimeBudget(0.1, rounds_per_step=1, now_s=0.0)
    budget.allows(1.0, is_idle=False)  # 0.1 s saved
    budget.restart(1.0)
    assert not budget.allows(1.0, is_idle=False)
    budget.charge(0.05)
    budget.restart(100.0)
    assert not budget.allows(100.4, is_idle=False)
    assert budget.allows(100.6, is_idle=False)
