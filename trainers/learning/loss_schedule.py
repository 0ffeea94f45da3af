"""Which loss terms count how much, and when: KL warm-up, ramp, RL.

Knows step numbers and the measured acceptance; computes no loss. A preset is two `LossWeights`, at the start and at the
end of the ramp; between them every weight moves linearly with the ramp's progress t in 0..1.
"""

from __future__ import annotations

from dataclasses import asdict

from dvi.records import LossWeights
from dvi.settings import SWITCHES, LearningSettings

# Reward terms alone collapse (arXiv 2510.05421, table 3: KL-only 1.44x, PG-only and CE-only 0.34x), so the presets
# that end in reward keep this much forward KL for ever.
KL_FLOOR = 0.1

_KL_WARMUP = LossWeights(forward_kl=0.5, reverse_kl=1.0)
_KL_ONLY = LossWeights(forward_kl=1.0)
_PG_ONLY = LossWeights(policy_gradient=1.0)
_CE_ONLY = LossWeights(accepted_ce=1.0)
_LK = LossWeights(lk_hybrid=1.0)

PRESETS: dict[str, tuple[LossWeights, LossWeights]] = {
    "kl_rl": (
        _KL_WARMUP,
        LossWeights(forward_kl=KL_FLOOR, reverse_kl=0.1, accepted_ce=0.5, policy_gradient=0.2),
    ),
    "kl_ce": (_KL_WARMUP, LossWeights(forward_kl=KL_FLOOR, reverse_kl=0.1, accepted_ce=0.5)),
    "kl_pg": (_KL_ONLY, LossWeights(forward_kl=1.0, policy_gradient=0.2)),
    "kl_only": (_KL_ONLY, _KL_ONLY),
    "pg_only": (_PG_ONLY, _PG_ONLY),
    "ce_only": (_CE_ONLY, _CE_ONLY),
    "lk": (_LK, _LK),
}

ACCEPTANCE_THRESHOLD = 0.5
ACCEPTANCE_EMA_RATE = 0.05
FLAT_TOLERANCE = 0.01


class LossSchedule:
    """Loss weights by step, or by step and measured acceptance.

    The preset kl_rl, the paper's idea, with t = clip((step - switch) / ramp_steps, 0, 1):
        forward_kl 0.5 (1-t) + 0.1 t,  reverse_kl 1.0 (1-t) + 0.1 t,  accepted_ce 0.5 t,  policy_gradient 0.2 t.
    These are the weights of the DVI authors' later code with two changes: the forward KL ends at a floor instead of 0,
    and the CE ramps from 0 instead of standing at 0.5, so that the warm-up is pure KL.

    preset        one of PRESETS. kl_ce is kl_rl without the policy gradient; kl_pg adds it to a KL that stays whole,
                  which isolates what the reward term is worth; kl_only, lk, pg_only, ce_only are one term for ever (the
                  last two are ablations: from scratch they collapse).
    by            "steps": switch = warmup_steps after the start. "acceptance": switch = the first step, at least
                  warmup_steps after the start, at which the acceptance's moving average is above 0.5 and has not
                  risen by 0.01 for flat_steps. Once switched it never goes back, until `reset`.
    warmup_steps, ramp_steps, flat_steps  in optimizer steps; ramp_steps 0 jumps.
    """

    def __init__(
        self,
        preset: str,
        *,
        by: str = LearningSettings.switch_by,
        warmup_steps: int = LearningSettings.warmup_steps,
        ramp_steps: int = LearningSettings.ramp_steps,
        flat_steps: int = 100,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"loss preset must be one of {', '.join(sorted(PRESETS))}, got {preset!r}")
        if by not in SWITCHES:
            raise ValueError(f"by must be {' or '.join(map(repr, SWITCHES))}, got {by!r}")
        for name, value in (("warmup_steps", warmup_steps), ("ramp_steps", ramp_steps), ("flat_steps", flat_steps)):
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.preset = preset
        self.by = by
        self.warmup_steps = warmup_steps
        self.ramp_steps = ramp_steps
        self.flat_steps = flat_steps
        self.reset(0)

    def weights(self, step: int, acceptance: float | None = None) -> LossWeights:
        """The weights for this step.

        acceptance: accepted / drafted since the last step, in 0..1; None where nothing was drafted. It is taken in
        once per step, so asking again for the same step changes nothing. Ignored when by="steps".
        """
        t = self._progress(step, acceptance)
        start, end = (asdict(weights) for weights in PRESETS[self.preset])
        # Not start + t (end - start), which misses the end by a rounding error.
        return LossWeights(**{name: (1 - t) * start[name] + t * end[name] for name in start})

    def phase(self, step: int, acceptance: float | None = None) -> str:
        """"kl" while no reward term counts, "ramp" while the weights move, "rl" from then on."""
        t = self._progress(step, acceptance)
        start, end = PRESETS[self.preset]
        if start == end:
            return "rl" if _has_reward_term(start) else "kl"
        return "kl" if t == 0 else "ramp" if t < 1 else "rl"

    def reset(self, step: int) -> None:
        """Starts the warm-up anew at `step`, as after a drift of the traffic; the acceptance seen so far is dropped."""
        self._start_step = step
        self._switch_step = step + self.warmup_steps if self.by == "steps" else None
        self._last_step = step - 1
        self._acceptance: float | None = None
        self._best_acceptance = 0.0
        self._best_step = step

    def _progress(self, step: int, acceptance: float | None) -> float:
        if self._switch_step is None and acceptance is not None and step > self._last_step:
            self._last_step = step
            self._observe(step, acceptance)
        if self._switch_step is None or step < self._switch_step:
            return 0.0
        if self.ramp_steps == 0:
            return 1.0
        return min((step - self._switch_step) / self.ramp_steps, 1.0)

    def _observe(self, step: int, acceptance: float) -> None:
        if self._acceptance is None:
            self._acceptance = acceptance
        self._acceptance += ACCEPTANCE_EMA_RATE * (acceptance - self._acceptance)
        if self._acceptance > self._best_acceptance + FLAT_TOLERANCE:
            self._best_acceptance = self._acceptance
            self._best_step = step
        is_warm = step - self._start_step >= self.warmup_steps
        is_flat = step - self._best_step >= self.flat_steps
        if is_warm and is_flat and self._acceptance > ACCEPTANCE_THRESHOLD:
            self._switch_step = step

    def state_dict(self) -> dict[str, int | float | None]:
        """Plain numbers, fit for JSON."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: dict[str, int | float | None]) -> None:
        for name in _STATE:
            setattr(self, f"_{name}", state[name])


_STATE = ("start_step", "switch_step", "last_step", "acceptance", "best_acceptance", "best_step")


def _has_reward_term(weights: LossWeights) -> bool:
    return weights.policy_gradient != 0 or weights.accepted_ce != 0
