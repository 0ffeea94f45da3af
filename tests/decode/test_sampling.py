"""Warping against Hugging Face's processors, seen tokens, and the statistics of the counter-based draws.

Statistical tests use fixed seeds, so they never flake; the false-alarm odds say how surprising a failure would be.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dvi.decode.sampling import Role, SamplingBatch, Seen, SeenTokens, gumbel_argmax, hash_gumbel, sample_from, uniform
from dvi.decode.verification import verify_by_rejection
from dvi.records import SamplingParams

FALSE_ALARM = 1e-6


def batch_of(*params: SamplingParams, vocab_size: int) -> SamplingBatch:
    return SamplingBatch(list(params), vocab_size=vocab_size, device="cpu")


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).to(dtype)


# --- warping ----------------------------------------------------------------------------------------------------------


def probs_of_hugging_face(params: SamplingParams, ids_BN: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(ids_BN, logits_BV).softmax(-1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_k=1000),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=1.0, repetition_penalty=1.3),
        SamplingParams(temperature=1.0, repetition_penalty=0.8),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
        SamplingParams(temperature=1.8, top_k=7, top_p=0.6),
    ],
)
def test_warping_equals_the_processors_of_hugging_face(params):
    """Catches a filter applied before the temperature, a penalty with the wrong sign, an off-by-one nucleus."""
    vocab_size = 50
    logits_BV = random_logits(40, vocab_size, seed=1)
    ids_BN = torch.randint(0, vocab_size, (40, 12), generator=torch.Generator().manual_seed(2))
    seen = SeenTokens(40, vocab_size, "cpu")
    seen.add_prompt(ids_BN, torch.ones_like(ids_BN, dtype=torch.bool))
    ours = batch_of(*[params] * 40, vocab_size=vocab_size).warp(logits_BV[:, None], seen.with_drafts(ids_BN[:, :0]))
    theirs = probs_of_hugging_face(params, ids_BN, logits_BV)
    assert ((ours[:, 0] > 0) == (theirs > 0)).all()
    torch.testing.assert_close(ours[:, 0], theirs, rtol=1e-12, atol=1e-15)


def test_a_row_is_warped_the_same_whatever_its_batch_mates_ask_for():
    """Catches a switched-off setting that still changes bits once a batch mate switches it on."""
    plain, greedy = SamplingParams(temperature=0.9), SamplingParams()
    busy = SamplingParams(temperature=2.0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.5, presence_penalty=0.3)
    busy = dataclasses.replace(busy, frequency_penalty=0.2)
    logits_BQV = random_logits(3, 4, 1000, seed=3, dtype=torch.float32)
    logits_BQV[0, 0, 7] = 60  # leaves a tail that no running sum resolves, which top_p = 1 must keep all the same
    times_BQV = torch.randint(0, 3, (3, 4, 1000), generator=torch.Generator().manual_seed(4))
    seen = Seen(times_BQV > 0, times_BQV)
    together = batch_of(plain, greedy, busy, vocab_size=1000).warp(logits_BQV, seen)
    for row, params in enumerate((plain, greedy, busy)):
        own = Seen(seen.anywhere_BQV[row, None], times_BQV[row, None])
        alone = batch_of(params, vocab_size=1000).warp(logits_BQV[row, None], own)
        assert torch.equal(together[row], alone[0])


def test_greedy_rows_are_one_hot_at_the_first_of_tied_maxima_after_penalties():
    """Catches an argmax of the unpenalised logits, and a tie split between two tokens or given to the later one."""
    params = [SamplingParams(), SamplingParams(presence_penalty=1.5), SamplingParams(temperature=1.0)]
    logits_BQV = torch.tensor([1.0, 2.0, 2.0, 1.0]).expand(3, 1, 4)
    times_BQV = torch.tensor([0, 1, 1, 0]).expand(3, 1, 4)
    seen = Seen(times_BQV > 0, times_BQV)
    batch = batch_of(*params, vocab_size=4)
    assert batch.warp(logits_BQV, seen)[:2, 0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.argmax(logits_BQV, seen)[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("top_p, expected", [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.876, 4), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, expected):
    """Catches `<=` for `<` at a boundary hit exactly, and top_p = 1 that drops a tail lost in rounding."""
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125 - 2.0**-60, 2.0**-60]]], dtype=torch.float64).log()
    probs = batch_of(SamplingParams(temperature=1.0, top_p=top_p), vocab_size=5).warp(logits)
    assert (probs > 0).sum() == expected


def test_tied_tokens_are_all_kept_by_top_k_and_lowest_id_first_by_top_p():
    """Catches ties broken by whatever order a sort happens to leave, which differs between devices."""
    logits = torch.zeros(1, 1, 64)
    top_k = batch_of(SamplingParams(temperature=1.0, top_k=3), vocab_size=64).warp(logits)
    top_p = batch_of(SamplingParams(temperature=1.0, top_p=0.25), vocab_size=64).warp(logits)
    assert (top_k > 0).all()
    assert (top_p > 0).flatten().tolist() == [True] * 16 + [False] * 48


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 15),
    st.floats(0.001, 1),
    st.floats(0, 0.999),
)
def test_every_setting_yields_a_distribution_that_keeps_the_likeliest_token(logits, temperature, top_k, top_p, min_p):
    """Catches settings that together keep nothing, and results that are not normalised."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_BQV = torch.tensor([[logits]], dtype=torch.float64)
    probs = batch_of(params, vocab_size=len(logits)).warp(logits_BQV)[0, 0]
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    assert probs[logits_BQV[0, 0].argmax()] == probs.max() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("top_k, min_p", [(0, 0.0), (2, 0.0), (2, 0.1)])
def test_broken_logits_give_a_distribution_or_nan_throughout(bad, top_k, min_p):
    """Catches a half-broken row: a verifier may then accept from something that is not a distribution."""
    params = SamplingParams(temperature=0.8, top_k=top_k, min_p=min_p)
    probs = batch_of(params, vocab_size=4).warp(torch.tensor([[[1.0, bad, 0.0, 2.0]]])).flatten()
    assert probs.isnan().all() or probs.sum().item() == pytest.approx(1)


def test_rows_of_one_batch_must_share_their_coupling():
    """Catches a batch whose rows would silently all get the first row's coupling."""
    with pytest.raises(ValueError, match="coupling"):
        batch_of(SamplingParams(), SamplingParams(coupling="gumbel"), vocab_size=4)


def test_half_precision_logits_are_warped_in_float32():
    """Catches probabilities in bfloat16, whose three digits would be the acceptance ratio's."""
    logits = random_logits(1, 2, 30, seed=5, dtype=torch.bfloat16)
    batch = batch_of(SamplingParams(temperature=0.7, top_k=9), vocab_size=30)
    assert batch.warp(logits).dtype == torch.float32
    assert torch.equal(batch.warp(logits), batch.warp(logits.float()))


# --- seen tokens ------------------------------------------------------------------------------------------------------


def test_each_position_sees_the_committed_tokens_and_the_drafts_before_it():
    """Catches penalties per block: every position seeing all drafts, or none of them, or its own token."""
    seen = SeenTokens(2, 6, "cpu")
    seen.add_prompt(torch.tensor([[0, 5], [1, -7]]), torch.tensor([[True, True], [True, False]]))
    drafts_BT = torch.tensor([[2, 3, 2], [1, 4, 0]])
    before = seen.with_drafts(drafts_BT)
    columns = [[set(torch.nonzero(c).flatten().tolist()) for c in row] for row in before.anywhere_BQV]
    assert columns == [[{0, 5}, {0, 2, 5}, {0, 2, 3, 5}, {0, 2, 3, 5}], [{1}, {1}, {1, 4}, {0, 1, 4}]]
    counted = [[{v: n for v, n in enumerate(c) if n} for c in row] for row in before.times_generated_BQV.tolist()]
    assert counted == [[{}, {2: 1}, {2: 1, 3: 1}, {2: 2, 3: 1}], [{}, {1: 1}, {1: 1, 4: 1}, {0: 1, 1: 1, 4: 1}]]


def test_one_draft_step_sees_what_its_column_of_the_block_sees():
    """Catches drafter and verifier penalising differently, which would be lawful but waste acceptance."""
    seen = SeenTokens(3, 9, "cpu")
    seen.add_prompt(torch.tensor([[4], [5], [6]]), torch.tensor([[True], [False], [True]]))
    seen.add_generated(torch.tensor([[4], [5], [6]]), torch.tensor([[True], [True], [False]]))
    drafts_BT = torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(6))
    block = seen.with_drafts(drafts_BT)
    for depth in range(5):
        step = seen.after_drafts(drafts_BT[:, :depth])
        assert torch.equal(step.anywhere_BQV[:, 0], block.anywhere_BQV[:, depth])
        assert torch.equal(step.times_generated_BQV[:, 0], block.times_generated_BQV[:, depth])


def test_a_cleared_row_has_seen_nothing_and_its_neighbours_keep_theirs():
    """Catches a new request that inherits the penalties of the one that had its row."""
    seen = SeenTokens(2, 4, "cpu")
    seen.add_prompt(torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool))
    seen.add_generated(torch.tensor([[0], [2]]), torch.ones(2, 1, dtype=torch.bool))
    seen.clear_row(0)
    left = seen.after_drafts(torch.zeros(2, 0, dtype=torch.int64))
    assert left.anywhere_BQV[:, 0].tolist() == [[False] * 4, [False, False, True, False]]
    assert left.times_generated_BQV[:, 0].tolist() == [[0] * 4, [0, 0, 1, 0]]


def test_presence_and_frequency_count_the_answer_alone_and_repetition_the_prompt_too():
    """Catches OpenAI's penalties of tokens that only the prompt has, and one that does not grow with the count."""
    seen = SeenTokens(1, 4, "cpu")
    all_valid = torch.ones(1, 2, dtype=torch.bool)
    seen.add_prompt(torch.tensor([[0, 1]]), all_valid)
    seen.add_generated(torch.tensor([[1, 2]]), all_valid)
    seen.add_generated(torch.tensor([[2, 2]]), all_valid)
    before = seen.after_drafts(torch.zeros(1, 0, dtype=torch.int64))
    logits_BQV = torch.tensor([[[8.0, 8.0, 8.0, 8.0]]], dtype=torch.float64)

    def penalised(**penalties: float) -> list[float]:
        batch = batch_of(SamplingParams(temperature=1.0, **penalties), vocab_size=4)
        return batch.warp_logits(logits_BQV, before).flatten().tolist()

    assert penalised(presence_penalty=0.5) == [8.0, 7.5, 7.5, 8.0]
    assert penalised(frequency_penalty=0.5) == [8.0, 7.5, 6.5, 8.0]
    assert penalised(repetition_penalty=2.0) == [4.0, 4.0, 4.0, 8.0]
    assert penalised(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25) == [4.0, 3.25, 2.75, 8.0]


# --- the hash ---------------------------------------------------------------------------------------------------------


def uniform_in_python(seed: int, counter: int, depth: int, role: int) -> float:
    """The documented hash on unbounded integers."""
    mask, state = 2**64 - 1, 0
    for word in (seed, counter, depth, role):
        x = ((state + 0x9E3779B97F4A7C15) & mask) ^ word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        state = x ^ (x >> 31)
    return (state >> 16) * 2.0**-48


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**62 - 1), st.integers(0, 2**40), st.integers(0, 64), st.sampled_from(list(Role)))
def test_the_hash_on_tensors_equals_the_hash_on_unbounded_integers(seed, counter, depth, role):
    """Catches a right shift that copies the sign, and products that do not wrap. Also pins draws across versions."""
    drawn = uniform(torch.tensor([seed]), torch.tensor([counter]), depth, role)
    assert drawn.item() == uniform_in_python(seed, counter, depth, role)


def draws_along(axis: str, *, num: int, seed: int) -> torch.Tensor:
    """num draws whose keys differ only along one axis, from a random start."""
    start = torch.randint(0, 2**40, (1,), generator=torch.Generator().manual_seed(seed))
    steps = torch.arange(num)
    keys = {"seed": start, "counter": start % 1000, "depth": torch.zeros_like(start)}
    keys[axis] = keys[axis] + steps
    return uniform(keys["seed"], keys["counter"], keys["depth"], Role.DRAFT)


@pytest.mark.parametrize("axis", ["seed", "counter", "depth"])
def test_draws_with_neighbouring_keys_are_uniform_and_uncorrelated(axis):
    """Catches a hash that leaves structure: unequal bins, or pairs of neighbours that share information.

    False-alarm odds 1e-6 for each of the chi-squares, on 2**17 draws.
    """
    draws = draws_along(axis, num=2**17, seed=7)
    assert draws.min() >= 0 and draws.max() <= 1 - 2.0**-48
    assert stats.chisquare(torch.histc(draws, bins=256, min=0, max=1).numpy()).pvalue > FALSE_ALARM
    for bits in (8, 20):  # the leading bits, and bits further down that the leading ones would hide
        fine = (draws * 2**bits).frac()
        for lag in (1, 2, 16):
            cells = (fine[:-lag] * 16).long() * 16 + (fine[lag:] * 16).long()
            assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > FALSE_ALARM


def test_draws_of_different_roles_and_of_neighbouring_keys_on_two_axes_are_independent():
    """Catches keys that meet, such as (seed, counter + 1) and (seed + 1, counter), or roles that share a draw."""
    num = 2**16
    seeds, zero = torch.arange(num), torch.zeros(num, dtype=torch.int64)
    reference = uniform(seeds, zero + 5, 1, Role.DRAFT)
    others = [uniform(seeds, zero + 5, 1, role) for role in (Role.ACCEPT, Role.RECOVER)]
    others += [
        uniform(seeds + s, zero + 5 + c, 1 + d, Role.DRAFT)
        for s, c, d in [(1, -1, 0), (0, 1, -1), (1, 0, -1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0)]
    ]
    for other in others:
        assert (reference == other).sum() == 0
        cells = (reference * 16).long() * 16 + (other * 16).long()
        assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > FALSE_ALARM


def test_half_a_million_keys_of_a_small_grid_draw_different_numbers():
    """Catches colliding keys: 5 * 2**17 draws of 48 bits collide with odds of about 8e-4."""
    seed, counter = torch.arange(2**7)[:, None, None, None], torch.arange(2**7)[:, None, None]
    depth = torch.arange(2**3)[:, None]
    draws = torch.cat([uniform(seed, counter, depth, role) for role in Role], -1)
    assert draws.flatten().unique().numel() == draws.numel() == len(Role) * 2**17


def test_draws_broadcast_over_depth_as_if_made_one_by_one():
    """Catches acceptance draws that differ between a whole block and a step, hence between T and T + 1."""
    seed_B, counter_B = torch.tensor([3, 2**61]), torch.tensor([10, 11])
    block_BT = uniform(seed_B[:, None], counter_B[:, None], torch.arange(4), Role.ACCEPT)
    steps = [uniform(seed_B, counter_B, depth, Role.ACCEPT) for depth in range(4)]
    assert torch.equal(block_BT, torch.stack(steps, 1))


# --- sampling from a distribution -------------------------------------------------------------------------------------

EDGE_UNIFORMS = torch.tensor([0.0, 2.0**-48, 0.25, 0.5, 1 - 2.0**-48, 1 - 2.0**-53], dtype=torch.float64)


@pytest.mark.parametrize("vocab_size", [2, 100, 8191, 8192, 8193, 32000, 151936])
def test_no_token_of_probability_zero_is_ever_drawn(vocab_size):
    """Catches an inverse CDF that returns id 0 at u = 0, runs past the end at u near 1, or lands in a gap."""
    generator = torch.Generator().manual_seed(8)
    random_V = torch.rand(vocab_size, generator=generator).pow(8)
    gaps_V = random_V * (torch.rand(vocab_size, generator=generator) < 0.3)
    gaps_V[0] = gaps_V[-1] = 0
    gaps_V[vocab_size // 2 - 1] = 1e-30
    one_hots = torch.nn.functional.one_hot(torch.tensor([0, vocab_size // 2, vocab_size - 1]), vocab_size)
    for probs_V in (gaps_V, gaps_V / gaps_V.sum().clamp(min=1e-30), random_V.softmax(-1), *one_hots.float()):
        ids = sample_from(probs_V.expand(len(EDGE_UNIFORMS), -1), EDGE_UNIFORMS)
        assert ((ids >= 0) & (ids < vocab_size)).all()
        assert (probs_V[ids] > 0).all()


def test_zero_probability_is_never_drawn_even_if_the_running_sum_is_not_monotone(monkeypatch):
    """Parallel scans on a GPU may step up by a rounding over a zero. Catches trusting the running sum alone."""
    exact_cumsum = torch.Tensor.cumsum

    def wobbling_cumsum(x, dim):
        sums = exact_cumsum(x, dim)
        sums[..., 1::2] *= 1 + 2.0**-50
        return sums

    monkeypatch.setattr(torch.Tensor, "cumsum", wobbling_cumsum)
    probs_BV = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.5, 0.0]]).expand(3, -1)
    uniform_B = torch.tensor([0.5, 0.5 * (1 + 2.0**-51), 1 - 2.0**-53], dtype=torch.float64)
    assert (probs_BV[0, sample_from(probs_BV, uniform_B)] > 0).all()


def test_a_uniform_on_a_boundary_belongs_to_the_next_token():
    """Catches `>=` for `>`: intervals are closed below and open above, as the uniforms are."""
    uniform_B = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert sample_from(torch.tensor([[0.5, 0.0, 1.0, 0.5]]).expand(4, -1), uniform_B).tolist() == [0, 2, 2, 3]


def test_rows_that_are_no_distribution_still_give_an_id_in_range():
    """Catches an out-of-range id, which on a GPU is an illegal memory access some kernels later."""
    probs_BV = torch.tensor([[math.nan, 0.5, 0.5], [0.0, 0.0, 0.0], [0.5, math.nan, 0.5]])
    assert sample_from(probs_BV, torch.tensor([0.9, 0.9, 0.1], dtype=torch.float64)).tolist() == [0, 0, 0]


def test_drawn_tokens_follow_the_distribution():
    """Catches a shifted or truncated inverse CDF. False-alarm odds 1e-6, 100 000 draws from the real hash."""
    probs_V = random_logits(20, seed=9).softmax(-1)
    num = 100_000
    seeds = torch.arange(num)
    ids = sample_from(probs_V.expand(num, -1), uniform(seeds, torch.zeros_like(seeds), 0, Role.RECOVER))
    assert stats.chisquare(torch.bincount(ids, minlength=20).numpy(), probs_V.numpy() * num).pvalue > FALSE_ALARM


def test_gumbel_choices_follow_the_distribution_and_never_a_zero():
    """Catches noise with the wrong sign or scale. False-alarm odds 1e-6, 50 000 draws."""
    probs_V = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64)
    num = 50_000
    seed_B = torch.arange(num // 10)
    noise_BQV = hash_gumbel(seed_B, torch.arange(10).expand(num // 10, 10), 6)
    assert noise_BQV.isfinite().all()
    counts = torch.bincount(gumbel_argmax(probs_V.expand_as(noise_BQV), noise_BQV).flatten(), minlength=6)
    assert counts[1] == 0
    kept = probs_V > 0
    assert stats.chisquare(counts[kept].numpy(), probs_V[kept].numpy() * num).pvalue > FALSE_ALARM


def test_gumbel_noise_depends_on_seed_position_and_token_but_not_on_the_block_it_is_asked_in():
    """Catches noise keyed by depth: draft and verify would then meet different noise at the same position."""
    seed_B = torch.tensor([1, 2])
    block = hash_gumbel(seed_B, torch.tensor([[5, 6, 7], [9, 10, 11]]), 8)
    step = hash_gumbel(seed_B, torch.tensor([[7], [11]]), 8)
    assert torch.equal(block[:, 2:], step)
    assert block.unique().numel() == block.numel()


def test_greedy_rows_stay_greedy_under_gumbel_noise():
    """Catches noise that outvotes a one-hot distribution."""
    one_hot = torch.nn.functional.one_hot(torch.arange(5), 5)[:, None].float()
    noise = hash_gumbel(torch.arange(5), torch.zeros(5, 1, dtype=torch.int64), 5)
    assert gumbel_argmax(one_hot, noise)[:, 0].tolist() == list(range(5))


# --- why draws are keyed by the round ---------------------------------------------------------------------------------


def second_token_counts(*, keyed_by_round: bool, num: int) -> torch.Tensor:
    """Counts of the token at position 1 when a drafter learns, between two rounds, from a draft that was discarded.

    Round 1 drafts positions 0 and 1. Where position 0 is rejected, round 2 drafts position 1 again, with a drafter
    changed according to the discarded token: so changed that the same draw would always give token 1.
    """
    target_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    learnt_VV = torch.tensor([[0.0, 0.34, 0.66], [0.33, 0.34, 0.33], [0.66, 0.34, 0.0]], dtype=torch.float64)
    seed_B = torch.arange(num)

    def draw(*, start: int, depth: int, role: Role) -> torch.Tensor:
        counter, key_depth = (start, depth) if keyed_by_round else (0, start + depth)
        return uniform(seed_B, torch.full_like(seed_B, counter), key_depth, role)

    # Position 0: the drafter insists on token 2, which the target takes in one case of five.
    rejected_B = draw(start=0, depth=0, role=Role.ACCEPT) >= target_V[2]
    discarded_B = sample_from(torch.full((num, 3), 1 / 3), draw(start=0, depth=1, role=Role.DRAFT))
    learnt_BV = learnt_VV[discarded_B]
    draft_B1 = sample_from(learnt_BV, draw(start=1, depth=0, role=Role.DRAFT))[:, None]
    verdict = verify_by_rejection(
        draft_B1,
        torch.ones_like(seed_B),
        learnt_BV[:, None],
        target_V.expand(num, 2, 3),
        draw(start=1, depth=0, role=Role.ACCEPT)[:, None],
        draw(start=1, depth=0, role=Role.RECOVER),
    )
    emitted_B = torch.where(verdict.num_accepted_B == 1, draft_B1[:, 0], verdict.next_token_B)
    return torch.bincount(emitted_B[rejected_B], minlength=3)


def test_a_drafter_that_learnt_from_a_discarded_draft_does_not_bias_the_next_round():
    """Catches a draw used twice. False-alarm odds 1e-6; the position-keyed control shows that the bias is real."""
    expected = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    counts = second_token_counts(keyed_by_round=True, num=40_000)
    assert stats.chisquare(counts.numpy(), (expected * counts.sum()).numpy()).pvalue > FALSE_ALARM
    biased = second_token_counts(keyed_by_round=False, num=40_000)
    assert stats.chisquare(biased.numpy(), (expected * biased.sum()).numpy()).pvalue < 1e-12
