"""The round: nothing computed twice, no length rule that peeks, and a stop is a stop however it is carried out.

Most tests run in float64, where batched and single-row passes agree to 1e-12 and no argmax hangs on it.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import nn

from dvi.draft.companions import SelfCompanion
from dvi.draft.length_policies import ConfidenceStop, DraftContext, FixedLength
from tests.support.drafter_doubles import Recorder, random_drafter
from tests.support.small_speculator import PROMPTS, greedy, knowing, speculator_of, with_drafter


@pytest.mark.parametrize("wrong_depths", [(), (2,)])
def test_every_layer_runs_once_per_drafted_or_committed_position(wrong_depths):
    """Catches a second shallow pass for verification, a deep pass per token, a second pass for learning: work beyond
    prefill + one last token per round + the drafts. Without rejections that is once per committed position."""
    params = greedy(20)
    drafter = knowing(PROMPTS[:1], greedy(40), path="views", wrong_depths=wrong_depths)
    speculator = with_drafter(drafter, "views")
    positions, calls = Counter(), Counter()

    def count(_module: nn.Module, args: tuple, *, layer: int) -> None:
        positions[layer] += args[0].shape[0] * args[0].shape[1]
        calls[layer] += 1

    layers = speculator.model.model.layers
    hooks = [
        layer.register_forward_pre_hook(functools.partial(count, layer=index)) for index, layer in enumerate(layers)
    ]
    (result,) = speculator.generate(PROMPTS[:1], params, policy=FixedLength(4), learner=Recorder(drafter))
    for hook in hooks:
        hook.remove()
    stats = result.stats
    num_prefilled = len(PROMPTS[0]) - 1
    executed = num_prefilled + stats.num_rounds + stats.num_drafted
    assert positions == {layer: executed for layer in range(3)}
    assert calls == {0: 1 + stats.num_rounds + stats.num_drafted, 1: 1 + stats.num_rounds, 2: 1 + stats.num_rounds}
    if wrong_depths:
        assert stats.num_drafted > stats.num_accepted > 0
    else:
        assert stats.num_accepted == stats.num_drafted > 0
        assert executed == num_prefilled + stats.committed_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_confidence_stop_as_a_mask_gives_what_ending_early_gives(temperature):
    """With an unsure row beside them the others' stop is a mask; alone the loop ends early. Outputs must agree."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=6))
    params = [greedy(12, temperature=temperature, seed=i) for i in range(4)]

    def run(prompts: list, params: list) -> dict[int, tuple]:
        policy = ConfidenceStop(6, threshold=0.5)
        results = speculator.generate(prompts, params, batch_size=len(prompts), policy=policy)
        return {r.index: (r.token_ids, r.stats.num_drafted, r.stats.accepted_per_depth) for r in results}

    together = run(PROMPTS[:4], params)
    alone = [run([p], [q])[0] for p, q in zip(PROMPTS[:4], params, strict=True)]
    assert [together[i] for i in range(4)] == alone
    assert len({num_drafted for _, num_drafted, _ in alone}) > 1


class Listener(FixedLength):
    """Notes at each depth how many positions it has heard S and A of."""

    stops_early = True

    def __init__(self, num_draft_tokens: int) -> None:
        super().__init__(num_draft_tokens)
        self.companion = SelfCompanion()
        self.heard: set[tuple[int, int, int]] = set()

    def keep(self, context: DraftContext) -> torch.Tensor:
        self.heard.add((context.depth, len(context.agreements), len(context.token_ratios)))
        return super().keep(context)


@pytest.mark.parametrize(
    ("options", "may_hear_of_drawn"),
    [
        ([{}, {}], True),
        ([{"temperature": 0.8, "coupling": "gumbel"}] * 2, True),
        ([{"temperature": 0.8}] * 2, False),
        ([{}, {"temperature": 0.8}], False),
    ],
)
def test_a_length_rule_hears_of_the_drawn_token_only_where_the_output_cannot_depend_on_it(options, may_hear_of_drawn):
    """Law: under sampling no length rule may peek. Catches A of a position told before it is decided on."""
    speculator = with_drafter(random_drafter(speculator_of().split, seed=1))
    policy = Listener(3)
    list(speculator.generate(PROMPTS[:2], [greedy(6, **one) for one in options], batch_size=2, policy=policy))
    assert policy.heard == {(depth, depth + 1, depth + may_hear_of_drawn) for depth in range(3)}
