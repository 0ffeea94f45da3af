"""Lossy verify rules: what they waive, by hand and by the book; what law they have; what is told of it and what is not
learnt from it."""
# N instances, V vocabulary, T drafted tokens.

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvi.decode.sampling import SamplingBatch
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.decode.verification import (
    MarginRule,
    StrictRule,
    TypicalRule,
    VerifyRule,
    make_rule,
    verify_by_rejection,
    verify_greedy,
)
from dvi.draft.length_policies import FixedLength
from dvi.records import GenerationResult, SamplingParams, Transitions
from dvi.settings import VerifySettings
from tests.laws.test_lossless_law import TOLERANCE, always, law_error, measured_law, random_instances, target_law
from tests.support.drafter_doubles import MemoryDrafter, plain_text, random_drafter, small_config
from tests.support.exact_doubles import self_check_left_out
from tests.support.tiny_models import tiny_model
from trainers.learning.replay import ReplayBuffer

INF, NAN = math.inf, math.nan
PROMPTS = [[5, 9, 33], [7], [1, 2, 3, 4], [60, 60], [11, 30, 2]]
THETA = 0.6


def waives(rule: VerifyRule, *logits: float) -> list[bool]:
    """Whether each token would be waived at one position with these logits."""
    logits_1V = torch.tensor([logits], dtype=torch.float64)
    return [rule.waives(torch.tensor([[token]]), logits_1V[None]).item() for token in range(len(logits))]


# --- what is waived, by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((10.0, 9.5, 3.0), (True, True, False)),  # 0.95: the two leaders
        ((3.0, 10.0, 9.5), (False, True, True)),
        ((10.0, 9.0, 3.0), (False, False, False)),  # 0.9 exactly is not above it
        ((10.0, 8.0, 3.0), (False, False, False)),
        ((10.0, 9.5, 9.4), (True, True, False)),  # the third is no runner-up, however close
        ((-10.0, -10.5, -30.0), (False, False, False)),  # a ratio of negative logits says nothing
        ((0.0, 0.0, -1.0), (False, False, False)),
        ((1.0, -1.0, -2.0), (False, False, False)),
        ((10.0, 10.0, 3.0), (True, True, False)),  # ties
        ((10.0, 9.5, 9.5), (True, True, True)),  # both are runners-up
        ((10.0, 10.0, 10.0), (True, True, True)),
        ((10.0, -INF, -INF), (False, False, False)),
        ((-INF, -INF, -INF), (False, False, False)),
        ((INF, 10.0, 9.5), (False, False, False)),
        ((10.0, 9.5, NAN), (False, False, False)),
        ((NAN, NAN, NAN), (False, False, False)),
    ],
)
def test_margin_by_hand(logits, expected):
    """Catches a ratio taken of negative logits, the third token let in, ties decided by a sort, NaN and infinity."""
    assert tuple(waives(MarginRule(0.9), *logits)) == expected


def literally_waived(logits: list[float], token: int, theta: float) -> bool:
    """The definition as it is written: the token is one of the two highest, z1 > 0 and z2 / z1 > theta."""
    first, second = sorted(logits, reverse=True)[:2]
    return logits[token] >= second and first > 0 and second / first > theta


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(0.01, 0.99), st.sampled_from([0.25, 1.0, 8.0])
)
def test_margin_is_the_ratio_test_wherever_the_highest_logit_is_positive(logits, theta, scale):
    """Catches a test of another form that drifts from z2 / z1 > theta, and one that a temperature would change."""
    first, second = sorted(logits, reverse=True)[:2]
    assume(first <= 0 or (first > 1e-9 and abs(second / first - theta) > 1e-12))  # rounding decides what is equal
    expected = [literally_waived(logits, token, theta) for token in range(len(logits))]
    assert waives(MarginRule(theta), *(scale * z for z in logits)) == expected


def test_a_theta_just_below_one_waives_nothing_but_ties():
    """Catches a margin that is not relative to theta."""
    generator = torch.Generator().manual_seed(0)
    logits_BTV = 10 * torch.randn(50, 4, 20, generator=generator, dtype=torch.float64)
    drafts_BT = logits_BTV.topk(2).indices[..., 1]
    rule = MarginRule(1 - 1e-15)
    assert not rule.waives(drafts_BT, logits_BTV).any()
    tied_BTV = logits_BTV.scatter(-1, drafts_BT[..., None], logits_BTV.amax(-1, keepdim=True))
    assert torch.equal(rule.waives(drafts_BT, tied_BTV), tied_BTV.amax(-1) > 0)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ((0.5, 0.3, 0.2), (True, True, True)),  # floor min(.3, .09 exp(-1.03)) = .032
        ((0.97, 0.02, 0.01), (True, False, False)),  # floor .09 exp(-.154) = .077
        ((0.92, 0.07, 0.01), (True, True, False)),  # floor .09 exp(-.309) = .066
        ((1.0, 0.0, 0.0), (True, False, False)),  # -inf in the logits: excluded
    ],
)
def test_typical_by_hand(probs, expected):
    """Catches the entropy's sign, bits for nats, and an excluded token let in."""
    assert tuple(waives(TypicalRule(), *(math.log(p) if p else -INF for p in probs))) == expected
    assert waives(TypicalRule(), NAN, 0.0, 1.0) == [False] * 3


def test_typicals_threshold_holds_where_the_distribution_is_sharp():
    """Catches max for min of the two floors."""
    sharp = [math.log(p) for p in (0.6, 0.399, 0.001)]
    assert waives(TypicalRule(threshold=0.3, alpha=1.0), *sharp) == [True, True, False]  # .3 < exp(-.68) = .51
    assert waives(TypicalRule(threshold=0.5, alpha=1.0), *sharp) == [True, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MarginRule(1.0), r"margin_theta must be in \(0, 1\), got 1.0; try 0.9"),
        (lambda: MarginRule(0.0), "margin_theta"),
        (lambda: MarginRule(NAN), "margin_theta"),
        (lambda: TypicalRule(threshold=0.0), "typical_threshold"),
        (lambda: TypicalRule(alpha=1.5), "typical_alpha"),
    ],
)
def test_a_number_out_of_range_is_refused(make, message):
    """Catches a theta of 1 that means strict without saying so."""
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_make_the_rule_that_they_name():
    """Catches numbers that do not arrive, and names by which two rules look the same."""
    margin = make_rule(VerifySettings(rule="margin", margin_theta=0.84))
    typical = make_rule(VerifySettings(rule="typical", typical_threshold=0.2, typical_alpha=0.1))
    strict = make_rule(VerifySettings())
    assert (margin.theta, typical.threshold, typical.alpha) == (0.84, 0.2, 0.1)
    assert [rule.name for rule in (strict, margin, typical)] == ["strict", "margin 0.84", "typical 0.2/0.1"]
    assert [rule.is_lossless for rule in (strict, margin, typical)] == [True, False, False]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_waived_drafts_are_kept_and_counted_up_to_the_first_that_is_refused():
    """Catches waivers counted past the refusal or in undrafted columns, honest ones counted, a wrong next token."""
    target_BU = torch.tensor([7, 8, 9, 5]).expand(4, 4)
    drafts_BT = torch.tensor([[7, 0, 9], [0, 0, 0], [0, 1, 9], [7, 0, 9]])
    waived_BT = torch.tensor([[True, True, True], [True, True, True], [False, True, True], [True, True, True]])
    verdict = verify_greedy(drafts_BT, torch.tensor([3, 2, 3, 1]), target_BU, waived_BT)
    assert verdict.num_accepted_B.tolist() == [3, 2, 0, 1]
    assert verdict.num_waived_B.tolist() == [1, 2, 0, 0]
    assert verdict.next_token_B.tolist() == [5, 9, 7, 8]


def test_a_waived_draft_is_kept_without_its_coin_and_counts_only_where_the_coin_refused():
    """Catches a coin that still decides, and an acceptance that was honest taken for a waiver."""
    draft_BTV = torch.tensor([[[1.0, 0.0]]]).double().expand(2, 1, 2)
    target_BUV = torch.tensor([[[0.25, 0.75], [0.0, 1.0]]]).double().expand(2, 2, 2)
    arguments = (torch.tensor([[0], [0]]), torch.tensor([1, 1]), draft_BTV, target_BUV)
    coins = torch.tensor([[0.2], [0.9]]).double(), torch.zeros(2).double()
    strict = verify_by_rejection(*arguments, *coins)
    lossy = verify_by_rejection(*arguments, *coins, torch.ones(2, 1, dtype=torch.bool))
    assert strict.num_accepted_B.tolist() == [1, 0] and strict.num_waived_B is None
    assert lossy.num_accepted_B.tolist() == [1, 1] and lossy.num_waived_B.tolist() == [0, 1]
    assert lossy.next_token_B.tolist() == [1, 1]


def test_a_token_that_a_filter_excludes_is_never_waived():
    """Catches a rule that looks at logits before the filters: top-k 1, min-p and top-p leave no runner-up here."""
    logits_BQV = torch.tensor([[[10.0, 9.5, 9.4]]]).expand(4, 1, 3)
    params = [SamplingParams(temperature=2.0), SamplingParams(temperature=2.0, top_k=1),
              SamplingParams(temperature=2.0, min_p=0.9), SamplingParams(temperature=2.0, top_p=0.3)]  # fmt: skip
    warped_BQV = SamplingBatch(params, vocab_size=3, device="cpu").warp_logits(logits_BQV)
    for rule in (MarginRule(0.5), TypicalRule(alpha=0.01)):
        assert rule.waives(torch.ones(4, 1, dtype=torch.int64), warped_BQV).flatten().tolist() == [True] + [False] * 3


# --- the law, by enumeration ------------------------------------------------------------------------------------------

NUM_DRAFTS = 2
LAWFUL = [SamplingParams(temperature=t) for t in (0.5, 1.0, 1.7)] * 20


def waivable(instances, rule: VerifyRule) -> list[Tensor]:
    """W: at each depth and after each prefix the tokens that the rule would waive, bool [N, V**d, V]."""
    batch = SamplingBatch(instances.params, vocab_size=instances.vocab_size, device="cpu")
    tables = []
    for depth in range(NUM_DRAFTS):
        logits_NPV = batch.warp_logits(instances.target_logits[depth])
        columns = [
            rule.waives(torch.full(logits_NPV.shape[:2], token), logits_NPV) for token in range(instances.vocab_size)
        ]
        tables.append(torch.stack(columns, -1))
    return tables


def law_by_hand(instances, rule: VerifyRule) -> Tensor:
    """The law of a margin round's T + 1 tokens, worked out on paper, [N, V**(T+1)].

    At a position with draft law q, target law p and waivable tokens W a draft a is kept with probability 1 in W, else
    min(1, p / q); what is refused is replaced by the residual r, the normalised (p - q)+. So the token there follows

        m = p + sum over w in W of (q(w) - p(w))+ (one-hot of w - r)

    and as long as drafts are kept the next position follows such an m too; after a replacement, and after T drafts,
    the target alone.
    """
    vocab_size = instances.vocab_size
    batch = SamplingBatch(instances.params, vocab_size=vocab_size, device="cpu")
    _, target = target_law(instances, NUM_DRAFTS + 1)
    reach = torch.ones(len(instances.params), 1, dtype=torch.float64)  # that this prefix was drafted and kept
    law = torch.zeros(len(instances.params), vocab_size ** (NUM_DRAFTS + 1), dtype=torch.float64)
    for depth in range(NUM_DRAFTS + 1):
        if depth < NUM_DRAFTS:
            p, q = target[depth], batch.warp(instances.draft_logits[depth])
            kept = torch.where(waivable(instances, rule)[depth], q, torch.minimum(p, q))
            residual = (p - q).clamp(min=0)
            residual = residual / residual.sum(-1, keepdim=True).clamp(min=1e-300)
            emitted = reach[..., None] * (1 - kept.sum(-1, keepdim=True)) * residual
            reach = (reach[..., None] * kept).flatten(1)
        else:
            emitted = reach[..., None] * target[depth]
        emitted = emitted.flatten(1)
        for later in range(depth + 1, NUM_DRAFTS + 1):
            emitted = (emitted[..., None] * target[later]).flatten(1)
        law += emitted
    return law


def law_of(rule: VerifyRule, instances) -> Tensor:
    return measured_law(
        instances, num_draft_tokens=NUM_DRAFTS, keep=always, verify=verify_by_rejection, rule=rule
    )


@pytest.mark.parametrize("rule", [MarginRule(0.5), MarginRule(0.9), TypicalRule()], ids=lambda rule: rule.name)
def test_a_lossy_rule_has_the_law_that_was_worked_out_for_it_and_not_the_targets(rule):
    """Catches a rule that gives away more, or something else, than it says; and a law check that cannot see it."""
    instances = random_instances(LAWFUL, vocab_size=3, num_draft_tokens=NUM_DRAFTS, seed=21)
    measured, target = law_of(rule, instances), target_law(instances, NUM_DRAFTS + 1)[0]
    assert (measured - law_by_hand(instances, rule)).abs().max() <= TOLERANCE
    assert (measured - target).abs().max() > 1e-3


def test_what_a_lossy_rule_gives_away_is_what_the_drafter_overrates():
    """Catches a statement that is not so: the total variation of a first token is the sum over W of (q - p)+."""
    rule = MarginRule(0.5)
    instances = random_instances(LAWFUL, vocab_size=3, num_draft_tokens=NUM_DRAFTS, seed=22)
    first = law_of(rule, instances).view(len(LAWFUL), 3, -1).sum(-1)
    batch = SamplingBatch(LAWFUL, vocab_size=3, device="cpu")
    p, q = (batch.warp(tables[0])[:, 0] for tables in (instances.target_logits, instances.draft_logits))
    given_away = ((q - p).clamp(min=0) * waivable(instances, rule)[0][:, 0]).sum(-1)
    assert (0.5 * (first - p).abs().sum(-1) - given_away).abs().max() <= TOLERANCE
    assert given_away.max() > 0.1


def test_a_margin_that_nothing_meets_leaves_the_target_law():
    """Catches a rule that changes the round even where it waives nothing."""
    instances = random_instances(LAWFUL, vocab_size=3, num_draft_tokens=NUM_DRAFTS, seed=23)
    target = target_law(instances, NUM_DRAFTS + 1)[0]
    assert (law_of(MarginRule(1 - 1e-15), instances) - target).abs().max() <= TOLERANCE
    assert law_error(instances, num_draft_tokens=NUM_DRAFTS) <= TOLERANCE


# --- through the engine -----------------------------------------------------------------------------------------------


@functools.cache
def speculator_of(mode: str) -> SelfSpeculator:
    """A drafter that is often right, often the runner-up, and often neither."""
    model = tiny_model("llama", num_layers=2, hidden_size=16, vocab_size=64, seed=3)
    with self_check_left_out():
        speculator = SelfSpeculator(model, None, split_layer=1, drafter=small_config(), mode=mode)
    speculator.drafter = random_drafter(speculator.split, seed=4, scale=0.03)
    return speculator


def decode(
    params: SamplingParams, *, rule: VerifyRule, batch_size: int = 5, prompts: list[list[int]] = PROMPTS,
    mode: str = "fast", num_draft_tokens: int = 4,
) -> list[GenerationResult]:
    speculator = speculator_of(mode)
    speculator.rule = rule
    results = speculator.generate(
        prompts, [params] * len(prompts), batch_size=batch_size, policy=FixedLength(num_draft_tokens)
    )
    return sorted(results, key=lambda result: result.index)


def penalised(logits_V: Tensor, text: list[int], params: SamplingParams, *, prompt_len: int) -> list[float]:
    """The logits after the penalties, token by token."""
    logits = logits_V.tolist()
    for token in set(text):
        z = logits[token]
        logits[token] = z * params.repetition_penalty if z < 0 else z / params.repetition_penalty
    for token in set(text[prompt_len:]):
        logits[token] -= params.presence_penalty
    return logits


KINDS = {
    "greedy": SamplingParams(max_new_tokens=40, ignore_eos=True),
    "penalised": SamplingParams(max_new_tokens=40, ignore_eos=True, presence_penalty=1.5, repetition_penalty=1.3),
    "rejection": SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=0.9, seed=5),
    "gumbel": SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=0.9, seed=5, coupling="gumbel"),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_draft_of_a_margin_run_is_judged_by_the_book_on_the_text_that_holds_it(kind):
    """Each round again, from the model's own forward pass over the finished text. Catches positions after a waived
    token that are judged on the text the verifier would have written, penalties left out of the margin, waivers
    miscounted, and stretches that are called honest and are not."""
    params, num_waived, num_honest = KINDS[kind], 0, 0
    for result in decode(params, rule=MarginRule(THETA)):
        text = [*PROMPTS[result.index], *result.token_ids]
        logits_SV = speculator_of("fast").model(torch.tensor([text])).logits[0]
        assert result.level == "lossy"
        assert result.stats.num_waived == sum(stretch.num_waived for stretch in result.transitions)
        for stretch in result.transitions:
            if stretch.is_prefill or len(stretch) <= stretch.num_accepted:  # the text's end cut the round
                continue
            num_literal = judge_again(
                stretch, text, logits_SV, params, prompt_len=len(PROMPTS[result.index])
            )
            assert stretch.is_honest == (stretch.num_waived == 0)
            if params.is_greedy:
                assert stretch.num_waived == num_literal
            assert stretch.num_waived <= num_literal or kind == "gumbel"
            num_waived += stretch.num_waived
            num_honest += stretch.is_honest and stretch.num_accepted > 0
    assert num_waived > 5 and num_honest > 3


def judge_again(
    stretch: Transitions, text: list[int], logits_SV: Tensor, params: SamplingParams, *, prompt_len: int
) -> int:
    """Checks one round's verdict; how many of its accepted drafts the margin alone explains (greedy), or could."""
    num_literal, draft_ids = 0, stretch.draft_token_ids_W.tolist()
    for column in range(min(stretch.num_accepted + 1, stretch.num_drafted)):
        position, token = stretch.start_position + column, draft_ids[column]
        logits = penalised(logits_SV[position], text[: position + 1], params, prompt_len=prompt_len)
        is_literal, is_choice = literally_waived(logits, token, THETA), max(logits) == logits[token]
        if column == stretch.num_accepted:
            assert not is_literal  # or it would have been kept
            assert not (params.is_greedy and is_choice)
            if params.is_greedy:
                assert max(logits) == logits[text[position + 1]]
        else:
            assert token == text[position + 1]
            assert not params.is_greedy or is_choice or is_literal
            num_literal += is_literal and not (params.is_greedy and is_choice)
    return num_literal


def test_what_a_row_is_granted_does_not_depend_on_its_mates():
    """Catches a margin taken over a batch, and waivers counted in the wrong row."""
    params = KINDS["greedy"]
    together = decode(params, rule=MarginRule(THETA))
    for index, prompt in enumerate(PROMPTS):
        (alone,) = decode(params, rule=MarginRule(THETA), prompts=[prompt], batch_size=1)
        assert alone.token_ids == together[index].token_ids
        assert alone.stats.num_waived == together[index].stats.num_waived
    assert len({result.stats.num_waived for result in together}) > 1


def test_a_margin_run_without_runners_up_is_the_strict_run():
    """Catches a rule that changes more than the drafts it waives: here the drafter is right, or far off, always."""
    params, speculator = KINDS["greedy"], speculator_of("fast")
    texts = [plain_text(speculator, prompt, params) for prompt in PROMPTS]
    own = speculator.drafter
    speculator.drafter = MemoryDrafter(speculator.split, [states for _, states in texts], wrong_depths=())
    try:
        results = decode(params, rule=MarginRule(0.01))
    finally:
        speculator.drafter = own
    assert [result.token_ids for result in results] == [ids for ids, _ in texts]
    assert all(result.stats.num_waived == 0 < result.stats.num_accepted for result in results)
    assert all(stretch.is_honest for result in results for stretch in result.transitions)


@pytest.mark.parametrize("params", [
    SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.3, top_k=1, seed=2),
    SamplingParams(max_new_tokens=20, ignore_eos=True, top_k=1),
])  # fmt: skip
def test_where_a_filter_leaves_one_token_a_margin_run_is_the_strict_run(params):
    """Catches an excluded runner-up that comes in through the margin."""
    strict, lossy = (decode(params, rule=rule) for rule in (StrictRule(), MarginRule(0.01)))
    assert [result.token_ids for result in lossy] == [result.token_ids for result in strict]
    assert all(result.stats.num_waived == 0 and result.level == "lossy" for result in lossy)
    assert [result.level for result in strict] == ["fast"] * len(PROMPTS)


def test_without_drafts_nothing_is_waived():
    """Catches shapes that T = 0 breaks under a rule that looks at drafts."""
    for rule in (MarginRule(0.01), TypicalRule()):
        results = decode(KINDS["greedy"], rule=rule, num_draft_tokens=0)
        speculator_of("fast").rule = StrictRule()
        plain = speculator_of("fast").generate(PROMPTS, KINDS["greedy"], policy=PLAIN)
        assert {r.index: r.token_ids for r in plain} == {r.index: r.token_ids for r in results}


def test_exact_mode_takes_a_lossy_rule_and_then_promises_nothing():
    """Catches "exact" on a text that is not the model's own."""
    results = decode(KINDS["greedy"], rule=MarginRule(THETA), mode="exact", prompts=PROMPTS[:2])
    assert [result.level for result in results] == ["lossy"] * 2
    assert sum(result.stats.num_waived for result in results) > 0


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_round_with_a_waiver_is_stored_for_distillation_and_gives_no_reward():
    """Catches rewards for what the rule granted, and experience thrown away with them."""
    stretches = [
        stretch for result in decode(KINDS["greedy"], rule=MarginRule(THETA)) for stretch in result.transitions
        if not stretch.is_prefill
    ]
    drafted_by = {kind: [s for s in stretches if s.is_honest is kind and s.num_drafted] for kind in (True, False)}
    has_reward = {}
    for kind, found in drafted_by.items():
        replay = ReplayBuffer(
            capacity_positions=4096, hidden_size=16, max_block=2, dtype=torch.float64, reservoir_fraction=0.0
        )
        replay.add(*found)
        batch = replay.sample(64, 2, current_version=0, generator=torch.Generator().manual_seed(0))
        assert batch.mask_NT.any() and batch.target_hidden_NTD[batch.mask_NT].abs().sum() > 0
        has_reward[kind] = bool(batch.has_reward_NT.any())
    assert has_reward == {True: True, False: False}
