"""The loss terms: hand-worked values, gradients, extreme logits, masks and weights."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from dvi.records import LossWeights, ReplayBatch
from tests.support.random_traffic import serving, trainer_of
from trainers.learning import losses

HALF_HALF = torch.tensor([[0.5, 0.5]]).log()
QUARTER = torch.tensor([[0.25, 0.75]]).log()
TERM_NAMES = [field.name for field in fields(LossWeights)]


def make_batch(num_blocks: int, block_len: int, **changes: Tensor) -> ReplayBatch:
    """A batch in which every position exists and was accepted; hidden states are not looked at by the losses."""
    shape = (num_blocks, block_len)
    hidden_NTD = torch.zeros(*shape, 1)
    batch = {
        "anchor_ND": hidden_NTD[:, 0],
        "hidden_NTD": hidden_NTD,
        "target_hidden_NTD": hidden_NTD,
        "token_ids_NT": torch.zeros(shape, dtype=torch.int64),
        "mask_NT": torch.ones(shape, dtype=torch.bool),
        "action_NT": torch.zeros(shape, dtype=torch.int64),
        "reward_NT": torch.ones(shape),
        "has_reward_NT": torch.ones(shape, dtype=torch.bool),
        "behaviour_log_probs_NT": torch.zeros(shape),
        "staleness_N": torch.zeros(num_blocks, dtype=torch.int64),
    }
    return ReplayBatch(**batch | changes)


def compute(draft_NTV: Tensor, target_NTV: Tensor, batch: ReplayBatch, **weights: float) -> tuple[Tensor, dict]:
    return losses.compute(
        draft_NTV, target_NTV, batch, weights=LossWeights(**weights), baseline_T=torch.full((8,), 0.5)
    )


# Values worked by hand.


def test_forward_kl_is_the_targets_expectation_of_the_log_ratio():
    # Catches swapped arguments: KL is not symmetric.
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    torch.testing.assert_close(losses.forward_kl(HALF_HALF, QUARTER), torch.tensor([expected]))


def test_reverse_kl_is_the_drafters_expectation_of_the_log_ratio():
    # Catches swapped arguments, the other way round.
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(losses.reverse_kl(HALF_HALF, QUARTER), torch.tensor([expected]))


def test_total_variation_is_one_minus_the_overlap():
    # Catches a missing half.
    torch.testing.assert_close(losses.total_variation(HALF_HALF, QUARTER), torch.tensor([0.25]))


def test_entropy_of_a_uniform_choice_of_two_is_log_two():
    # Catches a flipped sign: an "entropy bonus" that makes the drafter certain.
    torch.testing.assert_close(losses.entropy(HALF_HALF), torch.tensor([math.log(2)]))


def test_lk_hybrid_blends_kl_and_total_variation_by_acceptance():
    # Catches lambda on the wrong term: at acceptance 0 it must be all KL.
    kl, tv = losses.forward_kl(HALF_HALF, QUARTER), losses.total_variation(HALF_HALF, QUARTER)
    torch.testing.assert_close(losses.lk_hybrid(HALF_HALF, QUARTER, torch.tensor(0.0)), kl)
    share = math.exp(-3 * 0.75)
    blended = losses.lk_hybrid(HALF_HALF, QUARTER, torch.tensor(0.75))
    torch.testing.assert_close(blended, share * kl + (1 - share) * tv)


def test_accepted_ce_is_the_surprise_of_accepted_drafts_only():
    # Catches imitation of rejected drafts.
    action, reward = torch.tensor([1, 1]), torch.tensor([1.0, 0.0])
    values = losses.accepted_ce(QUARTER.expand(2, 2), action, reward)
    torch.testing.assert_close(values, torch.tensor([-math.log(0.75), 0.0]))


@pytest.mark.parametrize(("reward", "makes_likelier"), [(1.0, True), (0.0, False)])
def test_policy_gradient_step_makes_accepted_drafts_likelier_and_rejected_ones_rarer(reward, makes_likelier):
    # Catches the inverted sign of the authors' first trainer.
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = losses.policy_gradient(
        losses.log_probs(logits),
        torch.tensor([2]),
        torch.tensor([reward]),
        baseline_M=torch.tensor([0.6]),
        behaviour_log_probs_M=torch.tensor([-math.log(3)]),
    )
    torch.testing.assert_close(loss, torch.tensor([(reward - 0.6) * math.log(3)]))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    after = (logits - 0.1 * grad).softmax(-1)[0, 2]
    assert (after > 1 / 3) == makes_likelier


@pytest.mark.parametrize(
    ("ratio", "reward", "factor"),
    [
        (1.0, 1.0, 1.0),
        (1.1, 1.0, 1.1),
        (1.1, 0.0, 1.1),
        (5.0, 0.0, 1.2),  # moved against the advantage: still pulled back, by a bounded step
        (0.1, 1.0, 0.8),
        (5.0, 1.0, 0.0),  # moved far enough the way the advantage pushes
        (0.1, 0.0, 0.0),
    ],
)
def test_policy_gradient_scales_with_the_clipped_ratio_and_stops_past_it(ratio, reward, factor):
    # Catches an inverted ratio, an unclipped one, and a clip that never stops pushing.
    logits = torch.tensor([[0.3, -0.4, 0.1]], dtype=torch.float64, requires_grad=True)
    draft = losses.log_probs(logits)
    loss = losses.policy_gradient(
        draft,
        torch.tensor([1]),
        torch.tensor([reward]),
        baseline_M=torch.tensor([0.5]),
        behaviour_log_probs_M=draft.detach()[:, 1] - math.log(ratio),
    )
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    one_hot = torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(grad, -factor * (reward - 0.5) * (one_hot - logits.detach().softmax(-1)))


def test_replaying_one_verdict_for_ever_moves_the_policy_only_a_little_past_the_clip():
    # Catches runaway updates from stale experience: each replay of a rejection would push its token to probability 0.
    logits = torch.zeros(1, 4, requires_grad=True)
    behaviour = losses.log_probs(logits).detach()[:, 0]
    for _ in range(200):
        loss = losses.policy_gradient(
            losses.log_probs(logits), torch.tensor([0]), torch.tensor([0.0]), baseline_M=torch.tensor([0.5]),
            behaviour_log_probs_M=behaviour,
        )
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        logits = (logits - 0.2 * grad).detach().requires_grad_()
    assert 0.18 < logits.softmax(-1)[0, 0] < 0.2001  # 0.8 x 0.25 = 0.2, less at most one step


# Gradients.


def random_logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_model_terms() -> dict:
    return {
        "forward_kl": losses.forward_kl,
        "reverse_kl": losses.reverse_kl,
        "total_variation": losses.total_variation,
        "lk_hybrid": lambda draft, target: losses.lk_hybrid(draft, target, torch.full((5,), 0.4)),
    }


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation", "lk_hybrid"])
def test_gradient_of_distribution_terms_matches_finite_differences(name):
    # Catches a detach in the wrong place, which leaves the value right and the learning wrong.
    target = losses.log_probs(random_logits(1, 5, 7))
    term = two_model_terms()[name]
    logits = random_logits(0, 5, 7).requires_grad_()
    assert gradcheck(lambda draft: term(losses.log_probs(draft), target), (logits,))


def test_gradient_of_entropy_and_accepted_ce_matches_finite_differences():
    # As above, for the terms that look at the drafter alone.
    logits = random_logits(0, 5, 7).requires_grad_()
    action, reward = torch.tensor([0, 6, 3, 3, 1]), torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64)
    assert gradcheck(lambda draft: losses.entropy(losses.log_probs(draft)), (logits,))
    assert gradcheck(lambda draft: losses.accepted_ce(losses.log_probs(draft), action, reward), (logits,))


def test_gradient_of_policy_gradient_matches_finite_differences_where_the_ratio_is_clipped():
    # Where the ratio is clipped it is constant, so the value's own derivative is the whole gradient.
    logits = random_logits(0, 4, 7).requires_grad_()
    action, reward = torch.tensor([0, 6, 3, 3]), torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    ratio = torch.tensor([0.3, 3.0, 3.0, 0.3], dtype=torch.float64)
    behaviour = losses.log_probs(logits.detach()).gather(1, action[:, None])[:, 0] - ratio.log()

    def term(draft: Tensor) -> Tensor:
        baseline = torch.full((4,), 0.3, dtype=torch.float64)
        return losses.policy_gradient(
            losses.log_probs(draft), action, reward, baseline_M=baseline, behaviour_log_probs_M=behaviour
        )

    assert gradcheck(term, (logits,))


def test_lk_hybrid_takes_its_acceptance_as_a_constant():
    # Catches a lambda that learns: the drafter would lower the loss by changing the blend.
    draft = losses.log_probs(random_logits(0, 5, 7).requires_grad_())
    acceptance = draft.exp().sum(-1) * 0.4
    value = losses.lk_hybrid(draft, losses.log_probs(random_logits(1, 5, 7)), acceptance)
    (grad,) = torch.autograd.grad(value.sum(), acceptance, allow_unused=True)
    assert grad is None


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), temperature=st.floats(0.1, 5))
def test_distribution_terms_vanish_only_where_drafter_and_target_agree(seed, temperature):
    # Catches a divergence that rewards something other than agreement, and a temperature that multiplies.
    logits = random_logits(seed, 1, 6)
    other = random_logits(seed + 1, 1, 6)
    target = losses.log_probs(logits, temperature=temperature)
    same = losses.log_probs(logits / temperature)
    for term in (losses.forward_kl, losses.reverse_kl, losses.total_variation):
        assert abs(term(same, target).item()) < 1e-12
        assert term(losses.log_probs(other), target).item() > 0


# Extremes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_and_masked_vocabulary_give_no_nan_in_value_or_gradient(dtype):
    # Catches 0 * log 0 and the NaN gradient that a late `where` leaves behind.
    draft = torch.tensor([[1e4, -1e4, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)[:, None].requires_grad_()
    target = torch.tensor([[-1e4, 1e4, -math.inf, 0.0], [-math.inf, 1.0, -math.inf, 2.0]], dtype=dtype)[:, None]
    batch = make_batch(2, 1, behaviour_log_probs_NT=torch.tensor([[-50.0], [-1.0]]))
    for name in TERM_NAMES:
        total, _ = compute(draft, target, batch, **{name: 1.0})
        (grad,) = torch.autograd.grad(total, draft)
        assert total.isfinite() and grad.isfinite().all(), name


def test_vocabulary_masked_on_both_sides_adds_nothing():
    # Catches -inf minus -inf: a padded head masks the same ids in drafter and verifier.
    draft, target = random_logits(0, 2, 3, 5), random_logits(1, 2, 3, 5)
    padding = torch.full((2, 3, 2), -math.inf, dtype=torch.float64)
    batch = make_batch(2, 3)
    weights = dict.fromkeys(TERM_NAMES, 1.0)
    plain, _ = compute(draft, target, batch, **weights)
    padded_draft = torch.cat([draft, padding], -1).requires_grad_()
    padded, _ = compute(padded_draft, torch.cat([target, padding], -1), batch, **weights)
    torch.testing.assert_close(padded, plain)
    (grad,) = torch.autograd.grad(padded, padded_draft)
    assert grad.isfinite().all() and (grad[..., 5:] == 0).all()


def test_half_precision_logits_are_computed_in_float32():
    # Catches a softmax in float16, whose log of small probabilities is -inf.
    assert losses.log_probs(torch.zeros(2, 3, dtype=torch.float16)).dtype == torch.float32
    assert losses.log_probs(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


# compute: masks and weights.


@pytest.mark.parametrize("name", TERM_NAMES)
def test_positions_outside_a_terms_mask_do_not_change_it(name):
    # Catches a mean over padding, and reward terms that read actions where nothing was drafted.
    draft, target = random_logits(0, 3, 2, 5), random_logits(1, 3, 2, 5)
    has_reward = torch.tensor([[True, True], [True, False], [False, False]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    reward = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    batch = make_batch(3, 2, mask_NT=mask, has_reward_NT=has_reward, reward_NT=reward)
    _, values = compute(draft, target, batch, **{name: 1.0})
    draft, target = draft.clone(), target.clone()
    draft[2], target[2] = 9 * draft[2], -target[2]
    batch.action_NT = torch.where(has_reward, batch.action_NT, 3)
    _, changed = compute(draft, target, batch, **{name: 1.0})
    torch.testing.assert_close(changed[name], values[name])


def test_each_term_is_averaged_over_its_own_positions():
    # Catches one shared denominator: the policy gradient would shrink as KL-only positions are added.
    draft, target = random_logits(0, 2, 2, 5), random_logits(1, 2, 2, 5)
    has_reward = torch.tensor([[True, True], [False, False]])
    reward = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    behaviour = losses.log_probs(draft)[..., 0]
    batch = make_batch(2, 2, has_reward_NT=has_reward, reward_NT=reward, behaviour_log_probs_NT=behaviour)
    _, values = compute(draft, target, batch, policy_gradient=1.0, accepted_ce=1.0)
    log_prob = losses.log_probs(draft)[0, :, 0]
    torch.testing.assert_close(values["accepted_ce"], -log_prob[0])
    torch.testing.assert_close(values["policy_gradient"], (-0.5 * log_prob[0] + 0.5 * log_prob[1]) / 2)
    torch.testing.assert_close(
        values["forward_kl"], losses.forward_kl(losses.log_probs(draft), losses.log_probs(target)).mean()
    )


def test_normalised_advantages_have_a_spread_of_one():
    # Catches a division by the spread of the rewards alone, and positions without a reward counted in it.
    draft, target = random_logits(0, 3, 2, 5), random_logits(1, 3, 2, 5)
    has_reward = torch.tensor([[True, True], [True, False], [False, False]])
    reward = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    behaviour = losses.log_probs(draft)[..., 0]
    batch = make_batch(3, 2, has_reward_NT=has_reward, reward_NT=reward, behaviour_log_probs_NT=behaviour)
    options = {"weights": LossWeights(policy_gradient=1.0), "baseline_T": torch.tensor([0.75, 0.5])}
    (plain, _), (normalised, _) = (
        losses.compute(draft, target, batch, normalise_advantage=is_on, **options) for is_on in (False, True)
    )
    advantages = torch.tensor([0.25, -0.5, -0.75])
    torch.testing.assert_close(normalised, plain / advantages.std(correction=0))


def test_normalised_advantages_of_slices_add_up_to_those_of_the_batch():
    # Catches a spread taken over each slice: pieces of a step would have another gradient than the whole.
    draft, target = random_logits(0, 2, 2, 5), random_logits(1, 2, 2, 5)
    batch = make_batch(2, 2, reward_NT=torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    options = {
        "weights": LossWeights(policy_gradient=1.0), "baseline_T": torch.full((2,), 0.5), "normalise_advantage": True,
    }  # fmt: skip
    total, _ = losses.compute(draft, target, batch, **options)
    parts = [
        losses.compute(
            draft[i : i + 1], target[i : i + 1],
            ReplayBatch(**{name: tensor[i : i + 1] for name, tensor in vars(batch).items()}),
            totals=losses.BatchTotals.of(batch), **options,
        )[0]
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), total)


def test_equal_advantages_are_not_blown_up():
    # Catches a division by zero where every draft of a batch was accepted.
    draft, target = random_logits(0, 2, 2, 5), random_logits(1, 2, 2, 5)
    total, _ = losses.compute(
        draft, target, make_batch(2, 2), weights=LossWeights(policy_gradient=1.0), baseline_T=torch.full((2,), 0.5),
        normalise_advantage=True,
    )
    plain, _ = compute(draft, target, make_batch(2, 2), policy_gradient=1.0)
    torch.testing.assert_close(total, plain / losses.MIN_ADVANTAGE_STD)


def test_total_is_the_weighted_sum_and_the_entropy_is_a_bonus():
    # Catches a weight applied twice or to the wrong term, and an entropy penalty.
    draft, target, batch = random_logits(0, 2, 2, 5), random_logits(1, 2, 2, 5), make_batch(2, 2)
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(TERM_NAMES)}
    total, values = compute(draft, target, batch, **weights)
    signed = {name: -weight if name == "entropy" else weight for name, weight in weights.items()}
    torch.testing.assert_close(total, sum(signed[name] * values[name] for name in TERM_NAMES))


def test_terms_of_weight_zero_are_skipped_but_forward_kl_is_always_reported():
    # Catches a curve with holes when a schedule moves on, and a forward KL that trains although its weight is 0.
    draft = random_logits(0, 2, 2, 5).requires_grad_()
    target, batch = random_logits(1, 2, 2, 5), make_batch(2, 2)
    total, values = compute(draft, target, batch, entropy=1.0)
    assert set(values) == {"forward_kl", "entropy"}
    (grad,) = torch.autograd.grad(total, draft)
    (entropy_grad,) = torch.autograd.grad(-losses.entropy(losses.log_probs(draft)).mean(), draft)
    torch.testing.assert_close(grad, entropy_grad)


def test_a_batch_without_rewards_gives_a_zero_loss_with_a_gradient():
    # Catches 0/0, and a loss without a graph: one rank's backward would fail while the others wait.
    draft = random_logits(0, 2, 2, 5).requires_grad_()
    batch = make_batch(2, 2, has_reward_NT=torch.zeros(2, 2, dtype=torch.bool))
    total, _ = compute(draft, random_logits(1, 2, 2, 5), batch, policy_gradient=1.0, accepted_ce=1.0)
    (grad,) = torch.autograd.grad(total, draft)
    assert total == 0 and (grad == 0).all()


def test_lk_hybrid_in_compute_blends_by_the_mean_acceptance_of_each_depth():
    # Catches a lambda per position or one for all depths.
    draft, target = random_logits(0, 3, 2, 5), random_logits(1, 3, 2, 5)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    _, values = compute(draft, target, make_batch(3, 2, mask_NT=mask), lk_hybrid=1.0)
    draft_lp, target_lp = losses.log_probs(draft), losses.log_probs(target)
    kl, tv = losses.forward_kl(draft_lp, target_lp), losses.total_variation(draft_lp, target_lp)
    total = 0.0
    for depth in range(2):
        kept = mask[:, depth]
        share = torch.exp(-3 * (1 - tv[kept, depth]).mean())
        total += (share * kl[kept, depth] + (1 - share) * tv[kept, depth]).sum()
    torch.testing.assert_close(values["lk_hybrid"], total / 5)


def test_target_temperature_softens_the_target_alone():
    # Catches the temperature on the drafter, which would then be sharp at serving time.
    draft, target, batch = random_logits(0, 1, 1, 5), random_logits(1, 1, 1, 5), make_batch(1, 1)
    _, values = losses.compute(
        draft, target, batch, weights=LossWeights(forward_kl=1.0), baseline_T=torch.zeros(1), target_temperature=2.0
    )
    torch.testing.assert_close(
        values["forward_kl"], losses.forward_kl(losses.log_probs(draft), losses.log_probs(target / 2)).mean()
    )


def test_no_gradient_reaches_the_target():
    # Catches training the verifier's logits towards the drafter.
    target = random_logits(1, 1, 2, 5).requires_grad_()
    draft = random_logits(0, 1, 2, 5).requires_grad_()
    total, _ = compute(draft, target, make_batch(1, 2), **dict.fromkeys(TERM_NAMES, 1.0))
    total.backward()
    assert target.grad is None and draft.grad is not None


# The baseline.


def rewarded(reward: list, has_reward: list) -> losses.BatchTotals:
    """Totals of a batch with these rewards."""
    batch = make_batch(len(reward), len(reward[0]), reward_NT=torch.tensor(reward))
    batch.has_reward_NT = torch.tensor(has_reward)
    return losses.BatchTotals.of(batch)


def test_baseline_is_the_moving_average_of_batch_means_at_each_depth():
    # Catches an average over depths, and rewards counted where there are none.
    baseline = losses.RewardBaseline(3, rate=0.1)
    baseline.update(rewarded([[1.0, 1.0], [0.0, 1.0]], [[True, True], [True, False]]))
    torch.testing.assert_close(baseline.values_T, torch.tensor([0.5, 1.0, 0.0]))
    baseline.update(rewarded([[1.0, 0.0], [1.0, 0.0]], [[True, False], [True, False]]))
    torch.testing.assert_close(baseline.values_T, torch.tensor([0.55, 1.0, 0.0]))


def test_baseline_continues_bit_for_bit_from_its_state():
    # Catches a resumed depth that takes its next mean as its first.
    first, second = losses.RewardBaseline(2), losses.RewardBaseline(2)
    first.update(rewarded([[1.0, 0.0]], [[True, True]]))
    second.load_state_dict(first.state_dict())
    for baseline in (first, second):
        baseline.update(rewarded([[0.0, 1.0]], [[True, True]]))
    assert first.values_T.equal(second.values_T)
    with pytest.raises(ValueError, match="2 depths"):
        losses.RewardBaseline(3).load_state_dict(first.state_dict())


def test_a_learner_told_to_normalise_its_advantages_does():
    # Catches a setting that is read and not passed on.
    (plain, normalised) = (
        trainer_of(serving(), schedule="pg_only", normalise_advantage=is_on).step().losses["policy_gradient"]
        for is_on in (False, True)
    )
    assert abs(normalised) >= 2 * abs(plain) > 0  # rewards of 0 and 1 spread by 0.5 at most
