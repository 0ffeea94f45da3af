"""One request while it decodes, and what a round gave it.

Knows token ids and counts; knows nothing of tensors or of the batch it has a row in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dvi.draft.sources import SourceRow
from dvi.records import RoundStats, SamplingParams, TokenLogprobs


@dataclass
class Sequence:
    """One request while it runs. `accept_token(id)` returns a finish reason when the text must end there, else None.

    num_logprobs   None: no log-probabilities of its tokens; else `logprobs` also has so many likeliest tokens each.
    teaches        False: no transitions are cut from its rounds. tenant is copied into those that are.
    finish_reason  "stop", "length", or "error": the verifier's state was not finite, or something raised `error`, and
                   its last round is not kept.
    source_row     what proposes its drafts where a source does; see `dvi.draft.sources`.
    started_s      when it began what it does, prefilling or decoding.
    kept_per_round tokens that each of its rounds gave it.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    accept_token: Callable[[int], str | None]
    max_new_tokens: int
    num_logprobs: int | None = None
    teaches: bool = True
    tenant: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    kept_per_round: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    stats: RoundStats = field(default_factory=RoundStats)
    source_row: SourceRow | None = None
    started_s: float = 0.0

    @property
    def room(self) -> int:
        """Drafts that its next round could keep: the token after them is the last."""
        return self.max_new_tokens - len(self.token_ids) - 1

    @property
    def text_ids(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt_ids + self.token_ids

    def fail(self, error: Exception) -> None:
        """Ends it, and it alone, with an error."""
        self.finish_reason, self.error = "error", error

    def extend(self, committed: list[int]) -> int:
        """Appends committed tokens until one of them ends the request; returns how many were kept."""
        for count, token_id in enumerate(committed, start=1):
            self.token_ids.append(token_id)
            self.finish_reason = self.accept_token(token_id)
            if self.finish_reason is None and len(self.token_ids) >= self.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return count
        return len(committed)


@dataclass(frozen=True)
class RowOutcome:
    """One row's round in counts: num_waived of num_accepted of num_drafted; num_kept tokens became text.

    num_accepted   those that became text. num_committed: what the verdict gave, also behind the text's end.
    num_reached    depths at which a drafted token was judged.
    """

    sequence: Sequence
    num_drafted: int
    num_accepted: int
    num_waived: int
    num_kept: int
    num_committed: int
    num_reached: int

    def add_to(self, stats: RoundStats) -> None:
        stats.count_round(
            num_drafted=self.num_drafted, num_accepted=self.num_accepted, num_waived=self.num_waived,
            num_kept=self.num_kept, num_committed=self.num_committed, num_reached=self.num_reached,
        )
