"""What an ablation measured, cell by cell, and the figures that follow from it: gains, speed, break-even, verdicts.

Knows counts and seconds; decodes nothing, draws nothing. A cell is one arm with one seed; spreads are over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from dvi.bench.statistics import mean_and_std

BASELINE = "kl_only"
REWARD_SCHEDULES = ("kl_pg", "pg_only", "ce_only", "kl_ce", "kl_rl")
OFFLINE_ONE_PASS, OFFLINE_EPOCHS = OFFLINE = ("offline_one_pass", "offline_epochs")
CERTAINTY = 2.0  # standard errors that a difference over seeds must exceed to be called one


@dataclass(frozen=True)
class HeldOut:
    """A frozen drafter on the held-out answers, a fixed number of drafted tokens, after so much learning."""

    steps: int
    transitions: int
    acceptance: float
    acceptance_per_depth: list[float]
    mean_accepted_tokens: float


@dataclass(frozen=True)
class ServedRequest:
    """One request's counts, and three totals at the time it finished.

    tokens       new ones; each is a committed position that the learner observed, a transition.
    transitions  of the run so far, those of requests still running included.
    serving_s    of the run so far, apart from train_s, the learner's.
    """

    drafted: int
    accepted: int
    tokens: int
    transitions: int
    serving_s: float
    train_s: float


@dataclass(frozen=True)
class PlainBlock:
    """The same prompts decoded without drafts, right after they were served."""

    tokens: int
    seconds: float
    num_mismatches: int


@dataclass(frozen=True)
class Block:
    """Consecutive requests, in the order they finished; plain is None where time was saved."""

    requests: list[ServedRequest]
    plain: PlainBlock | None


@dataclass(frozen=True)
class Cell:
    """One arm with one seed.

    held_out     before, at marks, and last after all learning.
    blocks       of the traffic, several a quarter; None offline, where nothing is served.
    num_sampled, num_rewarded, num_on_policy  positions in the batches of all steps; those with a reward, and of these
                 the ones drafted by the version that served when the step was made.
    """

    arm: str
    seed: int
    num_steps: int
    num_transitions: int
    train_s: float
    num_rollbacks: int
    num_skipped: int
    num_drifts: int
    num_sampled: int
    num_rewarded: int
    num_on_policy: int
    num_cut_prompts: int
    held_out: list[HeldOut]
    blocks: list[Block] | None
    machine: dict[str, str | int | float | None]
    command: str

    @property
    def before(self) -> HeldOut:
        return self.held_out[0]

    @property
    def after(self) -> HeldOut:
        return self.held_out[-1]


def read_cell(content: Mapping[str, Any]) -> Cell:
    """The cell of `dataclasses.asdict`; other keys are passed over. Raises ValueError when it is none."""
    return TypeAdapter(Cell).validate_python(content)


@dataclass(frozen=True)
class BreakEven:
    """Tokens from which on serving and learning together have taken no longer than plain decoding of as many.

    "reached" within the run; "extrapolated" at the speed of its last quarter; "never" at that speed, tokens is None.
    """

    kind: Literal["reached", "extrapolated", "never"]
    tokens: float | None


def plain_tokens_per_s(blocks: Iterable[Block]) -> float:
    """Over the blocks that were decoded plainly too."""
    plain = [block.plain for block in blocks if block.plain is not None]
    return sum(p.tokens for p in plain) / sum(p.seconds for p in plain)


def traffic_acceptance(blocks: Iterable[Block]) -> float:
    """Mean acceptance over transitions: the area under the curve of acceptance, divided by its length."""
    requests = [r for block in blocks for r in block.requests if r.drafted]
    return float(np.average([r.accepted / r.drafted for r in requests], weights=[r.tokens for r in requests]))


def speed_against_plain(blocks: list[Block], *, last_quarter: bool = False) -> float:
    """Tokens a second, training's seconds included, as a ratio to plain decoding in the same part of the run."""
    counted = blocks[_last_quarter(blocks) :] if last_quarter else blocks
    return _tokens_per_s(blocks, counted) / plain_tokens_per_s(counted)


def break_even(blocks: list[Block]) -> BreakEven:
    """Plain decoding's time for a number of tokens is taken at its mean speed over the run."""
    plain_s = 1 / plain_tokens_per_s(blocks)
    requests = [r for block in blocks for r in block.requests]
    tokens_R = np.cumsum([r.tokens for r in requests])
    behind_R = np.array([r.serving_s + r.train_s for r in requests]) - tokens_R * plain_s
    if behind_R[-1] <= 0:
        late = np.flatnonzero(behind_R > 0)
        first = late[-1] + 1 if len(late) else 0
        return BreakEven("reached", float(tokens_R[first]))
    gained_s = plain_s - 1 / _tokens_per_s(blocks, blocks[_last_quarter(blocks) :])
    if gained_s <= 0:
        return BreakEven("never", None)
    return BreakEven("extrapolated", float(tokens_R[-1] + behind_R[-1] / gained_s))


def _last_quarter(blocks: list[Block]) -> int:
    """Index of its first block."""
    return len(blocks) * 3 // 4


def _tokens_per_s(blocks: list[Block], counted: list[Block]) -> float:
    """Of the last blocks of a run, `counted`, training included."""
    earlier = [r for block in blocks[: len(blocks) - len(counted)] for r in block.requests]
    start_s = earlier[-1].serving_s + earlier[-1].train_s if earlier else 0.0
    requests = [r for block in counted for r in block.requests]
    return sum(r.tokens for r in requests) / (requests[-1].serving_s + requests[-1].train_s - start_s)


def figures(cell: Cell) -> dict[str, float | None]:
    """Every number that is averaged over seeds, by its name in report.json; None where it does not apply."""
    before, after, blocks = cell.before, cell.after, cell.blocks
    thousands = cell.num_transitions / 1000
    return {
        "held_out_mat": after.mean_accepted_tokens,
        "held_out_acceptance": after.acceptance,
        "mat_gain_per_1000_transitions": (after.mean_accepted_tokens - before.mean_accepted_tokens) / thousands,
        "acceptance_gain_per_1000_transitions": (after.acceptance - before.acceptance) / thousands,
        "traffic_acceptance": None if blocks is None else traffic_acceptance(blocks),
        "speed_against_plain": None if blocks is None else speed_against_plain(blocks),
        "speed_in_last_quarter": None if blocks is None else speed_against_plain(blocks, last_quarter=True),
        "steps": float(cell.num_steps),
        "transitions": float(cell.num_transitions),
        "train_s": cell.train_s,
        "rewarded_share": None if blocks is None else cell.num_rewarded / cell.num_sampled,
        "on_policy_share": cell.num_on_policy / cell.num_rewarded if cell.num_rewarded else None,
        "rollbacks": float(cell.num_rollbacks),
    }


def summarise(cells: list[Cell]) -> dict[str, object]:
    """One arm over its seeds: each figure as {"mean", "std", "values"}, std None of one seed; null where n/a.

    acceptance_per_depth: means, down to the last depth that was reached with every seed.
    """
    per_seed = [figures(cell) for cell in cells]
    per_depth = zip(*(cell.after.acceptance_per_depth for cell in cells), strict=False)
    return {
        "arm": cells[0].arm,
        "seeds": [cell.seed for cell in cells],
        "figures": {name: _spread([found[name] for found in per_seed]) for name in per_seed[0]},
        "acceptance_per_depth": [round(float(np.mean(depth)), 4) for depth in per_depth],
        "break_even": [vars(break_even(cell.blocks)) for cell in cells if cell.blocks is not None],
        "mismatches": sum(block.plain.num_mismatches for cell in cells for block in cell.blocks or () if block.plain),
    }


def _spread(values: list[float | None]) -> dict[str, object] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean, std = mean_and_std(known)
    return {"mean": mean, "std": std, "values": values}


@dataclass(frozen=True)
class Comparison:
    """Held-out MAT of an arm minus that of another, paired over the seeds that both have.

    outcome: "beats" or "loses to" where the mean difference exceeds CERTAINTY standard errors, else "no difference
    shown"; "one seed" leaves no error to hold it against.
    """

    arm: str
    against: str
    difference: float
    std: float | None
    num_seeds: int
    outcome: Literal["beats", "loses to", "no difference shown", "one seed"]

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        facts = f"held-out MAT {self.difference:+.3f}{spread} over {self.num_seeds} seeds"
        if self.outcome in ("beats", "loses to"):
            return f"{self.arm} {self.outcome} {self.against}: {facts}."
        reason = "no difference shown" if self.num_seeds > 1 else "one seed shows nothing"
        return f"{self.arm} against {self.against}: {reason}, {facts}."


def compare(arms: dict[str, list[Cell]], arm: str, against: str) -> Comparison | None:
    """None when the two have no seed in common."""
    rival = {cell.seed: cell.after.mean_accepted_tokens for cell in arms[against]}
    differences = [c.after.mean_accepted_tokens - rival[c.seed] for c in arms[arm] if c.seed in rival]
    if not differences:
        return None
    difference, std = mean_and_std(differences)
    if std is None:
        return Comparison(arm, against, difference, std, 1, "one seed")
    bound = CERTAINTY * std / len(differences) ** 0.5
    is_clear = abs(difference) > bound
    outcome = "no difference shown" if not is_clear else "beats" if difference > 0 else "loses to"
    return Comparison(arm, against, difference, std, len(differences), outcome)


def baseline_of(arm: str, arms: Iterable[str]) -> str | None:
    """kl_only with the same settings as the arm where there is one, else plain kl_only, else None; None for itself."""
    _, _, overrides = arm.partition(":")
    candidates = (f"{BASELINE}:{overrides}", BASELINE) if overrides else (BASELINE,)
    return next((c for c in candidates if c in arms and c != arm), None)


def best_reward_arm(arms: dict[str, list[Cell]]) -> str | None:
    """The arm with reward terms whose mean held-out MAT is highest; None without any."""
    rewarded = [arm for arm in arms if arm.partition(":")[0] in REWARD_SCHEDULES]
    return max(
        rewarded, default=None, key=lambda arm: np.mean([cell.after.mean_accepted_tokens for cell in arms[arm]])
    )
