"""The law of sampled text, measured through the real engine: model, cache, drafts, batches and draws.

The reference law is computed here from the model's own forward pass. All p-values share one family: with Holm's
correction the odds that a correct engine fails are at most FAMILY_WISE, and seeds are fixed: it fails always or never.
Temperatures are high, so that drafter and verifier overlap and every branch of the verdict has much to do.
"""
# V vocabulary; tables are [V] for the first token and [V, V] for the first two.

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from scipy import stats
from torch import Tensor

from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.decode.verification import verify_by_rejection
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companions import SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import ConfidenceStop, FixedLength, LengthPolicy, RoundOutcome
from dvi.records import SamplingParams, Verdict
from tests.support.drafter_doubles import RaggedLength, broken_drafter, random_drafter, small_config
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 10
PROMPT = [5]
NUM_SAMPLES = 6000
BATCH_SIZE = 400
FAMILY_WISE = 1e-3
SMALLEST_EXPECTED = 5  # cells below it are pooled, or chi-square would not be chi-square



class Untimed(CompanionLength):
    """Looks at no clock: the same draws in every run."""

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(dataclasses.replace(outcome, seconds=None))


def companion_length() -> CompanionLength:
    """A rule whose thresholds lie amid the confidences of the drafter here: a position is worth 0.4 tokens or so."""
    costs = CostTable(draft_step_s={1: 0.01, BATCH_SIZE: 0.01}, verify_s={1: 1.0, 3 * BATCH_SIZE: 4.0})
    policy = Untimed((2,), costs, SelfCompanion(), can_pack=True, prior_acceptance=0.9, probe_share=0.1)
    chance = random.Random(0)
    pairs = [(chance.random(), chance.random()) for _ in range(2000)]
    policy.estimate.observe([(s, a, chance.random() < s) for s, a in pairs])
    return policy


CONFIGS: dict[str, tuple[dict, LengthPolicy]] = {
    "temperature": ({"temperature": 2.5}, FixedLength(1)),
    "top-p": ({"temperature": 2.0, "top_p": 0.9}, FixedLength(2)),
    "top-k, confidence stop": ({"temperature": 2.5, "top_k": 6}, ConfidenceStop(3, threshold=0.3)),
    "presence and frequency penalty, ragged": (
        {"temperature": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}, RaggedLength(2, seed=0),
    ),
    "temperature, companion": ({"temperature": 2.5}, companion_length()),
}


@functools.cache
def speculator_of() -> SelfSpeculator:
    model = tiny_model("llama", num_layers=2, hidden_size=16, vocab_size=VOCAB_SIZE, dtype=torch.float32, seed=1)
    speculator = SelfSpeculator(model, None, drafter=small_config())
    speculator.drafter = random_drafter(speculator.split, seed=3, scale=0.2)
    return speculator


def warped(logits_V: Tensor, options: dict, generated: set[int]) -> Tensor:
    """The distribution of the next token, by the book and token by token."""
    logits = logits_V.double().clone()
    for token in generated:
        logits[token] -= options.get("presence_penalty", 0.0) + options.get("frequency_penalty", 0.0)
    logits /= options["temperature"]
    order = logits.argsort(descending=True)
    kept = order[: options.get("top_k") or VOCAB_SIZE]
    probs = logits[kept].softmax(0)
    num_kept = int((probs.cumsum(0) - probs < options.get("top_p", 1.0)).sum())
    result = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    result[kept[:num_kept]] = logits[kept[:num_kept]].softmax(0)
    return result


@torch.no_grad()
def law_of_pairs(options: dict) -> Tensor:
    """[V, V]: the probability of the first two tokens, from the model's own forward pass."""
    model = speculator_of().model
    first = warped(model(torch.tensor([PROMPT])).logits[0, -1], options, set())
    ids = torch.tensor([[*PROMPT, token] for token in range(VOCAB_SIZE)])
    logits = model(ids).logits[:, -1]
    second = [warped(logits[token], options, {token}) for token in range(VOCAB_SIZE)]
    return first[:, None] * torch.stack(second)


def sampled_pairs(options: dict, policy: LengthPolicy, *, num_samples: int = NUM_SAMPLES) -> tuple[Tensor, int, int]:
    """[V, V] counts of the first two tokens over many seeds, and how many tokens were drafted and accepted."""
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.int64)
    # As many as a round of this rule may give: near the end of a text rounds draft no more than it can keep.
    num_tokens = max(policy.buckets) + 1
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, seed=12345, **options)
    results = speculator_of().generate(
        [PROMPT] * num_samples, params, batch_size=BATCH_SIZE, policy=policy, keep_transitions=False
    )
    num_drafted = num_accepted = 0
    for result in results:
        counts[tuple(result.token_ids[:2])] += 1
        num_drafted += result.stats.num_drafted
        num_accepted += result.stats.num_accepted
    return counts, num_drafted, num_accepted


def p_value(counts: Tensor, law: Tensor) -> float:
    """Pearson's chi-square; a token of probability zero that was drawn gives 0."""
    counts, expected = counts.flatten().double(), law.flatten() * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0
    is_large = expected >= SMALLEST_EXPECTED
    pooled = [torch.cat([t[is_large], t[~is_large].sum()[None]]) for t in (counts, expected)]
    observed, wanted = (t[pooled[1] > 0] for t in pooled)
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    return float(stats.chi2.sf(statistic, df=len(wanted) - 1))


def rejected(p_values: dict[str, float]) -> list[str]:
    """Holm: the hypotheses that fall at family-wise odds FAMILY_WISE."""
    falling = []
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[name] > FAMILY_WISE / (len(p_values) - rank):
            break
        falling.append(name)
    return falling


def test_first_tokens_and_pairs_follow_the_verifiers_law_under_a_random_drafter():
    """Catches drafter probabilities before the temperature, residuals that are not normalised, a bonus token from the
    draft, draws used twice, penalties per block, rows that share draws."""
    p_values = {}
    for name, (options, policy) in CONFIGS.items():
        counts, num_drafted, num_accepted = sampled_pairs(options, policy)
        assert 0 < num_accepted < num_drafted
        law = law_of_pairs(options)
        p_values |= {f"{name}: first": p_value(counts.sum(1), law.sum(1)), f"{name}: pair": p_value(counts, law)}
    assert not rejected(p_values), p_values


def test_the_same_measurement_finds_a_rule_that_accepts_a_little_too_often(monkeypatch):
    """Negative control: a test of the law that cannot fail would prove nothing."""

    def lenient(*args: Tensor | None) -> Verdict:
        *others, accept_uniform_BT, recover_uniform_B, waived_BT = args
        return verify_by_rejection(*others, accept_uniform_BT * 0.8, recover_uniform_B, waived_BT)

    monkeypatch.setattr("dvi.decode.round.verify_by_rejection", lenient)
    options, policy = CONFIGS["temperature"]
    counts, _, _ = sampled_pairs(options, policy)
    law = law_of_pairs(options)
    assert rejected({"first": p_value(counts.sum(1), law.sum(1)), "pair": p_value(counts, law)})


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5])
def test_gumbel_coupling_gives_the_tokens_of_plain_seeded_decoding_whatever_drafts(temperature):
    """Level 4: noise keyed by anything but seed, absolute position and token would show in one of these."""
    model = tiny_model("llama", num_layers=2, hidden_size=16, dtype=torch.float64, seed=2)
    speculator = SelfSpeculator(model, None, drafter=small_config())
    prompts = [[5, 9, 33], [7], [1, 2, 3, 4], [60, 60]]
    shared = SamplingParams(temperature=temperature, coupling="gumbel", max_new_tokens=12, ignore_eos=True, seed=77)
    params = [dataclasses.replace(shared, seed=77 + i, top_p=1.0 - 0.1 * (i % 2)) for i in range(4)]

    def tokens(policy: LengthPolicy, batch_size: int) -> dict[int, list[int]]:
        results = list(speculator.generate(prompts, params, policy=policy, batch_size=batch_size))
        totals.extend((r.stats.num_drafted, r.stats.num_accepted) for r in results)
        return {result.index: result.token_ids for result in results}

    totals: list[tuple[int, int]] = []
    plain = tokens(PLAIN, 1)
    for drafter in (
        random_drafter(speculator.split, seed=1, scale=0.05), random_drafter(speculator.split, "lora_head", seed=2),
        random_drafter(speculator.split, seed=3, draft_vocab_size=30), broken_drafter(speculator.split, torch.nan),
    ):  # fmt: skip
        speculator.drafter = drafter
        policies = (FixedLength(1), 4), (FixedLength(5), 2), (RaggedLength(4, seed=0), 3), (companion_length(), 4)
        for policy, batch_size in policies:
            assert tokens(policy, batch_size) == plain
    drafted, accepted = (sum(column) for column in zip(*totals, strict=True))
    assert 0 < accepted < drafted
