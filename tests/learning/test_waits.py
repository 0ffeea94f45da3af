"""A learner on a device that is not there: what it stores, learns and publishes never waits but where it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.records import Transitions
from dvi.settings import LearningSettings
from tests.support.pretend_device import DEVICE, OnDevice, PretendDevice
from tests.support.random_traffic import stretch
from tests.support.recorded_graphs import capturing
from tests.support.rehearsal import PROMPTS, new_speculator, params_of
from trainers.learning.online import OnlineTrainer
from trainers.learning.replay import ReplayBuffer

SETTINGS = LearningSettings(
    lr=0.01, blocks_per_step=8, rounds_per_step=2, budget=1.0, steps_per_publish=2, steps_per_canary=3,
    replay_positions=128, schedule="kl_rl", warmup_steps=2, ramp_steps=2, switch_by="steps",
)  # fmt: skip
COLUMNS = ("hidden_WD", "target_hidden_WD", "token_ids_W", "draft_token_ids_W", "draft_log_probs_W")


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice() as device:
        yield device


def decoded(
    speculator: SelfSpeculator, trainer: OnlineTrainer, name: str = "greedy", *, max_new_tokens: int = 16
) -> list[tuple[int, list[int]]]:
    options = {"policy": FixedLength(3), "batch_size": 2, "learner": trainer}
    results = list(speculator.generate(PROMPTS, params_of(name, max_new_tokens=max_new_tokens), **options))
    assert not any(result.error for result in results)
    return sorted((result.index, result.token_ids) for result in results)


def moved(transitions: Transitions) -> Transitions:
    return dataclasses.replace(transitions, **{name: getattr(transitions, name).to(DEVICE) for name in COLUMNS})


@pytest.mark.parametrize(
    "changes", [{}, {"blocks_per_slice": 3, "learn_from_prompts": True}, {"tokens_before_trim": 20}],
    ids=["whole", "sliced", "trimmed"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_a_learner_beside_serving_is_the_cpus(device, name, changes):
    """Catches a mask that selects, a loss that is read on the way and a draw on the wrong device; and what they would
    cost in numbers: answers, steps and weights are those of a CPU."""
    outcomes, weights = [], []
    for where in ("cpu", DEVICE):
        speculator = new_speculator(where, "views", draft_vocab_size=24)
        trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, **changes))
        with device.without_waits(where) as transfers:
            texts = decoded(speculator, trainer, name)
        places = {place.split(":")[0] for function, place in transfers if function == "to_host"}
        outcomes.append((texts, trainer.num_steps, [version.source for version in trainer.versions()]))
        weights.append({key: tensor.cpu() for key, tensor in trainer.drafter.state_dict().items()})
    assert outcomes[0] == outcomes[1]
    torch.testing.assert_close(*weights)
    assert isinstance(trainer.replay._segments.fields["hidden"], OnDevice) and trainer.num_steps > 0
    assert {"dvi/decode/host_row.py", "trainers/learning/replay.py"} < places <= {
        "dvi/decode/host_row.py", "trainers/learning/replay.py", "trainers/learning/student.py",
        "trainers/learning/publish_gate.py",
    }  # fmt: skip


def test_graphs_decode_with_what_a_learner_publishes(device):
    """Catches a graph that goes on with the weights of its capture, or with a head that has been trimmed since."""
    texts = []
    for may_capture in (False, True):
        speculator = new_speculator(DEVICE, "direct", draft_vocab_size=24)
        trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, tokens_before_trim=20))
        with capturing(device) if may_capture else mock.MagicMock() as graphs:
            texts.append(decoded(speculator, trainer))
        assert speculator.drafter.version > 1 and speculator.drafter.draft_head.vocab_size == 24
    assert texts[0] == texts[1] and sum(one.num_replays for one in graphs) > 5


@pytest.mark.parametrize("path", ["direct", "views"])
def test_a_step_waits_three_times_and_a_publish_once(device, path):
    """For the losses, the gradient's norm, and whether all stayed finite; for whether the weights serve already. The
    canary's score is one more. Each wait may cost rounds that could have been under way."""
    speculator = new_speculator(DEVICE, path)
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, rounds_per_step=10**6))
    decoded(speculator, trainer)
    assert len(trainer.replay) > 0  # stores what was observed
    for step in range(1, 7):
        with device.without_waits():
            trainer.step()
        is_publish, is_canary = step % SETTINGS.steps_per_publish == 0, step % SETTINGS.steps_per_canary == 0
        assert 3 <= device.count("to_host") <= 3 + is_publish + 2 * is_canary
        assert device.count("to_device") == 1 + is_canary  # the places to try for blocks
    assert speculator.drafter.version > 0


def test_steps_allocate_alike(device):
    """Catches a batch whose size follows what the replay happens to hold."""
    speculator = new_speculator(DEVICE, "direct")
    changes = {"rounds_per_step": 10**6, "steps_per_canary": 100, "schedule": "kl_only"}
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, **changes))
    decoded(speculator, trainer)
    steps = []
    for _ in range(6):
        with device.recorded() as calls:
            trainer.step()
        steps.append([call.size for call in calls])
    assert len(steps[2]) > 100 and steps[2] == steps[4] and steps[3] == steps[5]


def test_observing_waits_once_for_each_time_it_stores(device):
    """Catches a wait for every stretch: most of a round's cost, once rounds are graphs."""
    speculator = new_speculator(DEVICE, "direct")
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, rounds_per_step=10**6, replay_positions=4096))
    with device.without_waits() as transfers:
        decoded(speculator, trainer, max_new_tokens=48)
    places = [place for (function, place), n in transfers.items() for _ in range(n) if function == "to_host"]
    num_positions = len(trainer._experience)
    assert 0 < sum("trainers/" in place for place in places) <= num_positions // 64


def test_a_replay_of_several_tenants_evicts_samples_and_forgets_without_a_look(device):
    """Catches what only a full ring, a reservoir, a share of a tenant or an administrator comes to."""
    options = {"capacity_positions": 256, "hidden_size": 12, "max_block": 4, "seed": 0}
    on_cpu, there = ReplayBuffer(**options), ReplayBuffer(**options, device=DEVICE)
    stretches = [
        dataclasses.replace(stretch(index), request_id=index % 5, tenant=f"tenant {index % 3}") for index in range(100)
    ]
    batches = []
    for buffer, where in ((on_cpu, "cpu"), (there, DEVICE)):
        given = stretches if buffer is on_cpu else [moved(one) for one in stretches]
        with device.without_waits(where):
            for first in range(0, 100, 10):
                buffer.add(*given[first : first + 10])
            num_reads = device.count("to_host")
            buffer.forget_tenant("tenant 1")
            for share in (1.0, 0.4):
                batches.append(buffer.sample(
                    6, 4, current_version=1, generator=torch.Generator().manual_seed(1), max_tenant_share=share
                ))  # fmt: skip
            assert device.count("to_host") == num_reads
    assert num_reads == 10 and len(on_cpu) == len(there)
    for one, other in zip(batches[:2], batches[2:], strict=True):
        for name, tensor in vars(one).items():
            assert torch.equal(tensor, getattr(other, name).cpu()), name


def test_going_back_to_a_version_reads_once_whether_it_serves(device):
    """Catches a comparison that waits for each parameter."""
    speculator = new_speculator(DEVICE, "views")
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, rounds_per_step=10**6))
    decoded(speculator, trainer)
    for _ in range(4):
        trainer.step()
    with device.without_waits():
        trainer.rollback(0)
        assert device.count("to_host") == 1
        trainer.publish_now()
    assert [version.source for version in trainer.versions()][-1] == "rollback"
