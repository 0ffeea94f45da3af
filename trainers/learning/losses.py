"""The drafter's loss terms as pure functions, and the reward baseline.

Knows log-probabilities, actions and rewards; knows nothing of models, replay storage or schedules. Every term takes
normalised log-probabilities (from `log_probs`, so that each softmax is taken once a step) and gives one value per
position, of the shape the vocabulary dimension leaves behind. `compute` averages and weighs them.
"""
# M any leading shape of positions, N blocks, T depths, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.records import LossWeights, ReplayBatch
from dvi.settings import LearningSettings

LK_DECAY = 3.0  # eta of arXiv 2602.23881, its best setting
RATIO_CLIP = (0.8, 1.2)
MIN_ADVANTAGE_STD = 0.05  # where all rewards of a batch are as usual, their noise must not be blown up
# What a token that the verifier rules out costs the reverse KL, in nats. The true cost is infinite; e^-100 is at the
# edge of what float32 can hold, and the gradient stays bounded.
TARGET_FLOOR_NATS = -100.0


def log_probs(logits_MV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) in float32 (float64 stays float64), -inf replaced by the lowest finite number.

    logits_MV: [..., V] any float dtype; -inf marks masked vocabulary. NaN or +inf logits give NaN, as does a row that
    is -inf throughout. The finite floor lets 0 * log 0 be 0 in every term below, in value and in gradient.
    """
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    return logits_MV.log_softmax(-1).clamp_min(torch.finfo(logits_MV.dtype).min)


def forward_kl(draft_log_probs_MV: Tensor, target_log_probs_MV: Tensor) -> Tensor:
    """KL(target || draft) = sum_v target (log target - log draft), in nats.

    Mass-covering: wherever the verifier puts probability the drafter must too. Its gradient, draft - target, is full
    from the first step, so it starts the training and never leaves it. Infinite in exact arithmetic where the drafter
    cannot reach a token of the target. KD of Bhansali & Heck 2025 (arXiv 2510.05421).
    """
    return (target_log_probs_MV.exp() * (target_log_probs_MV - draft_log_probs_MV)).sum(-1)


def reverse_kl(draft_log_probs_MV: Tensor, target_log_probs_MV: Tensor) -> Tensor:
    """KL(draft || target) = sum_v draft (log draft - log target), in nats; log target is floored at -100.

    Mode-seeking: it punishes drafts that the verifier would refuse, which suits a drafter too small to cover
    everything, and it steadies the reward terms. KLrev of arXiv 2510.05421.
    """
    reachable_MV = target_log_probs_MV.clamp_min(TARGET_FLOOR_NATS)
    return (draft_log_probs_MV.exp() * (draft_log_probs_MV - reachable_MV)).sum(-1)


def total_variation(draft_log_probs_MV: Tensor, target_log_probs_MV: Tensor) -> Tensor:
    """1/2 sum_v |target - draft|, in 0..1: one minus the acceptance of exact rejection sampling, sum_v min(both).

    It is the rejection rate itself (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5), but nearly flat where the
    two hardly overlap, so alone it does not train from scratch.
    """
    return 0.5 * (target_log_probs_MV.exp() - draft_log_probs_MV.exp()).abs().sum(-1)


def lk_hybrid(draft_log_probs_MV: Tensor, target_log_probs_MV: Tensor, acceptance_M: Tensor) -> Tensor:
    """lambda KL(target || draft) + (1 - lambda) TV, lambda = exp(-3 acceptance): KL while poor, TV once good.

    acceptance_M: expected acceptance in 0..1, broadcastable to [...]; a constant for the gradient. `compute` passes
    the batch mean at each depth, as the authors do for each draft head (Samarin et al. 2026, arXiv 2602.23881, and
    their code in SpecForge): one lambda for all positions of a depth, so a hard position keeps its TV gradient.
    """
    kl_share_M = torch.exp(-LK_DECAY * acceptance_M.detach())
    kl_M = forward_kl(draft_log_probs_MV, target_log_probs_MV)
    return kl_share_M * kl_M + (1 - kl_share_M) * total_variation(draft_log_probs_MV, target_log_probs_MV)


def accepted_ce(draft_log_probs_MV: Tensor, action_M: Tensor, reward_M: Tensor) -> Tensor:
    """-r log pi(a): imitate the drafts that were accepted (r = 1), ignore the rejected (r = 0). In nats.

    pi is the drafter, a the token drafted, r its reward. It sharpens what already works and cannot find anything
    new: alone, from scratch, it collapses. CE of arXiv 2510.05421.
    """
    return -reward_M * _at(draft_log_probs_MV, action_M)


def policy_gradient(
    draft_log_probs_MV: Tensor,
    action_M: Tensor,
    reward_M: Tensor,
    *,
    baseline_M: Tensor,
    behaviour_log_probs_M: Tensor,
    clip: tuple[float, float] = RATIO_CLIP,
) -> Tensor:
    """-w (r - b) log pi(a): REINFORCE with a baseline. Minimised, it makes better-than-usual drafts more likely.

    a the token drafted, r its reward (1 accepted, 0 first rejection), b the usual reward at its depth, pi the drafter
    now; w = pi(a) / pi_behaviour(a), clipped and held constant for the gradient, corrects for a version that drafted
    earlier. w is 0 once pi(a) has moved past the clip in the direction the advantage r - b pushes, so that replaying
    one verdict cannot push without end (the stopping rule of PPO, Schulman et al. 2017, arXiv 1707.06347). The
    gradient is at most clip[1] |r - b| per logit. On the version's own drafts w = 1.

    behaviour_log_probs_M: log pi_behaviour(a), unwarped, in nats.
    PG of arXiv 2510.05421; the authors' first code had its sign inverted.
    """
    log_prob_M = _at(draft_log_probs_MV, action_M)
    advantage_M = reward_M - baseline_M
    ratio_M = (log_prob_M.detach() - behaviour_log_probs_M).exp()
    low, high = clip
    is_spent_M = ((advantage_M > 0) & (ratio_M > high)) | ((advantage_M < 0) & (ratio_M < low))
    return -ratio_M.clamp(low, high).masked_fill(is_spent_M, 0) * advantage_M * log_prob_M


def entropy(draft_log_probs_MV: Tensor) -> Tensor:
    """H(pi) = -sum_v draft log draft, in nats. A bonus: `compute` subtracts it, against premature certainty."""
    return -(draft_log_probs_MV.exp() * draft_log_probs_MV).sum(-1)


@dataclass(frozen=True)
class BatchTotals:
    """What the means of a step are taken over. Totals of the parts of a batch add up to those of the whole.

    values_K: float64 [1 + 2 T]: positions that exist, then by depth the rewards given, then those that were 1.
    """

    values_K: Tensor

    @classmethod
    def of(cls, batch: ReplayBatch) -> BatchTotals:
        """No device sync."""
        has_reward_NT = batch.has_reward_NT
        counts = (batch.mask_NT.sum()[None], has_reward_NT.sum(0), (has_reward_NT & (batch.reward_NT == 1)).sum(0))
        return cls(torch.cat(counts).double())

    @property
    def num_positions(self) -> Tensor:
        return self.values_K[0]

    @property
    def num_rewards_T(self) -> Tensor:
        return self.values_K[1:].chunk(2)[0]

    @property
    def num_accepted_T(self) -> Tensor:
        return self.values_K[1:].chunk(2)[1]

    def counts(self) -> dict[str, Tensor]:
        """Positions by the name of a mask, at least 1."""
        counts = {
            "exists": self.num_positions, "has_reward": self.num_rewards_T.sum(), "accepted": self.num_accepted_T.sum(),
        }  # fmt: skip
        return {name: count.clamp_min(1) for name, count in counts.items()}

    def advantage_std(self, baseline_T: Tensor) -> Tensor:
        """Of reward - baseline, around its mean; MIN_ADVANTAGE_STD at least. Rewards are 0 or 1."""
        baseline_T = baseline_T[: len(self.num_rewards_T)].double()
        count = self.num_rewards_T.sum().clamp_min(1)
        mean = (self.num_accepted_T - baseline_T * self.num_rewards_T).sum() / count
        deviation_T = baseline_T + mean
        num_refused_T = self.num_rewards_T - self.num_accepted_T
        variance = (self.num_accepted_T * (1 - deviation_T) ** 2 + num_refused_T * deviation_T**2).sum() / count
        return variance.sqrt().clamp_min(MIN_ADVANTAGE_STD)


def compute(
    draft_logits_NTV: Tensor,
    target_logits_NTV: Tensor,
    batch: ReplayBatch,
    *,
    weights: LossWeights,
    baseline_T: Tensor,
    target_temperature: float = LearningSettings.target_temperature,
    normalise_advantage: bool = LearningSettings.normalise_advantage,
    totals: BatchTotals | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the loss terms, and each computed term's unweighted mean by its name in LossWeights.

    Distribution terms are averaged over mask_NT, the policy gradient over has_reward_NT, accepted CE over the
    accepted positions alone. A mean over no position is 0. Terms of weight 0 are not computed, except the forward KL:
    it is always reported. The entropy enters with a minus.

    draft_logits_NTV    [N, T, V], with gradient; finite at masked positions too.
    target_logits_NTV   [N, T, V], treated as constant; -inf marks masked vocabulary.
    batch               its action_NT indexes V: with a trimmed draft vocabulary gather the target's logits and remap
                        the actions first.
    baseline_T          usual reward per depth, at least T long.
    target_temperature  the target is softmax(logits / temperature).
    normalise_advantage the policy gradient's advantages are divided by their standard deviation over `totals`, 0.05 at
                        least: where nearly all drafts are accepted, or nearly none, it would fade otherwise.
    totals              of all that `batch` is a part of, on this rank and on others: sums are then divided by its
                        counts, so that what the parts give, gradients too, adds up to what the whole gives. Only the
                        lambda of lk_hybrid remains the part's own. None: of the batch alone.
    Returns (scalar, dict of detached scalars); read them together, each read is a device sync.
    """
    draft_NTV = log_probs(draft_logits_NTV)
    target_NTV = log_probs(target_logits_NTV.detach(), temperature=target_temperature)
    masks, totals = _masks(batch), totals or BatchTotals.of(batch)
    num_averaged = {name: count.to(draft_NTV.dtype) for name, count in totals.counts().items()}
    reward_NT = batch.reward_NT.to(draft_NTV.dtype)

    def policy_gradient_NT() -> Tensor:
        # Scaling the loss is scaling the advantage: of that it uses the sign alone besides.
        scale = (1 / totals.advantage_std(baseline_T)).to(draft_NTV.dtype) if normalise_advantage else 1.0
        return scale * policy_gradient(
            draft_NTV,
            batch.action_NT,
            reward_NT,
            baseline_M=baseline_T[: reward_NT.shape[1]].to(draft_NTV.dtype),
            behaviour_log_probs_M=batch.behaviour_log_probs_NT.to(draft_NTV.dtype),
        )

    def lk_hybrid_NT() -> Tensor:
        overlap_NT = 1 - total_variation(draft_NTV.detach(), target_NTV)
        return lk_hybrid(draft_NTV, target_NTV, _masked_mean(overlap_NT, masks["exists"], dim=0))

    terms: dict[str, tuple[Callable[[], Tensor], str]] = {
        "forward_kl": (lambda: forward_kl(draft_NTV, target_NTV), "exists"),
        "reverse_kl": (lambda: reverse_kl(draft_NTV, target_NTV), "exists"),
        "total_variation": (lambda: total_variation(draft_NTV, target_NTV), "exists"),
        "lk_hybrid": (lk_hybrid_NT, "exists"),
        "entropy": (lambda: entropy(draft_NTV), "exists"),
        "accepted_ce": (lambda: accepted_ce(draft_NTV, batch.action_NT, reward_NT), "accepted"),
        "policy_gradient": (policy_gradient_NT, "has_reward"),
    }
    total = draft_NTV.new_zeros(())
    values = {}
    for name, (term, mask) in terms.items():
        weight = getattr(weights, name)
        if weight == 0 and name != "forward_kl":
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            value = term().where(masks[mask], 0).sum() / num_averaged[mask]
        if weight != 0:
            total = total - weight * value if name == "entropy" else total + weight * value
        values[name] = value.detach()
    return total, values


class RewardBaseline:
    """The usual reward at each depth: an exponential average of the batch means, b <- (1 - rate) b + rate mean(r).

    Per depth, since deeper drafts are accepted at another rate. The first mean seen at a depth is taken as it is.
    values_T: [max_depth] float32; 0 at depths never seen. Use it for a batch before that batch updates it.
    """

    def __init__(self, max_depth: int, *, rate: float = 0.01, device: torch.device | str = "cpu") -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}; 0.01 forgets over about 100 updates")
        self.rate = rate
        self.values_T = torch.zeros(max_depth, device=device)
        self._is_seen_T = torch.zeros(max_depth, dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, totals: BatchTotals) -> None:
        """Moves each depth towards its mean reward; depths without a reward keep their value. No device sync."""
        num_rewards_T = totals.num_rewards_T
        depths, has_any_T = slice(len(num_rewards_T)), num_rewards_T > 0
        old_T = self.values_T[depths]
        mean_T = (totals.num_accepted_T / num_rewards_T.clamp_min(1)).to(old_T.dtype)
        rate_T = torch.where(self._is_seen_T[depths], self.rate, 1.0) * has_any_T
        self.values_T[depths] = old_T + rate_T * (mean_T - old_T)
        self._is_seen_T[depths] |= has_any_T

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values_T.clone(), "is_seen": self._is_seen_T.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when the state was saved for another number of depths."""
        if state["values"].shape != self.values_T.shape:
            raise ValueError(f"baseline state holds {len(state['values'])} depths, expected {len(self.values_T)}")
        self.values_T.copy_(state["values"])
        self._is_seen_T.copy_(state["is_seen"])


def _at(log_probs_MV: Tensor, action_M: Tensor) -> Tensor:
    return log_probs_MV.gather(-1, action_M.unsqueeze(-1)).squeeze(-1)


def _masks(batch: ReplayBatch) -> dict[str, Tensor]:
    """The positions that the terms are averaged over: bool [N, T] each."""
    return {
        "exists": batch.mask_NT,
        "has_reward": batch.has_reward_NT,
        "accepted": batch.has_reward_NT & (batch.reward_NT == 1),
    }


def _masked_mean(values_NT: Tensor, mask_NT: Tensor, dim: int) -> Tensor:
    """Mean over one dimension where the mask is True; 0, with a zero gradient, where it never is."""
    return values_NT.where(mask_NT, 0).sum(dim) / mask_NT.sum(dim).clamp_min(1)
