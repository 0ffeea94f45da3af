"""Rounds on a device that is not there: one wait for it per round, and none while it drafts and verifies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor, nn

from dvi.decode.sequence import Sequence
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companion_model import ModelCompanion
from dvi.draft.companions import Companion, EmaCompanion, ExitCompanion, OlderCompanion, SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import ConfidenceStop, FixedLength
from dvi.model.split import SplitModel
from tests.support.pretend_device import DEVICE, OnDevice, PretendDevice
from tests.support.rehearsal import PROMPTS, SAMPLING, new_speculator, params_of, speculator_on
from tests.support.small_speculator import batch_of, sequence_of
from tests.support.tiny_models import tiny_model

PATHS = ("direct", "views")


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice() as device:
        yield device


def companion_length(companion: Companion) -> CompanionLength:
    costs = CostTable(draft_step_s={1: 0.1}, verify_s={1: 1.0})
    return CompanionLength((3,), costs, companion, is_on_cpu=False)


POLICIES = {
    "fixed": lambda: FixedLength(3), "confidence": lambda: ConfidenceStop(3, threshold=0.4),
    "self": lambda: companion_length(SelfCompanion()), "exit": lambda: companion_length(ExitCompanion(nn.Identity())),
    "older": lambda: companion_length(OlderCompanion()), "ema": lambda: companion_length(EmaCompanion()),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAMPLING))
@pytest.mark.parametrize("path", PATHS)
def test_whole_answers_are_the_cpus_and_each_round_waits_once(device, path, name):
    """Catches a branch that only a GPU takes and that computes something else, and every wait but a verdict's.

    Rows of unequal length come and go; the texts that are read, and the settings of new rows, go there without a wait.
    """
    options = {"policy": FixedLength(3), "batch_size": 2}
    expected = sorted(
        (r.index, r.token_ids) for r in speculator_on("cpu", path).generate(PROMPTS, params_of(name), **options)
    )
    speculator = speculator_on(DEVICE, path)
    with device.without_waits() as transfers:
        results = sorted(speculator.generate(PROMPTS, params_of(name), **options), key=lambda result: result.index)
    assert [(r.index, r.token_ids) for r in results] == expected
    assert 0 < sum(r.stats.num_accepted for r in results) < sum(r.stats.num_drafted for r in results)
    assert all(isinstance(stretch.hidden_WD, OnDevice) for r in results for stretch in r.transitions)
    [(place, num_waits)] = [(place, n) for (function, place), n in transfers.items() if function == "to_host"]
    assert place.startswith("dvi/decode/host_row.py:") and num_waits >= max(len(r.accept_lengths) for r in results)


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
@pytest.mark.parametrize("path", PATHS)
def test_a_round_moves_two_small_tensors(device, path, num_draft_tokens):
    """The verdicts come, the lengths go; settings go once for a set of rows."""
    batch = batch_of(speculator_on(DEVICE, path), FixedLength(num_draft_tokens), max_rows=2)
    for index, prompt in enumerate(PROMPTS[:2]):
        batch.admit(sequence_of(index, prompt, params_of("sampled")))
    for num_sent in (6, 1, 1):  # room, two of settings, and what the rows have seen: prompts, answers
        with device.without_waits():
            batch.round()
        assert (device.count("to_host"), device.count("to_device")) == (1, num_sent)


@pytest.mark.parametrize("name", list(SAMPLING))
@pytest.mark.parametrize("path", PATHS)
def test_rounds_of_one_shape_allocate_alike(device, path, name):
    """Catches a size that follows the texts' length: every round would be a new one to the allocator, and no graph.

    Only where the cache shows rows another multiple of its step the sizes change.
    """
    batch = batch_of(speculator_on(DEVICE, path), ConfidenceStop(3, threshold=0.4), max_rows=2)
    for index, prompt in enumerate(PROMPTS[:2]):
        batch.admit(sequence_of(index, prompt, params_of(name, max_new_tokens=24)))
    batch.round()
    rounds = []
    for _ in range(3):
        with device.recorded() as calls:
            batch.round()
        rounds.append([call.size for call in calls if not call.place.startswith("dvi/decode/experience.py")])
    assert len(rounds[0]) > 100
    assert rounds[0] == rounds[1] == rounds[2]


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("name", list(SAMPLING))
@pytest.mark.parametrize("path", PATHS)
def test_drafting_and_judging_never_read_a_value_or_make_a_shape_from_one(device, path, name, policy):
    """Catches an early end that asks the device, a length rule or companion that looks, and a mask that selects."""
    speculator, policy = speculator_on(DEVICE, path), POLICIES[policy]()
    batch = batch_of(speculator, policy, max_rows=2)
    for index, prompt in enumerate(PROMPTS[:2]):
        batch.admit(sequence_of(index, prompt, params_of(name)))
    with device.without_waits():
        batch.round()
        speculator.drafter.publish(speculator.drafter, speculator.drafter.version + 1)  # which companions then follow
        batch.round()
    assert device.count("to_host") == 2
    assert all(len(sequence.token_ids) >= 2 for sequence in batch.sequences)


def test_a_companion_that_is_a_model_waits_for_what_it_was_fed(device):
    """One read more, between rounds: its cache keeps what its texts and the drafts have in common."""
    model = tiny_model("llama", num_layers=1, hidden_size=16, vocab_size=64, seed=5)
    companion = ModelCompanion(SplitModel(model.to(DEVICE), split_layer=0, path="views"))
    policy = FixedLength(3)
    policy.companion = companion
    batch = batch_of(speculator_on(DEVICE, "direct"), policy, max_rows=2)
    for index, prompt in enumerate(PROMPTS[:2]):
        batch.admit(sequence_of(index, prompt, params_of("greedy")))
    batch.round()
    for _ in range(3):
        with device.without_waits():
            batch.round()
        assert device.count("to_host") == 2


def test_log_probabilities_are_one_more_wait_for_each_row(device):
    """Catches a read for every column of them, and ids that come through a float too narrow for them."""
    texts = {}
    for where in ("cpu", DEVICE):
        batch = batch_of(speculator_on(where, "views"), FixedLength(3), max_rows=2)
        for index, prompt in enumerate(PROMPTS[:2]):
            batch.admit(Sequence(index, prompt, params_of("greedy"), lambda _: None, 12, num_logprobs=3))
        with device.without_waits(where):
            batch.round()
        texts[where] = [sequence.logprobs for sequence in batch.sequences]
    assert device.count("to_host") == 1 + 2
    assert texts["cpu"] == texts[DEVICE] and len(texts["cpu"][0][0].top) == 3


def test_rows_that_were_read_in_another_order_trade_places_without_a_wait(device):
    """Two prompts are prefilled by turns, and the second is done first: its anchor moves with it."""
    batches = {}
    for where in ("cpu", DEVICE):
        batch = batches[where] = batch_of(speculator_on(where, "views"), FixedLength(3), max_rows=2)
        sequences = [sequence_of(index, prompt, params_of("greedy")) for index, prompt in enumerate(PROMPTS[::-1][:2])]
        with device.without_waits(where):
            for sequence in sequences:
                batch.open(sequence)
            batch.prefill(sequences[0], 2)
            for sequence in reversed(sequences):
                batch.prefill(sequence, 99)
            batch.round()
    assert [s.token_ids for s in batches["cpu"].sequences] == [s.token_ids for s in batches[DEVICE].sequences]
    assert [s.request_id for s in batches[DEVICE].sequences] == [1, 0]


def test_an_average_of_versions_leaves_a_broken_one_without_a_look(device):
    """A version gone NaN is not averaged in: the past is then the version itself, and is finite again with the next."""
    speculator = new_speculator(DEVICE, "views")
    drafter, companion = speculator.drafter.requires_grad_(False), EmaCompanion()
    companion.follow(drafter, [])
    healthy = [parameter.clone() for parameter in drafter.parameters()]

    def published(values: list[Tensor]) -> list[Tensor]:
        for parameter, value in zip(drafter.parameters(), values, strict=True):
            parameter.copy_(value)
        drafter.publish(drafter, drafter.version + 1)
        with device.without_waits():
            companion.follow(drafter, [])
        assert not device.transfers
        return list(companion._past.parameters())

    assert any(bool(parameter.isnan().any()) for parameter in published([h * float("nan") for h in healthy]))
    recovered = published(healthy)
    assert all(bool((a == b).all()) for a, b in zip(recovered, healthy, strict=True))
