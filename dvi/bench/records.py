"""The values that pass between a benchmark's arms, its run and its report.

Knows names and counts; decodes nothing and measures nothing. An arm is one way of decoding; the run holds the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dvi.records import RoundStats


@dataclass
class ArmAnswer:
    """One arm's answer to one prompt.

    token_ids       new tokens, the end token included, nothing after it, at most max_new_tokens.
    accept_lengths  tokens per target forward, recovered or bonus token included; they sum to len(token_ids).
                    Plain decoding: all 1.
    stats           raw counts of rounds; None for decoders that are not ours.
    decode_s        seconds after the first step; None of a rival that was not asked to tell: see `ArmOptions`.
    """

    token_ids: list[int]
    accept_lengths: list[int]
    stats: RoundStats | None = None
    decode_s: float | None = None


class Arm(Protocol):
    """One way of decoding, holding whatever it needs."""

    def answer(self, prompts: list[list[int]], *, seed: int) -> list[ArmAnswer]:
        """Answers to the prompts (token ids), decoded together, in their order. The caller holds the clock.

        seed fixes the draws under sampling and is ignored when greedy. May raise: that is a failure, recorded as such.
        """


@dataclass(frozen=True)
class ArmPlan:
    """An arm that a run is asked for.

    name        unique, [a-z0-9_]: part of file names.
    title       for tables.
    build       a fresh arm, called once per repetition (a learner starts each repetition anew); None when n/a.
    na_reason   why it cannot run here; None when it can.
    is_learning its answers change it: what was interrupted cannot go on in the middle.
    batch_one   it decodes one prompt at a time.
    is_lossy    its tokens need not be the model's own: nobody compares them, and every report says so.
    """

    name: str
    title: str
    build: Callable[[], Arm] | None
    na_reason: str | None = None
    is_learning: bool = False
    batch_one: bool = False
    is_lossy: bool = False
    facts: dict[str, object] = field(default_factory=dict)


def written(settings: Any) -> dict[str, Any]:
    """The settings of a run as its files keep them, paths as text."""
    values = asdict(settings)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
