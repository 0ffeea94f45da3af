"""The law of one round, measured exactly: no sampling noise, no trust in the code's own probabilities.

A verify rule is a black box from uniforms to a verdict. For every drafted path, its acceptance thresholds and the
cumulative law of its next token are found by bisection over the uniforms, so what is compared is the law that the rule
really has. The round's output, continued by plain target steps to a fixed horizon, must have the target's law; by
induction over rounds, so must the whole text. Everything is float64 and goes through the real `warp`, the real seen
tokens, the real length policies and the real verification.
"""
# N instances (a random draft table and target table each), P = V**T drafted paths, R = N * P rows.

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dvi.decode.sampling import SamplingBatch, Seen, SeenTokens, sample_from
from dvi.decode.verification import VerifyRule, acceptance_probs, count_leading, residual_probs, verify_by_rejection
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companions import agreement, token_ratio
from dvi.draft.length_policies import (
    ConfidenceStop,
    CostTable,
    DraftContext,
    FixedLength,
    GoodputLength,
    RoundInfo,
    RoundOutcome,
)
from dvi.records import SamplingParams, Verdict

TOLERANCE = 1e-12
BISECTIONS = 56  # thresholds to 2**-56, far below the tolerance
BELOW_ONE = 1 - 2.0**-53

# (context, token_R) -> bool_R. Only planted rules look at the token drawn at that depth.
Keep = Callable[[DraftContext, Tensor], Tensor]
Verify = Callable[..., Verdict]  # arguments as of `verify_by_rejection`


@dataclass
class Instances:
    """Random context-dependent models. *_logits[d]: [N, V**d, V], logits after each drafted prefix of d tokens.

    companion_logits: of a third model, whose S and A the length rules are told of; empty where there is none.
    prompt_NV, generated_NV: bool and int, what the prompt holds and how often the answer so far does.
    """

    params: list[SamplingParams]
    prompt_NV: Tensor
    generated_NV: Tensor
    draft_logits: list[Tensor]
    target_logits: list[Tensor]
    companion_logits: list[Tensor] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return self.prompt_NV.shape[1]


def random_instances(params: list[SamplingParams], *, vocab_size: int, num_draft_tokens: int, seed: int) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    num = len(params)

    def logits(depth: int) -> Tensor:
        scale = torch.rand(num, 1, 1, generator=generator, dtype=torch.float64) * 4
        return scale * torch.randn(num, vocab_size**depth, vocab_size, generator=generator, dtype=torch.float64)

    return Instances(
        params=params,
        prompt_NV=torch.rand(num, vocab_size, generator=generator) < 0.5,
        generated_NV=torch.randint(0, 3, (num, vocab_size), generator=torch.Generator().manual_seed(1000 + seed)),
        draft_logits=[logits(depth) for depth in range(num_draft_tokens)],
        target_logits=[logits(depth) for depth in range(num_draft_tokens + 1)],
        companion_logits=[logits(depth) for depth in range(num_draft_tokens)],
    )


def all_params() -> list[SamplingParams]:
    """Every combination of two to four values of each setting, 864 in all, greedy included."""
    choices = {
        "temperature": (0.0, 0.5, 1.0, 1.7),
        "top_k": (0, 1, 2),
        "top_p": (1.0, 0.9, 0.5),
        "min_p": (0.0, 0.1, 0.5),
        "repetition_penalty": (1.0, 1.4),
        "presence_penalty": (0.0, 0.6),
        "frequency_penalty": (0.0, 0.4),
    }
    return [
        SamplingParams(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())
    ]


def digits(num_tokens: int, vocab_size: int) -> Tensor:
    """Every sequence of num_tokens ids, [V**num_tokens, num_tokens], in lexicographic order."""
    sequences = list(itertools.product(range(vocab_size), repeat=num_tokens))
    return torch.tensor(sequences, dtype=torch.int64).reshape(vocab_size**num_tokens, num_tokens)


def target_law(instances: Instances, horizon: int) -> tuple[Tensor, list[Tensor]]:
    """The law of the next `horizon` tokens under the target alone, [N, V**horizon], and its factors by depth.

    Tokens already seen are worked out here from the prefix itself, not by `SeenTokens`.
    """
    vocab_size = instances.vocab_size
    batch = SamplingBatch(instances.params, vocab_size=vocab_size, device="cpu")
    law, factors = torch.ones(len(instances.params), 1, dtype=torch.float64), []
    for depth in range(horizon):
        in_prefix = torch.nn.functional.one_hot(digits(depth, vocab_size), vocab_size).sum(1)
        times_generated = instances.generated_NV[:, None] + in_prefix
        seen = Seen(instances.prompt_NV[:, None] | (times_generated > 0), times_generated)
        factors.append(batch.warp(instances.target_logits[depth], seen))
        law = (law[..., None] * factors[-1]).flatten(1)
    return law, factors


def measured_law(
    instances: Instances, *, num_draft_tokens: int, keep: Keep, verify: Verify, tells_drawn: bool = False,
    rule: VerifyRule | None = None,
) -> Tensor:
    """The law of T + 1 emitted tokens, [N, V**(T+1)]: one speculative round, then plain target steps.

    tells_drawn: the length rule is told A of the token drawn at its own depth, too, which no engine may under sampling.
    rule: waives for `verify`; None waives nothing.
    """
    num, vocab_size, depths = len(instances.params), instances.vocab_size, num_draft_tokens
    paths_PT = digits(depths, vocab_size)
    num_paths = len(paths_PT)
    ids_RT = paths_PT.repeat(num, 1)
    batch = SamplingBatch([p for p in instances.params for _ in range(num_paths)], vocab_size=vocab_size, device="cpu")
    seen = SeenTokens(num * num_paths, vocab_size, "cpu")
    every_id = torch.arange(vocab_size).expand(num * num_paths, vocab_size)
    seen.add_prompt(every_id, instances.prompt_NV.repeat_interleave(num_paths, 0))
    for times in (1, 2):
        seen.add_generated(every_id, (instances.generated_NV >= times).repeat_interleave(num_paths, 0))

    def along_paths(tables: list[Tensor], depth: int) -> Tensor:
        prefix_P = torch.arange(num_paths) // vocab_size ** (depths - depth)
        return tables[depth][:, prefix_P].flatten(0, 1)

    # Draft as an engine does: one position at a time, each knowing the tokens before it.
    path_weight_R = torch.ones(num * num_paths, dtype=torch.float64)
    draft_probs, keeps, agreements, token_ratios = [], [], [], []
    is_open_R = torch.ones(num * num_paths, dtype=torch.bool)
    for depth in range(depths):
        logits_RV = along_paths(instances.draft_logits, depth)
        draft_probs.append(batch.warp(logits_RV[:, None], seen.after_drafts(ids_RT[:, :depth]))[:, 0])
        path_weight_R = path_weight_R * draft_probs[-1].gather(1, ids_RT[:, depth, None])[:, 0]
        if instances.companion_logits:
            companion_RV = along_paths(instances.companion_logits, depth)
            agreements.append(agreement(logits_RV, companion_RV))
            token_ratios.append(token_ratio(logits_RV, companion_RV, ids_RT[:, depth]))
        told = list(token_ratios) if tells_drawn else token_ratios[:-1]
        keeps.append(keep(DraftContext(depth, is_open_R, logits_RV, list(agreements), told), ids_RT[:, depth]))
        is_open_R = is_open_R & keeps[-1]
    no_drafts = torch.zeros(num * num_paths, 0, vocab_size, dtype=torch.float64)
    draft_probs_RTV = torch.stack(draft_probs, 1) if depths else no_drafts
    num_drafted_R = count_leading(torch.stack(keeps, 1)) if depths else torch.zeros(num * num_paths, dtype=torch.int64)
    target_logits_RUV = torch.stack([along_paths(instances.target_logits, d) for d in range(depths + 1)], 1)
    seen_before = seen.with_drafts(ids_RT)
    target_probs_RUV = batch.warp(target_logits_RUV, seen_before)

    # Paths that the drafter cannot draw have no verdict to measure.
    live = path_weight_R > 0
    if rule is not None:
        waived_RT = rule.waives(ids_RT, batch.warp_logits(target_logits_RUV, seen_before)[:, :-1])
        verify = functools.partial(verify, waived_BT=waived_RT[live])
    inputs = [x[live] for x in (ids_RT, num_drafted_R, draft_probs_RTV, target_probs_RUV)]
    branch_laws_LUV = torch.zeros(len(live), depths + 1, vocab_size, dtype=torch.float64)
    branch_laws_LUV[live] = measure_verdicts(verify, *inputs)
    weighted_NPUV = (path_weight_R[:, None, None] * branch_laws_LUV).view(num, num_paths, depths + 1, vocab_size)

    _, factors = target_law(instances, depths + 1)
    law = torch.zeros(num, vocab_size ** (depths + 1), dtype=torch.float64)
    for accepted in range(depths + 1):
        # Sum over what was drafted after the branch, then let the target finish alone.
        emitted = weighted_NPUV[:, :, accepted].reshape(num, vocab_size**accepted, -1, vocab_size).sum(2).flatten(1)
        for depth in range(accepted + 1, depths + 1):
            emitted = (emitted[..., None] * factors[depth]).flatten(1)
        law += emitted
    return law


def measure_verdicts(verify: Verify, ids_RT, num_drafted_R, draft_probs_RTV, target_probs_RUV) -> Tensor:
    """P(exactly j drafts accepted, then token v) as the verdicts really fall, [R, U, V], by bisection over uniforms."""
    num_rows, depths = ids_RT.shape
    vocab_size = target_probs_RUV.shape[-1]

    def judge(accept_RT: Tensor, recover_R: Tensor) -> Verdict:
        return verify(ids_RT, num_drafted_R, draft_probs_RTV, target_probs_RUV, accept_RT, recover_R)

    zeros_R = torch.zeros(num_rows, dtype=torch.float64)
    all_accept_RT = torch.zeros(num_rows, depths, dtype=torch.float64)
    reach_R = torch.ones(num_rows, dtype=torch.float64)
    law_RUV = torch.zeros(num_rows, depths + 1, vocab_size, dtype=torch.float64)
    for accepted in range(depths + 1):
        is_last_R = num_drafted_R == accepted
        branch_RT = all_accept_RT.clone()
        branch_RT[:, accepted:] = BELOW_ONE
        if accepted < depths:

            def goes_on(uniform_R: Tensor, depth: int = accepted) -> Tensor:
                accept_RT = all_accept_RT.clone()
                accept_RT[:, depth] = uniform_R
                return judge(accept_RT, zeros_R).num_accepted_B > depth

            accept_R = torch.where(is_last_R, 0.0, bisect_threshold(goes_on, num_rows))
        else:
            accept_R = zeros_R
        weight_R = torch.where(accepted <= num_drafted_R, reach_R * (1 - accept_R), 0.0)
        lands_R = judge(branch_RT, zeros_R).num_accepted_B == accepted
        assert (lands_R | (weight_R < 2.0**-50)).all(), "a uniform just below 1 must reject where rejection is possible"
        cumulative = [
            bisect_threshold(lambda u, v=v, b=branch_RT: judge(b, u).next_token_B <= v, num_rows)
            for v in range(vocab_size - 1)
        ]
        cumulative_RV = torch.stack([zeros_R, *cumulative, zeros_R + 1], 1)
        law_RUV[:, accepted] = torch.where(lands_R, weight_R, 0.0)[:, None] * cumulative_RV.diff(dim=1)
        reach_R = reach_R * accept_R
    return law_RUV


def bisect_threshold(predicate: Callable[[Tensor], Tensor], num_rows: int) -> Tensor:
    """The measure of {u: predicate(u)} for predicates that hold on an interval from 0."""
    low, high = torch.zeros(num_rows, dtype=torch.float64), torch.ones(num_rows, dtype=torch.float64)
    at_zero, near_one = predicate(low), predicate(low + BELOW_ONE)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        holds = predicate(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return torch.where(near_one, 1.0, torch.where(at_zero, high, 0.0))


def law_error(
    instances: Instances, *, num_draft_tokens: int, keep: Keep | None = None, verify: Verify = verify_by_rejection,
    tells_drawn: bool = False,
) -> float:
    """The largest absolute difference between what a round emits and the target's law. NaN counts as infinite."""
    measured = measured_law(
        instances, num_draft_tokens=num_draft_tokens, keep=keep or always, verify=verify, tells_drawn=tells_drawn
    )
    expected, _ = target_law(instances, num_draft_tokens + 1)
    assert torch.allclose(expected.sum(1), torch.ones(len(expected), dtype=torch.float64), atol=TOLERANCE)
    return (measured - expected).abs().nan_to_num(nan=math.inf).max().item()


def always(context: DraftContext, token_R: Tensor) -> Tensor:
    return torch.ones_like(token_R, dtype=torch.bool)


def honest(policy) -> Keep:
    return lambda context, token_R: policy.keep(context)


SAMPLED = [SamplingParams(temperature=1.0)] * 60


# --- the law holds ----------------------------------------------------------------------------------------------------


def test_every_combination_of_settings_leaves_the_target_law():
    """Catches warping that differs between the two sides, penalties per block, filters after instead of before."""
    instances = random_instances(all_params() * 2, vocab_size=3, num_draft_tokens=2, seed=1)
    assert law_error(instances, num_draft_tokens=2) <= TOLERANCE


@pytest.mark.parametrize("vocab_size, num_draft_tokens", [(2, 3), (3, 2), (5, 1)])
def test_a_thousand_random_pairs_leave_the_target_law(vocab_size, num_draft_tokens):
    """Catches any slip in acceptance, residual or bonus that only some pairs of distributions show."""
    params = [SamplingParams(temperature=1.0)] * 1000
    instances = random_instances(params, vocab_size=vocab_size, num_draft_tokens=num_draft_tokens, seed=2)
    assert law_error(instances, num_draft_tokens=num_draft_tokens) <= TOLERANCE


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 3])
def test_every_draft_length_leaves_the_target_law(num_draft_tokens):
    """Catches off-by-one rows: the bonus from the wrong column, a shape that T = 0 breaks."""
    instances = random_instances(SAMPLED[:20], vocab_size=4, num_draft_tokens=num_draft_tokens, seed=3)
    keep = honest(FixedLength(num_draft_tokens))
    assert law_error(instances, num_draft_tokens=num_draft_tokens, keep=keep) <= TOLERANCE


def test_five_tokens_and_three_drafts_leave_the_target_law():
    """The largest case: catches what needs depth and width together."""
    instances = random_instances(SAMPLED[:10], vocab_size=5, num_draft_tokens=3, seed=4)
    assert law_error(instances, num_draft_tokens=3) <= TOLERANCE


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8])
def test_confidence_stop_leaves_the_target_law(threshold):
    """Catches a bonus taken from column T when fewer than T positions were drafted."""
    instances = random_instances(SAMPLED, vocab_size=3, num_draft_tokens=3, seed=5)
    keep = honest(ConfidenceStop(3, threshold=threshold))
    assert law_error(instances, num_draft_tokens=3, keep=keep) <= TOLERANCE


@pytest.mark.parametrize("history, expected_length", [((3, 3), 3), ((3, 0), 0), ((3, 1), 1)])
def test_goodput_length_leaves_the_target_law(history, expected_length):
    """Catches a controller whose lengths are not those it announced; history: (drafted, accepted) of earlier rounds."""
    policy = GoodputLength((1, 2, 3), CostTable(draft_step_s={1: 0.28}, verify_s={1: 1.0, 4: 1.0}), probe_share=0.0)
    for _ in range(200):
        policy.choose(RoundInfo(num_rows=1))
        policy.observe(RoundOutcome([history[0]], [history[1]]))
    length = policy.choose(RoundInfo(num_rows=1))
    assert length == expected_length
    instances = random_instances(SAMPLED[:20], vocab_size=3, num_draft_tokens=length, seed=6)
    assert law_error(instances, num_draft_tokens=length, keep=honest(policy)) <= TOLERANCE


def companion_length(
    num_draft_tokens: int, *, num_rows: int, can_pack: bool, seed: int = 0, samples: list | None = None
) -> CompanionLength:
    """The rule after thousands of samples, by default random ones that S and A told much of, about to draft.

    A position costs 0.2 to 0.4 tokens, so that thresholds lie amid the S of random models, and each more than the last:
    rows compete.
    """
    verify_s = {n: 1 + 0.03 * (n / num_rows) ** 1.5 for n in range(1, num_rows * (num_draft_tokens + 1) + 1)}
    costs = CostTable(draft_step_s={1: 0.02, 60: 0.02}, verify_s=verify_s)
    policy = CompanionLength((num_draft_tokens,), costs, None, can_pack=can_pack, probe_share=0.0, prior_acceptance=0.9)
    rng = random.Random(seed)
    if samples is None:
        pairs = [(rng.random(), rng.random()) for _ in range(3000)]
        samples = [(s, a, rng.random() < math.sqrt(s * a)) for s, a in pairs]
    policy.estimate.observe(samples)
    assert policy.choose(RoundInfo(num_rows)) == num_draft_tokens
    return policy


class InBatch:
    """A policy that decides for each row as the first of a batch of its own, beside M mates of fixed S and A."""

    def __init__(self, policy: CompanionLength, mates_TM2: Tensor) -> None:
        self._policy, self._mates_TM2 = policy, mates_TM2
        self._contexts: list[DraftContext] = []
        self.kept: list[Tensor] = []

    def __call__(self, context: DraftContext, token_R: Tensor) -> Tensor:
        if context.depth == 0:
            self._contexts, self.kept = [], []
        self._contexts.append(context)
        # The rule keeps what a round has brought so far to itself, so each row's round is played again from its start.
        self.kept.append(torch.tensor([self._decide(row) for row in range(len(token_R))]))
        return self.kept[-1]

    def _decide(self, row: int) -> bool:
        for context in self._contexts:
            agreements, token_ratios = (
                [torch.cat([x[row, None], self._mates_TM2[d, :, i]]) for d, x in enumerate(told)]
                for i, told in enumerate((context.agreements, context.token_ratios))
            )
            is_open_B = torch.ones(len(agreements[0]), dtype=torch.bool)
            decided = self._policy.keep(
                dataclasses.replace(context, is_open_B=is_open_B, agreements=agreements, token_ratios=token_ratios)
            )
        return bool(decided[0])

    def lengths(self) -> Tensor:
        return count_leading(torch.stack(self.kept, 1))


def random_mates(num_mates: int, *, seed: int) -> Tensor:
    return torch.rand(3, num_mates, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_mates, can_pack", [(0, True), (1, True), (4, True), (1, False)])
@pytest.mark.parametrize("vocab_size, num_draft_tokens", [(3, 2), (2, 3)])
def test_a_companions_length_leaves_the_target_law(vocab_size, num_draft_tokens, can_pack, num_mates):
    """Alone and beside batch mates that it is weighed against. Catches A of a token that steers its own position, S of
    later ones, and a rule that would pass here only because it never stops, or always."""
    instances = random_instances(SAMPLED[:30], vocab_size=vocab_size, num_draft_tokens=num_draft_tokens, seed=11)
    policy = companion_length(num_draft_tokens, num_rows=1 + num_mates, can_pack=can_pack)
    keep = InBatch(policy, random_mates(num_mates, seed=num_mates))
    assert law_error(instances, num_draft_tokens=num_draft_tokens, keep=keep) <= TOLERANCE
    assert len(keep.lengths().unique()) >= (3 if can_pack else 2)


def test_the_joint_law_of_a_batch_that_shares_its_positions_is_that_of_two_targets():
    """Two rows that are weighed against each other, every pair of their paths: what one emits must tell nothing of the
    other. Catches a rule lawful for each row alone that makes their texts depend on each other."""
    vocab_size, depths, num = 3, 2, 2
    instances = random_instances(SAMPLED[:num], vocab_size=vocab_size, num_draft_tokens=depths, seed=17)
    paths_PT = digits(depths, vocab_size)
    policy, seen = companion_length(depths, num_rows=num, can_pack=True), [[], []]
    weights, emitted = zip(*(law_by_path(instances, n) for n in range(num)), strict=True)
    companion_scores = [[companion_scores_of(instances, n, path_T) for path_T in paths_PT] for n in range(num)]
    joint = torch.zeros(vocab_size ** (depths + 1), vocab_size ** (depths + 1), dtype=torch.float64)
    for one, other in itertools.product(range(len(paths_PT)), repeat=2):
        lengths = decided_lengths(policy, [companion_scores[0][one], companion_scores[1][other]])
        for places, length in zip(seen, lengths, strict=True):
            places.append(length)
        weight = weights[0][one] * weights[1][other]
        joint += weight * torch.outer(emitted[0][lengths[0]][one], emitted[1][lengths[1]][other])
    expected, _ = target_law(instances, depths + 1)
    assert (joint - torch.outer(*expected)).abs().max() <= TOLERANCE
    by_pair = torch.tensor(seen).view(num, len(paths_PT), len(paths_PT))
    # Not vacuous: either row's draft has changed the other's length.
    assert (by_pair[0] != by_pair[0, :, :1]).any() and (by_pair[1] != by_pair[1, :1]).any()


def law_by_path(instances: Instances, n: int) -> tuple[Tensor, list[Tensor]]:
    """Of instance n: the probability [P] of each drafted path, and for each num_drafted the law of T + 1 emitted tokens
    given the path, [P, V**(T+1)]; token by token, as slowly as it gets."""
    vocab_size, depths = instances.vocab_size, len(instances.draft_logits)
    paths_PT = digits(depths, vocab_size)
    _, factors = target_law(instances, depths + 1)
    place = [paths_PT @ torch.tensor([vocab_size ** max(d - 1 - i, 0) * (i < d) for i in range(depths)])
             for d in range(depths + 1)]  # fmt: skip
    draft_PTV = torch.stack([instances.draft_logits[d][n].softmax(-1)[place[d]] for d in range(depths)], 1)
    target_PUV = torch.stack([factors[d][n][place[d]] for d in range(depths + 1)], 1)
    weight_P = draft_PTV.gather(-1, paths_PT[..., None])[..., 0].prod(1)
    laws = []
    for num_drafted in range(depths + 1):
        num_drafted_P = torch.full((len(paths_PT),), num_drafted)
        law_PUV = measure_verdicts(verify_by_rejection, paths_PT, num_drafted_P, draft_PTV, target_PUV)
        law = torch.zeros(len(paths_PT), vocab_size ** (depths + 1), dtype=torch.float64)
        for p, text in itertools.product(range(len(paths_PT)), itertools.product(range(vocab_size), repeat=depths + 1)):
            index = int("".join(map(str, text)), vocab_size)
            for accepted in range(depths + 1):
                if list(text[:accepted]) == paths_PT[p, :accepted].tolist():
                    chance = law_PUV[p, accepted, text[accepted]]
                    for d in range(accepted + 1, depths + 1):
                        chance = chance * factors[d][n][int("".join(map(str, text[:d])), vocab_size), text[d]]
                    law[p, index] += chance
        laws.append(law)
    return weight_P, laws


def companion_scores_of(instances: Instances, n: int, path_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    """S and A [1] at each depth of one drafted path."""
    prefix, companion_scores = 0, []
    for depth, token in enumerate(path_T.tolist()):
        draft, companion = (x[depth][n, prefix, None] for x in (instances.draft_logits, instances.companion_logits))
        companion_scores.append((agreement(draft, companion), token_ratio(draft, companion, path_T[depth, None])))
        prefix = prefix * instances.vocab_size + token
    return companion_scores


def decided_lengths(policy: CompanionLength, rows: list[list[tuple[Tensor, Tensor]]]) -> list[int]:
    """num_drafted of each row of a batch with these S and A."""
    depths, is_open_B = len(rows[0]), torch.ones(len(rows), dtype=torch.bool)
    by_depth = [[torch.cat(column) for column in zip(*at, strict=True)] for at in zip(*rows, strict=True)]
    kept = []
    for depth in range(depths):
        agreements, told = [s for s, _ in by_depth[: depth + 1]], [a for _, a in by_depth[:depth]]
        is_open_B = is_open_B & policy.keep(DraftContext(depth, is_open_B, torch.zeros(len(rows), 1), agreements, told))
        kept.append(is_open_B)
    return torch.stack(kept, 1).sum(1).tolist()


A, B, Z = 1.0, 2.0, -math.inf
DEGENERATE = {
    "draft equals target": ((A, B, 0.5), (A, B, 0.5)),
    "one-hot draft": ((Z, A, Z), (A, B, 0.5)),
    "one-hot target": ((A, B, 0.5), (Z, A, Z)),
    "both one-hot, the same": ((Z, A, Z), (Z, A, Z)),
    "both one-hot, different": ((A, Z, Z), (Z, A, Z)),
    "draft lacks what the target has": ((A, Z, 0.5), (A, B, 0.5)),
    "target lacks what the draft has": ((A, B, 0.5), (A, Z, 0.5)),
    "disjoint": ((A, Z, Z), (Z, B, 0.5)),
    "all but equal": ((A, B, 0.5), (A, B, 0.5 + 1e-15)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_pairs_leave_the_target_law(name):
    """Catches 0/0 in the residual, an acceptance ratio that divides by zero and a kept token the target excludes."""
    draft, target = (torch.tensor(row, dtype=torch.float64) for row in DEGENERATE[name])
    instances = Instances(
        params=[SamplingParams(temperature=1.0)],
        prompt_NV=torch.zeros(1, 3, dtype=torch.bool),
        generated_NV=torch.zeros(1, 3, dtype=torch.int64),
        draft_logits=[draft.expand(1, 3**depth, 3) for depth in range(2)],
        target_logits=[target.expand(1, 3**depth, 3) for depth in range(3)],
    )
    assert law_error(instances, num_draft_tokens=2) <= TOLERANCE


def test_acceptance_and_residual_functions_tell_the_law_the_rule_has():
    """Catches published probabilities (used for statistics and by other rules) that drift from the real verdict."""
    generator = torch.Generator().manual_seed(7)
    draft, target = (torch.randn(2, 400, 4, generator=generator, dtype=torch.float64) * 2).softmax(-1)
    ids_RT = torch.randint(0, 4, (400, 1), generator=generator)
    draft_RTV, target_RUV = draft[:, None], target[:, None].expand(-1, 2, -1)
    law_RUV = measure_verdicts(verify_by_rejection, ids_RT, torch.ones(400, dtype=torch.int64), draft_RTV, target_RUV)
    accept_R = acceptance_probs(ids_RT, draft_RTV, target_RUV)[:, 0]
    expected_RV = (1 - accept_R)[:, None] * residual_probs(draft, target)
    assert (law_RUV[:, 0] - expected_RV).abs().max() <= TOLERANCE
    assert (law_RUV[:, 1] - accept_R[:, None] * target).abs().max() <= TOLERANCE


# --- the check can fail -----------------------------------------------------------------------------------------------


def test_a_length_rule_that_peeks_at_the_token_is_caught():
    """Verifying a position only if its own token suits us is biased; so the check above must notice it."""
    instances = random_instances(SAMPLED, vocab_size=3, num_draft_tokens=2, seed=8)
    assert law_error(instances, num_draft_tokens=2, keep=lambda context, token: token != 0) > 1e-3


def test_a_length_rule_that_peeks_at_the_probability_of_the_token_is_caught():
    """The tempting form: stop when the *drawn token's* probability is low, instead of the distribution's maximum."""
    instances = random_instances(SAMPLED, vocab_size=3, num_draft_tokens=1, seed=9)
    draft_NV = instances.draft_logits[0][:, 0].softmax(-1)

    def keep(context: DraftContext, token_R: Tensor) -> Tensor:
        return draft_NV.repeat_interleave(3, 0).gather(1, token_R[:, None])[:, 0] >= 0.4

    assert law_error(instances, num_draft_tokens=1, keep=keep) > 1e-3


@pytest.mark.parametrize("num_mates", [0, 4])
def test_a_companions_length_that_is_told_of_the_token_drawn_is_caught(num_mates):
    """The very rule that passes above, told A_i when it decides about position i: in greedy rounds alone it may be."""
    instances = random_instances(SAMPLED[:30], vocab_size=3, num_draft_tokens=2, seed=11)
    keep = InBatch(companion_length(2, num_rows=1 + num_mates, can_pack=True), random_mates(num_mates, seed=num_mates))
    assert law_error(instances, num_draft_tokens=2, keep=keep, tells_drawn=True) > 1e-3


def test_a_length_chosen_after_drafting_is_caught():
    """The argmax of E[N | gamma] / latency over all gamma, by S alone, once everything is drafted: no A, no token, and
    still S of the second position tells which token was drawn at the first. Where goodput has one hump, that argmax is
    where it first drops, and lawful; here a second position comes nearly free once there is a first."""
    depths, vocab_size = 2, 3
    instances = random_instances(SAMPLED, vocab_size=vocab_size, num_draft_tokens=depths, seed=13)
    scores = [companion_scores_of(instances, n, path_T) for n in range(60) for path_T in digits(depths, vocab_size)]
    s_RT = torch.tensor([[float(s) for s, _ in along] for along in scores])
    tokens_RU = torch.cat([torch.ones(len(s_RT), 1), 1 + s_RT.cumprod(1).cumsum(1)], 1)
    gamma_R = (tokens_RU / torch.tensor([1.0, 1.5, 1.6])).argmax(1)
    assert len(gamma_R.unique()) == 3
    assert law_error(instances, num_draft_tokens=depths, keep=lambda context, token_R: context.depth < gamma_R) > 1e-3


class BrokenRule:
    """Rejection sampling with one planted fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def verify(self, ids, num_drafted, draft_probs, target_probs, accept_uniform, recover_uniform) -> Verdict:
        depths, index = ids.shape[1], ids[..., None]
        draft, target = draft_probs.gather(-1, index)[..., 0], target_probs[:, :-1].gather(-1, index)[..., 0]
        accepted = accept_uniform * draft < target
        if self.fault == "acceptance ratio upside down":
            accepted = accept_uniform * target < draft
        num_accepted = count_leading(accepted & (torch.arange(depths) < num_drafted[:, None]))
        rows = torch.arange(len(ids))
        draft_row, target_row = draft_probs[rows, num_accepted.clamp(max=depths - 1)], target_probs[rows, num_accepted]
        residual = residual_probs(draft_row, target_row)
        if self.fault == "recover from the target":
            residual = target_row
        elif self.fault == "recover from |target - draft|":
            residual = (target_row - draft_row).abs()
        bonus = draft_row if self.fault == "bonus from the draft" else target_row
        if self.fault == "bonus from the row before":
            bonus = target_probs[rows, (num_accepted - 1).clamp(min=0)]
        next_probs = torch.where((num_accepted < num_drafted)[:, None], residual, bonus)
        return Verdict(num_accepted, sample_from(next_probs, recover_uniform))


def test_the_faultless_form_of_the_broken_rule_passes():
    """Otherwise the next test would prove nothing."""
    instances = random_instances(SAMPLED, vocab_size=3, num_draft_tokens=2, seed=10)
    assert law_error(instances, num_draft_tokens=2, verify=BrokenRule("none").verify) <= TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        "acceptance ratio upside down",
        "recover from the target",
        "recover from |target - draft|",
        "bonus from the draft",
        "bonus from the row before",
    ],
)
def test_a_planted_fault_in_the_rule_is_caught(fault):
    """The classic wrong samplers; a law check that passes any of them is worthless."""
    instances = random_instances(SAMPLED, vocab_size=3, num_draft_tokens=2, seed=10)
    assert law_error(instances, num_draft_tokens=2, verify=BrokenRule(fault).verify) > 1e-3
