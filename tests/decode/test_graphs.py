"""Rounds as graphs on a device that is not there: captured once per key and replayed, they are what the code says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from dvi.decode.batch import DecodingBatch
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import MarginRule, StrictRule, TypicalRule
from dvi.draft.length_policies import ConfidenceStop, FixedLength, LengthPolicy
from dvi.learner import Learner
from dvi.records import Transitions
from tests.support.pretend_device import DEVICE, PretendDevice
from tests.support.recorded_graphs import GraphFault, RecordedGraphs, capturing
from tests.support.rehearsal import PROMPTS, new_speculator, params_of, speculator_on
from tests.support.small_speculator import batch_of, sequence_of


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice() as device:
        yield device


class Restless(Learner):
    """Publishes other weights after every round, and keeps what it was shown."""

    def __init__(self, speculator: SelfSpeculator) -> None:
        self._drafter = speculator.drafter
        self._generator = torch.Generator().manual_seed(0)
        self.seen: list[Tensor] = []

    def observe(self, transitions: list[Transitions]) -> None:
        self.seen += [x.cpu() for s in transitions for x in (s.hidden_WD, s.target_hidden_WD, s.draft_log_probs_W)]

    @torch.no_grad()
    def step_if_due(self, *, is_idle: bool = False) -> None:
        for parameter in self._drafter.parameters():
            noise = torch.randn(parameter.shape, generator=self._generator, device="cpu")
            parameter.add_((0.01 * noise).to(parameter))
        self._drafter.publish(self._drafter, self._drafter.version + 1)


RULES = [StrictRule(), MarginRule(0.5), TypicalRule()]
POLICIES = {"plain": FixedLength(0), "fixed": FixedLength(3), "confidence": ConfidenceStop(3, threshold=0.4)}
REQUESTS = [([5, 9, 33], 16), ([7], 7), ([1, 2, 3], 13), ([60, 60], 9)]  # the first takes most room


@pytest.mark.parametrize(
    ("policy", "rule"), [*((name, RULES[0]) for name in POLICIES), *(("fixed", rule) for rule in RULES[1:])],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_answers_of_graphs_are_those_of_the_code(device, policy, rule):
    """Catches numbers and addresses that a capture bakes in: a length, a row's settings, weights that moved.

    Rows come and go, and the drafter changes after every round.
    """
    answers, policy = [], POLICIES[policy]
    for may_capture in (False, True):
        speculator = new_speculator(DEVICE, "direct")
        speculator.rule, learner = rule, Restless(speculator)
        with capturing(device) if may_capture else mock.MagicMock() as made:
            prompts, rooms = zip(*REQUESTS, strict=True)
            params = [params_of("greedy", max_new_tokens=room) for room in rooms]
            results = speculator.generate(list(prompts), params, batch_size=2, policy=policy, learner=learner)
            answers.append(([(r.index, r.token_ids) for r in results], learner.seen))
    (eager_texts, eager_seen), (texts, seen) = answers
    assert texts == eager_texts
    assert len(seen) == len(eager_seen) and all(torch.equal(a, b) for a, b in zip(seen, eager_seen, strict=True))
    assert sum(graphs.num_replays for graphs in made) >= 5


def decoded(batch: DecodingBatch, num_rounds: int) -> list[list[int]]:
    for _ in range(num_rounds):
        batch.round()
    return [sequence.token_ids for sequence in batch.sequences]


def opened(policy: LengthPolicy, *, room: int = 16) -> DecodingBatch:
    batch = batch_of(speculator_on(DEVICE, "direct"), policy, max_rows=2)
    for index, prompt in enumerate(PROMPTS[:2]):
        batch.admit(sequence_of(index, prompt, params_of("greedy", max_new_tokens=room)))
    return batch


def test_another_length_rule_is_another_graph(device):
    """Catches a rule that an administrator has changed and that goes on in graphs captured before."""
    with capturing(device):
        batch = opened(ConfidenceStop(3, threshold=0.0))
        batch.round()
        batch.policy = ConfidenceStop(3, threshold=1.0)
        for _ in range(2):
            batch.round()
            assert [outcome.num_drafted for outcome in batch.outcomes] == [0, 0]
    assert batch._graphs.num_replays == 1 and len(batch._graphs) == 2


def test_a_longer_batch_over_the_same_model_leaves_a_graph_what_it_reads(device):
    """Catches a table of angles that is made anew for the longer one: the graph would read memory given to others."""
    expected = decoded(opened(FixedLength(3)), 4)
    with capturing(device):
        batch = opened(FixedLength(3))
        decoded(batch, 2)
        decoded(opened(FixedLength(3), room=200), 1)
        assert decoded(batch, 2) == expected
    assert batch._graphs.num_replays == 3


def test_a_round_that_reads_its_rows_settings_is_no_graph(device):
    """Catches settings of rows that have left: sampled rounds, and greedy ones whose filters a lossy rule asks."""
    speculator = new_speculator(DEVICE, "direct")
    speculator.rule = MarginRule(0.5)
    for name, options, num_graphs in (("greedy", {}, 1), ("greedy", {"top_p": 0.9}, 0), ("sampled", {}, 0)):
        with capturing(device):
            batch = speculator.open_batch(max_rows=1, policy=FixedLength(3), wants_transitions=False)
            batch.admit(sequence_of(0, [5, 9], params_of(name, **options)))
            decoded(batch, 2)
        assert len(batch._graphs) == num_graphs


# The graphs themselves


PLANTED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda held, step: held[: 2 + step] + 1,
    "mul": lambda held, step: held * (1 + step),
    "add": lambda held, step: (held if step == 0 else torch.arange(6.0, device=DEVICE)) + 1,
    "calls": lambda held, step: held + 1 if step == 0 else (held + 1).neg(),
    "empty": lambda held, step: torch.empty(2 + step, device=DEVICE).fill_(0),
}


@pytest.mark.parametrize("word", list(PLANTED))
def test_a_planted_change_between_rounds_of_one_key_is_found_and_named(device, word):
    """A number baked in, a size, an address, a call more."""
    graphs, held, steps = RecordedGraphs(device), torch.arange(6.0, device=DEVICE), [0, 0, 1]

    def function() -> SimpleNamespace:
        return SimpleNamespace(value=PLANTED[word](held, steps.pop(0)))

    graphs.run("key", function)
    with pytest.raises(GraphFault, match=word) as raised:
        graphs.run("key", function)
    assert "tests/decode/test_graphs.py:" in str(raised.value) or word == "calls"


def test_a_replay_makes_the_calls_again_in_the_memory_of_the_first(device):
    """New numbers in old places give new results at old addresses, with views and what is written in place."""
    graphs, given = RecordedGraphs(device), torch.arange(4.0, device=DEVICE)

    def function() -> SimpleNamespace:
        doubled = given * 2
        doubled.view(2, 2)[1].add_(1)
        return SimpleNamespace(doubled=doubled, last=doubled[-1:])

    first = graphs.run("key", function)
    assert first.doubled.tolist() == [0, 2, 5, 7]
    given.copy_(torch.ones(4, device=DEVICE))
    again = graphs.run("key", function)
    assert again is first and first.doubled.tolist() == [2, 2, 3, 3] and first.last.tolist() == [3]
    assert graphs.num_replays == 1 and len(graphs) == 1
