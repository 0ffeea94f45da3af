"""Verdicts worked by hand, and the edges where exactness is usually lost."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dvi.decode.sampling import Role, SamplingBatch, SeenTokens, gumbel_argmax, hash_gumbel, sample_from, uniform
from dvi.decode.verification import (
    acceptance_probs,
    count_leading,
    residual_probs,
    verify_by_rejection,
    verify_greedy,
)
from dvi.draft.length_policies import ConfidenceStop, DraftContext
from dvi.records import SamplingParams

FALSE_ALARM = 1e-6


def doubles(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_count_leading_stops_at_the_first_false():
    """Catches a plain sum, which would keep drafts after a rejection."""
    mask_BT = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    assert count_leading(mask_BT).tolist() == [1, 0, 3]
    assert count_leading(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [0, 0]


def test_greedy_keeps_the_agreeing_prefix_and_adds_the_targets_own_token():
    """Catches the correction token thrown away, a match after a mismatch counted, and undrafted columns accepted."""
    target_BU = torch.tensor([7, 8, 9, 5]).expand(5, 4)
    drafts_BT = torch.tensor([[7, 8, 9], [7, 0, 9], [0, 8, 9], [7, 8, 9], [7, 8, 9]])
    verdict = verify_greedy(drafts_BT, torch.tensor([3, 3, 3, 1, 0]), target_BU)
    assert verdict.num_accepted_B.tolist() == [3, 1, 0, 1, 0]
    assert verdict.next_token_B.tolist() == [5, 8, 7, 8, 7]


@pytest.mark.parametrize("verify_nothing", ["greedy", "rejection"])
def test_a_round_without_drafts_is_plain_decoding(verify_nothing):
    """Catches shapes that T = 0 breaks; the controller switches drafting off this way."""
    no_drafts, zeros = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    if verify_nothing == "greedy":
        verdict = verify_greedy(no_drafts, zeros, torch.tensor([[4], [2]]))
        assert verdict.next_token_B.tolist() == [4, 2]
    else:
        target_BUV = doubles([[0.0, 1.0, 0.0]], [[0.5, 0.0, 0.5]])
        no_probs, uniform_B = torch.zeros(2, 0, 3, dtype=torch.float64), torch.tensor([0.1, 0.6], dtype=torch.float64)
        verdict = verify_by_rejection(no_drafts, zeros, no_probs, target_BUV, torch.zeros(2, 0).double(), uniform_B)
        assert verdict.next_token_B.tolist() == [1, 2]
    assert verdict.num_accepted_B.tolist() == [0, 0]


def verify_one(draft, target, *, draft_id: int, accept: float, recover: float = 0.0, num_drafted: int = 1):
    """One row, T = 1; the bonus row of the target is one-hot at its last id."""
    bonus = [0.0] * (len(target) - 1) + [1.0]
    verdict = verify_by_rejection(
        torch.tensor([[draft_id]]),
        torch.tensor([num_drafted]),
        doubles([draft]),
        doubles([target, bonus]),
        doubles([accept]),
        torch.tensor([recover], dtype=torch.float64),
    )
    return verdict.num_accepted_B.item(), verdict.next_token_B.item()


def test_rejection_by_hand():
    """Draft (.5, .5, 0), target (.25, .25, .5): id 0 is kept below u = .5, else replaced by id 2, the only excess."""
    draft, target = [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]
    assert verify_one(draft, target, draft_id=0, accept=0.49) == (1, 2)
    assert verify_one(draft, target, draft_id=0, accept=0.5) == (0, 2)
    assert verify_one(draft, [0.25, 0.75, 0.0], draft_id=0, accept=0.51, recover=0.99) == (0, 1)


def test_a_token_the_target_excludes_is_rejected_even_by_a_draw_of_zero():
    """Catches `<=` for `<`: with top-p such tokens are common, and a draw of exactly 0 happens."""
    assert verify_one([0.5, 0.5], [0.0, 1.0], draft_id=0, accept=0.0) == (0, 1)


def test_equal_distributions_accept_whatever_the_draw():
    """Catches a comparison that rejects at u near 1; greedy rows are such pairs of one-hots."""
    for probs in ([0.3, 0.7], [0.0, 1.0]):
        assert verify_one(probs, probs, draft_id=1, accept=1 - 2.0**-53)[0] == 1


def test_an_undrafted_position_takes_its_token_from_the_target_itself():
    """Catches recovering from the residual where nothing was rejected, and accepting a padding column."""
    draft, target = [1.0, 0.0, 0.0], [0.5, 0.25, 0.25]
    assert [verify_one(draft, target, draft_id=0, accept=0.0, recover=u, num_drafted=0) for u in (0.4, 0.6, 0.9)] == [
        (0, 0),
        (0, 1),
        (0, 2),
    ]


def test_a_draft_distribution_of_nan_is_rejected_and_the_target_recovers_alone():
    """Catches a NaN that spreads into the output or is accepted: a broken drafter costs speed, never content."""
    broken, target = [math.nan] * 3, [0.0, 0.5, 0.5]
    assert verify_one(broken, target, draft_id=0, accept=0.0, recover=0.2) == (0, 1)
    assert verify_one(broken, target, draft_id=1, accept=0.0, recover=0.7) == (0, 2)
    assert acceptance_probs(torch.tensor([[1]]), doubles([broken]), doubles([target, target])).item() == 0


def test_acceptance_probabilities_by_hand():
    """Catches the ratio upside down, one above 1, and 0/0 or x/0 that is not 0 or 1."""
    draft_BTV = doubles([[0.5, 0.5, 0.0]] * 3 + [[0.25, 0.75, 0.0]])
    target_BUV = doubles([[0.2, 0.8, 0.0]] * 5)
    accept = acceptance_probs(torch.tensor([[0, 1, 2, 1]]), draft_BTV, target_BUV)
    torch.testing.assert_close(accept, doubles([0.4, 1.0, 0.0, 1.0]))


def test_the_residual_is_normalised_and_falls_back_to_the_target_where_it_is_empty():
    """Catches 0/0 when draft and target are equal, which rounding can still reject."""
    target = doubles([0.2, 0.3, 0.5], [0.2, 0.3, 0.5])
    residual = residual_probs(doubles([0.5, 0.2, 0.3], [0.2, 0.3, 0.5]), target)
    torch.testing.assert_close(residual, doubles([0.0, 1 / 3, 2 / 3], [0.2, 0.3, 0.5]))


def test_rows_of_a_batch_are_judged_independently():
    """Catches a gather along the wrong axis: each row alone must get the verdict it gets in company."""
    generator = torch.Generator().manual_seed(1)
    rows, depths, vocab_size = 32, 3, 7
    draft = (torch.randn(rows, depths, vocab_size, generator=generator)).softmax(-1)
    target = (torch.randn(rows, depths + 1, vocab_size, generator=generator)).softmax(-1)
    ids = torch.randint(0, vocab_size, (rows, depths), generator=generator)
    num_drafted = torch.randint(0, depths + 1, (rows,), generator=generator)
    accept = torch.rand(rows, depths, generator=generator, dtype=torch.float64)
    recover = torch.rand(rows, generator=generator, dtype=torch.float64)
    inputs = (ids, num_drafted, draft, target, accept, recover)
    together = verify_by_rejection(*inputs)
    assert set(together.num_accepted_B.tolist()) == {0, 1, 2, 3}
    for row in range(rows):
        alone = verify_by_rejection(*(x[row, None] for x in inputs))
        assert alone.num_accepted_B == together.num_accepted_B[row]
        assert alone.next_token_B == together.next_token_B[row]


def test_float32_rounds_with_hashed_draws_follow_the_target():
    """The law in the precision and with the draws of serving. Catches float32 thresholds that never reach 0 or 1.

    One draft, then its follower: chi-square of both emitted tokens, false-alarm odds 1e-6 each, 60 000 rounds.
    """
    num, vocab_size = 60_000, 8
    generator = torch.Generator().manual_seed(2)
    draft_V, first_V, second_V = (torch.randn(3, vocab_size, generator=generator) * 2).softmax(-1)
    seed_B = torch.arange(num) * 7919
    start_B = torch.full_like(seed_B, 12)
    ids_BT = sample_from(draft_V.expand(num, -1), uniform(seed_B, start_B, 0, Role.DRAFT))[:, None]
    verdict = verify_by_rejection(
        ids_BT,
        torch.ones_like(seed_B),
        draft_V.expand(num, 1, -1),
        torch.stack([first_V, second_V]).expand(num, -1, -1),
        uniform(seed_B[:, None], start_B[:, None], torch.arange(1), Role.ACCEPT),
        uniform(seed_B, start_B, 0, Role.RECOVER),
    )
    accepted_B = verdict.num_accepted_B == 1
    assert 0.05 < accepted_B.double().mean() < 0.95
    first_B = torch.where(accepted_B, ids_BT[:, 0], verdict.next_token_B)
    for emitted, probs_V in ((first_B, first_V), (verdict.next_token_B[accepted_B], second_V)):
        expected = probs_V.double().numpy() / probs_V.double().sum().item() * len(emitted)
        assert stats.chisquare(torch.bincount(emitted, minlength=vocab_size).numpy(), expected).pvalue > FALSE_ALARM


def test_shared_gumbel_noise_makes_the_tokens_independent_of_the_drafter():
    """Catches noise that differs between the two sides: what is emitted must equal plain decoding with that noise."""
    num, depths, vocab_size = 200, 4, 6
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(num, depths + 1, vocab_size, generator=generator).softmax(-1)
    noise = hash_gumbel(torch.arange(num), 3 + torch.arange(depths + 1).expand(num, -1), vocab_size)
    plain_BU = gumbel_argmax(target, noise)
    good = (target[:, :-1].log() + 0.3 * torch.randn(num, depths, vocab_size, generator=generator)).softmax(-1)
    bad = torch.randn(num, depths, vocab_size, generator=generator).softmax(-1)
    means = []
    for draft in (good, bad):
        drafts_BT = gumbel_argmax(draft, noise[:, :-1])
        verdict = verify_greedy(drafts_BT, torch.full((num,), depths), plain_BU)
        for row, count in enumerate(verdict.num_accepted_B.tolist()):
            emitted = [*drafts_BT[row, :count].tolist(), verdict.next_token_B[row].item()]
            assert emitted == plain_BU[row, : count + 1].tolist()
        means.append(verdict.num_accepted_B.double().mean())
    assert means[0] > means[1] > 0


# --- without the host -------------------------------------------------------------------------------------------------


def judge_a_round(batch: SamplingBatch, seen: SeenTokens, start_B, draft_logits_BTV, target_logits_BUV) -> list:
    """Everything this package does on the device in one round: draws, warping, drafting, masks and three verdicts."""
    depths = draft_logits_BTV.shape[1]
    ids, probs, keep = [], [], []
    drafts_BT = start_B[:, None].expand(-1, 0)
    for depth in range(depths):
        logits_B1V = draft_logits_BTV[:, depth, None]
        probs.append(batch.warp(logits_B1V, seen.after_drafts(drafts_BT)))
        ids.append(sample_from(probs[-1][:, 0], uniform(batch.seed_B, start_B, depth, Role.DRAFT)))
        context = DraftContext(depth, torch.ones_like(start_B, dtype=torch.bool), logits_B1V[:, 0])
        keep.append(ConfidenceStop(depths, threshold=0.3).keep(context))
        drafts_BT = torch.stack(ids, 1)
    num_drafted_B = count_leading(torch.stack(keep, 1))
    seen_before = seen.with_drafts(drafts_BT)
    target_BUV = batch.warp(target_logits_BUV, seen_before)
    depth_T = torch.arange(depths, device=start_B.device)
    accept_BT = uniform(batch.seed_B[:, None], start_B[:, None], depth_T, Role.ACCEPT)
    recover_B = uniform(batch.seed_B, start_B, 0, Role.RECOVER)
    rejection = verify_by_rejection(drafts_BT, num_drafted_B, torch.cat(probs, 1), target_BUV, accept_BT, recover_B)
    greedy = verify_greedy(drafts_BT, num_drafted_B, batch.argmax(target_logits_BUV, seen_before))
    position_BU = start_B[:, None] + torch.arange(depths + 1, device=start_B.device)
    noise_BUV = hash_gumbel(batch.seed_B, position_BU, batch.vocab_size)
    coupled = verify_greedy(drafts_BT, num_drafted_B, gumbel_argmax(target_BUV, noise_BUV))
    seen.add_generated(drafts_BT, depth_T < rejection.num_accepted_B[:, None])
    verdicts = [x for v in (rejection, greedy, coupled) for x in (v.num_accepted_B, v.next_token_B)]
    return [drafts_BT, num_drafted_B, *verdicts]


def round_on(device: str) -> tuple:
    params = [
        SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=5),
        SamplingParams(temperature=0.5, presence_penalty=0.5, frequency_penalty=0.25, seed=2**61),
        SamplingParams(),
    ]
    draft, target = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(4)) * 2
    batch, seen = SamplingBatch(params, vocab_size=40, device=device), SeenTokens(3, 40, device)
    return batch, seen, torch.tensor([3, 900, 17]).to(device), draft[:, :4].to(device), target.to(device)


def test_a_round_asks_the_host_for_no_value():
    """Meta tensors have shapes but no values: catches .item(), nonzero, mask indexing and branches on tensors."""
    on_meta, real = judge_a_round(*round_on("meta")), judge_a_round(*round_on("cpu"))
    assert [x.shape for x in on_meta] == [x.shape for x in real]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_round_replays_to_what_it_gives_eagerly_and_on_the_cpu():
    """Catches what a CUDA graph cannot hold, and draws or float64 paths that differ between devices."""
    inputs = round_on("cuda")
    eager = [x.clone() for x in judge_a_round(*inputs)]
    for row in range(3):
        inputs[1].clear_row(row)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = judge_a_round(*inputs)
    graph.replay()
    for ours, theirs, on_cpu in zip(captured, eager, judge_a_round(*round_on("cpu")), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.cpu(), on_cpu)
