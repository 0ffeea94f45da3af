"""The engine on a device that is not there: whatever joins, leaves or shares a prefix, it waits for verdicts alone."""

from __future__ import annotations

import random
import time

import pytest

from dvi.draft.costs import CostTable
from dvi.serving.engine import PREFIX_CHUNK, Engine
from dvi.serving.request import DraftChoice, Request
from dvi.serving.scheduler import SchedulerLimits
from tests.support.pretend_device import DEVICE, PretendDevice
from tests.support.recorded_graphs import capturing
from tests.support.rehearsal import VOCAB_SIZE, params_of, speculator_on

COSTS = CostTable(draft_step_s={1: 1e-4}, verify_s={1: 1e-3, 80: 9e-3})


def requests() -> list[Request]:
    """Two kinds of draws, two lengths of drafts, and prompts that begin alike."""
    generator = random.Random(0)
    beginning = [generator.randrange(VOCAB_SIZE) for _ in range(2 * PREFIX_CHUNK)]
    return [
        Request(
            index, [*(beginning if index % 2 else []), *(generator.randrange(VOCAB_SIZE) for _ in range(3 + index))],
            params_of("gumbel" if index == 4 else "penalties" if index == 3 else "greedy", max_new_tokens=8),
            draft=DraftChoice(policy="fixed", num_draft_tokens=3 if index < 4 else 1), arrived_s=time.perf_counter(),
        )
        for index in range(6)
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["direct", "views"])
def test_a_server_s_answers_are_those_of_the_cpu_and_nothing_else_is_waited_for(path):
    """Catches keys that are copied by way of the host, a row's state that is moved by a list of indices, and graphs of
    one lane that hold what another lane's longer rows have replaced."""
    answers, device = {}, PretendDevice()
    with device, capturing(device) as graphs:
        for where in ("cpu", DEVICE):
            engine = Engine(
                speculator_on(where, path), SchedulerLimits(max_rows=3, max_positions=4096, prefill_tokens_per_step=32),
                prefix_positions=4 * PREFIX_CHUNK, costs=COSTS,
            )
            answers[where] = {index: [] for index in range(6)}
            with device.without_waits(where) as transfers:
                engine.add_all(requests())
                while engine.has_work:
                    for output in engine.step().outputs:
                        assert output.error is None
                        answers[where][output.request_id] += output.token_ids
        assert engine.prefixes.num_positions > 0
    assert answers["cpu"] == answers[DEVICE] and all(len(ids) == 8 for ids in answers[DEVICE].values())
    assert {place.split(":")[0] for name, place in transfers if name == "to_host"} == {"dvi/decode/host_row.py"}
    assert (sum(one.num_replays for one in graphs) > 0) == (path == "direct")
