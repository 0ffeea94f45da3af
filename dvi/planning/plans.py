"""What planning chooses, among what, under which bounds, and what it expects of a choice.

Knows numbers alone. Seconds of a request: its *first token* comes so long after its admission, its *token latency* is
the time from its first token to its last, by the tokens after the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from dvi.records import ServingPlan


@dataclass(frozen=True)
class PlanSpace:
    """The values each field of a plan may take, ascending."""

    split_layer: tuple[int, ...]
    num_draft_tokens: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)
    max_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prefill_tokens_per_step: tuple[int, ...] = (64, 128, 256, 512)
    rounds_per_prefill: tuple[int, ...] = (1, 4, 16)
    tensor_parallel: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{field.name} must be one value or more, ascending, got {values}")

    def __len__(self) -> int:
        return math.prod(len(getattr(self, field.name)) for field in fields(self))

    def __iter__(self) -> Iterator[ServingPlan]:
        """Every plan: what an exhaustive search would look at."""
        for values in itertools.product(*(getattr(self, field.name) for field in fields(self))):
            yield ServingPlan(*values)


@dataclass(frozen=True)
class LatencyBound:
    """What must hold for 99 requests of 100; infinity asks nothing."""

    token_s: float = math.inf
    first_token_s: float = math.inf

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be > 0 seconds, got {getattr(self, field.name)}; try 0.05")

    def __str__(self) -> str:
        limits = ((self.token_s, "a token"), (self.first_token_s, "to the first token"))
        words = [f"{1e3 * seconds:.4g} ms {what}" for seconds, what in limits if seconds < math.inf]
        return f"at most {' and '.join(words)} for 99 requests of 100" if words else "no latency bound"


@dataclass(frozen=True)
class Forecast:
    """What a plan gives under steady load: as many requests are there as it has rows, each followed by the next.

    tokens_per_s   generated tokens of all requests by all time, learning included.
    token_*_s      quantiles over requests of the token latency; first_token_*_s of the first token.
    """

    tokens_per_s: float
    token_p50_s: float
    token_p99_s: float
    first_token_p50_s: float
    first_token_p99_s: float

    def meets(self, bound: LatencyBound) -> bool:
        return self.worst_ratio(bound) <= 1

    def worst_ratio(self, bound: LatencyBound) -> float:
        """The larger of the two shares latency / bound: above 1 the bound is broken."""
        return max(self.token_p99_s / bound.token_s, self.first_token_p99_s / bound.first_token_s)
