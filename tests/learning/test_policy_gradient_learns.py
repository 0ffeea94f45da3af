"""The reward terms learn: a two-state problem whose best drafter is known.

The drafter is a table of logits, the "verifier" accepts token a in state s with the probability ACCEPTANCE[s, a]. No
distribution to imitate is given, so whatever is learned is learned from rewards.
"""

import pytest
import torch
from torch import Tensor

from dvi.records import ReplayBatch
from trainers.learning import losses
from trainers.learning.loss_schedule import LossSchedule

ACCEPTANCE = torch.tensor([[0.1, 0.5, 0.9], [0.8, 0.4, 0.3]])
OPTIMUM = (0.9 + 0.8) / 2
UNIFORM = (1.5 / 3 + 1.5 / 3) / 2
NUM_SAMPLES = 128
NUM_STEPS = 200


def expected_reward(logits: Tensor) -> float:
    """What the drafter earns when both states are equally common."""
    return (logits.detach().softmax(-1) * ACCEPTANCE).sum(-1).mean().item()


def draft_and_verify(logits: Tensor, state_N: Tensor, generator: torch.Generator) -> ReplayBatch:
    """One-token rounds in the given states, drafted by sampling and judged by ACCEPTANCE."""
    log_probs_NV = losses.log_probs(logits.detach())[state_N]
    action_N1 = torch.multinomial(log_probs_NV.exp(), 1, generator=generator)
    odds_N1 = ACCEPTANCE[state_N].gather(1, action_N1)
    unused_N1D = torch.zeros(len(state_N), 1, 1)
    return ReplayBatch(
        anchor_ND=unused_N1D[:, 0],
        hidden_NTD=unused_N1D,
        target_hidden_NTD=unused_N1D,
        token_ids_NT=state_N[:, None],
        mask_NT=torch.ones_like(action_N1, dtype=torch.bool),
        action_NT=action_N1,
        reward_NT=torch.bernoulli(odds_N1, generator=generator),
        has_reward_NT=torch.ones_like(action_N1, dtype=torch.bool),
        behaviour_log_probs_NT=log_probs_NV.gather(1, action_N1),
        staleness_N=torch.zeros_like(state_N),
    )


def train(*, seed: int) -> float:
    """The expected reward after the policy-gradient preset has seen NUM_STEPS batches, from a uniform drafter."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule, baseline = LossSchedule("pg_only"), losses.RewardBaseline(1)
    for step in range(NUM_STEPS):
        state_N = torch.randint(2, (NUM_SAMPLES,), generator=generator)
        batch = draft_and_verify(logits, state_N, generator)
        draft_logits_N1V = logits[state_N][:, None]
        loss, _ = losses.compute(
            draft_logits_N1V,
            torch.zeros_like(draft_logits_N1V),
            batch,
            weights=schedule.weights(step),
            baseline_T=baseline.values_T,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline.update(losses.BatchTotals.of(batch))
    return expected_reward(logits)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_policy_gradient_reaches_the_best_drafter(seed):
    # Catches every way in which rewards fail to arrive: sign, mask, baseline, action index, ratio.
    assert UNIFORM < 0.6 * OPTIMUM
    assert train(seed=seed) > 0.97 * OPTIMUM


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_policy_gradient_with_its_sign_flipped_leads_away_from_the_best_drafter(monkeypatch, seed):
    # Shows that the test above can fail: this is the bug of the authors' first trainer.
    right_way = losses.policy_gradient
    monkeypatch.setattr(losses, "policy_gradient", lambda *args, **kwargs: -right_way(*args, **kwargs))
    assert train(seed=seed) < 0.8 * UNIFORM


def test_gradient_is_on_average_the_slope_of_the_expected_reward():
    # Catches a bias: a baseline or ratio that changes where the training goes, not only how noisy it is.
    logits = torch.tensor([[0.2, -0.3, 0.1], [0.5, 0.0, -0.4]], requires_grad=True)
    earned = (logits.softmax(-1) * ACCEPTANCE).sum(-1).mean()
    (slope,) = torch.autograd.grad(earned, logits)
    state_N = torch.arange(2).repeat(50_000)
    batch = draft_and_verify(logits, state_N, torch.Generator().manual_seed(0))
    draft_logits_N1V = logits[state_N][:, None]
    loss, _ = losses.compute(
        draft_logits_N1V,
        torch.zeros_like(draft_logits_N1V),
        batch,
        weights=LossSchedule("pg_only").weights(0),
        baseline_T=torch.tensor([0.6]),
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    # One draw adds at most |r - b| = 0.6 to one state's half of the mean, so the mean of 100 000 is off by a standard
    # deviation of at most 0.6 / sqrt(100 000) = 2e-3; allow two. The slopes are up to ten times that.
    torch.testing.assert_close(gradient, -slope, atol=4e-3, rtol=0)
