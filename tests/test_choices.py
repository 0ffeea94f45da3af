"""The lists of choices in the settings: each word of them is something that the code makes, and nothing else is."""

from typing import get_args

import pytest

from dvi.config import load_config
from dvi.decode.verification import make_rule
from dvi.model.drafter import DRAFTER_KINDS
from dvi.serving.scheduler import SchedulerLimits
from dvi.settings import DrafterKind, Dtype, Mode, RuleName, ServeSettings, VerifySettings


def test_every_drafter_and_rule_that_can_be_chosen_is_there():
    """Catches a choice that fails when a run starts, and one that nobody can make."""
    assert set(get_args(DrafterKind)) == set(DRAFTER_KINDS)
    assert [make_rule(VerifySettings(rule)).name.split()[0] for rule in get_args(RuleName)] == list(get_args(RuleName))


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_a_file_takes_every_dtype_that_the_command_line_takes(dtype):
    """Catches float16 that one of the two refuses; whether it can be exact is for machine and model to say."""
    for mode in get_args(Mode):
        found = load_config(None, [f"model.dtype={dtype}", f"model.mode={mode}"]).model
        assert (found.dtype, found.mode) == (dtype, mode)


def test_a_scheduler_made_by_hand_has_the_servers_limits():
    """Catches a queue of 64 in one place and of 8 in another."""
    names = ("max_rows", "max_positions", "max_waiting", "prefill_tokens_per_step", "rounds_per_prefill")
    assert [getattr(SchedulerLimits(), name) for name in names] == [getattr(ServeSettings(), name) for name in names]
