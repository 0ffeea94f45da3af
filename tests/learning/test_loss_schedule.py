"""The schedule: its presets, the two ways to leave the warm-up, and its state."""

import json

import pytest

from dvi.records import LossWeights
from trainers.learning.loss_schedule import KL_FLOOR, PRESETS, LossSchedule


def test_default_weights_follow_the_documented_formula():
    # Catches a ramp that starts or ends one step off, or moves a weight the wrong way.
    schedule = LossSchedule("kl_rl", warmup_steps=100, ramp_steps=200)
    warmup = LossWeights(forward_kl=0.5, reverse_kl=1.0)
    assert schedule.weights(0) == schedule.weights(99) == schedule.weights(100) == warmup
    middle = schedule.weights(200)
    expected = LossWeights(forward_kl=0.3, reverse_kl=0.55, accepted_ce=0.25, policy_gradient=0.1)
    assert vars(middle) == pytest.approx(vars(expected))
    end = LossWeights(forward_kl=0.1, reverse_kl=0.1, accepted_ce=0.5, policy_gradient=0.2)
    assert schedule.weights(300) == schedule.weights(10**6) == end


@pytest.mark.parametrize("preset", ["kl_rl", "kl_ce", "kl_pg"])
def test_forward_kl_never_vanishes_once_rewards_count(preset):
    # Catches a KL that decays to 0: the reward terms alone collapse.
    schedule = LossSchedule(preset, warmup_steps=3, ramp_steps=7)
    assert all(schedule.weights(step).forward_kl >= KL_FLOOR for step in range(50))


def test_warmup_is_pure_kl():
    # Catches reward terms on an untrained drafter.
    schedule = LossSchedule("kl_rl", warmup_steps=5)
    for step in range(6):
        weights = schedule.weights(step)
        assert weights.accepted_ce == weights.policy_gradient == weights.entropy == 0


@pytest.mark.parametrize(
    ("preset", "term"),
    [("kl_only", "forward_kl"), ("pg_only", "policy_gradient"), ("ce_only", "accepted_ce"), ("lk", "lk_hybrid")],
)
def test_single_term_presets_hold_that_term_alone_for_ever(preset, term):
    # Catches an ablation that silently mixes in another term.
    schedule = LossSchedule(preset, warmup_steps=3, ramp_steps=4)
    assert all(schedule.weights(step) == LossWeights(**{term: 1.0}) for step in range(20))


def test_phase_names_what_the_weights_do():
    # Catches a phase reported one step before the weights move.
    schedule = LossSchedule("kl_rl", warmup_steps=2, ramp_steps=2)
    assert [schedule.phase(step) for step in range(6)] == ["kl", "kl", "kl", "ramp", "rl", "rl"]
    assert LossSchedule("kl_only", warmup_steps=0, ramp_steps=0).phase(9) == "kl"
    assert LossSchedule("lk", warmup_steps=0, ramp_steps=0).phase(9) == "kl"
    assert LossSchedule("pg_only").phase(0) == "rl"


def test_a_ramp_of_zero_steps_jumps():
    # Catches a division by zero.
    schedule = LossSchedule("kl_rl", warmup_steps=2, ramp_steps=0)
    assert [schedule.phase(step) for step in range(4)] == ["kl", "kl", "rl", "rl"]


def by_acceptance() -> LossSchedule:
    return LossSchedule("kl_rl", by="acceptance", warmup_steps=10, ramp_steps=4, flat_steps=20)


def switch_step(schedule: LossSchedule, acceptances: list[float]) -> int | None:
    """The last step of pure KL, or None if there is no other."""
    phases = [schedule.phase(step, acceptance) for step, acceptance in enumerate(acceptances)]
    return phases.index("ramp") - 1 if "ramp" in phases else None


def test_warmup_by_acceptance_ends_once_acceptance_is_high_and_flat():
    # Catches a switch during the rise, and a plateau never noticed.
    assert switch_step(by_acceptance(), [0.7] * 100) == 20
    rising = [0.3 + 0.004 * step for step in range(100)]
    assert switch_step(by_acceptance(), rising) is None
    at = switch_step(by_acceptance(), rising + [0.7] * 200)
    assert at is not None and at > 100 + 20


def test_warmup_by_acceptance_goes_on_while_acceptance_is_low():
    # Catches a switch on flatness alone: rewards on a poor drafter collapse it.
    assert switch_step(by_acceptance(), [0.4] * 500) is None


def test_warmup_by_acceptance_lasts_at_least_warmup_steps():
    # Catches a minimum that is ignored.
    schedule = LossSchedule("kl_rl", by="acceptance", warmup_steps=60, ramp_steps=4, flat_steps=5)
    assert switch_step(schedule, [0.9] * 100) == 60


def test_steps_without_a_measurement_leave_the_acceptance_as_it_was():
    # Catches None counted as 0, and a crash on traffic without drafts.
    assert switch_step(by_acceptance(), [0.7, None] * 50) == 20


def test_once_ramping_a_fall_in_acceptance_does_not_bring_the_warmup_back():
    # Catches a schedule that flickers between phases.
    schedule = by_acceptance()
    assert switch_step(schedule, [0.7] * 22) == 20
    assert [schedule.phase(step, 0.0) for step in range(22, 26)] == ["ramp", "ramp", "rl", "rl"]


def test_asking_twice_in_a_step_counts_its_acceptance_once():
    # Catches a phase that changes because somebody logged it.
    once, often = by_acceptance(), by_acceptance()
    for step in range(15):
        once.weights(step, 0.1 * (step % 7))
        for _ in range(3):
            often.weights(step, 0.1 * (step % 7))
            often.phase(step, 0.1 * (step % 7))
    assert once.state_dict() == often.state_dict()


@pytest.mark.parametrize("by", ["steps", "acceptance"])
def test_reset_starts_the_warmup_anew(by):
    # Catches a drift wake-up that goes on with reward terms, and one that measures from step 0.
    schedule = LossSchedule("kl_rl", by=by, warmup_steps=20, ramp_steps=2, flat_steps=20)
    assert switch_step(schedule, [0.7] * 50) == 20
    schedule.reset(50)
    phases = [schedule.phase(step, 0.7) for step in range(50, 80)]
    assert phases[:21] == ["kl"] * 21 and phases[21:23] == ["ramp", "rl"]


@pytest.mark.parametrize("cut", [5, 75, 89, 100])
def test_a_schedule_restored_from_json_continues_as_if_never_stopped(cut):
    # The cuts lie in the rise, on the plateau (steps 67 to 87), in the ramp and after it.
    # Catches a piece of state left out: the phase would change at another step after a resume.
    acceptances = [0.4 + 0.02 * min(step, 15) for step in range(150)]
    straight, first = by_acceptance(), by_acceptance()
    expected = [straight.weights(step, acceptance) for step, acceptance in enumerate(acceptances)]
    assert PRESETS["kl_rl"][1] in expected
    weights = [first.weights(step, acceptance) for step, acceptance in enumerate(acceptances[:cut])]
    second = by_acceptance()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    weights += [second.weights(step, acceptances[step]) for step in range(cut, 150)]
    assert weights == expected


def test_wrong_settings_are_refused_with_the_choices():
    # Catches a typo that trains with the default instead.
    with pytest.raises(ValueError, match="ce_only, kl_ce, kl_only, kl_pg, kl_rl, lk, pg_only, got 'kl-rl'"):
        LossSchedule("kl-rl")
    with pytest.raises(ValueError, match="'steps' or 'acceptance', got 'time'"):
        LossSchedule("kl_rl", by="time")
    with pytest.raises(ValueError, match="ramp_steps must be >= 0, got -1"):
        LossSchedule("kl_rl", ramp_steps=-1)
