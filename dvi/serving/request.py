"""What passes between the door and the engine: requests, news of them, and what each step did.

Knows token ids, settings and counts; knows nothing of HTTP, tensors or threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dvi.records import RoundStats, SamplingParams, TokenLogprobs
from dvi.settings import DraftSettings, VerifySettings

DEFAULT_DRAFTER = "default"


@dataclass(frozen=True)
class DraftChoice:
    """How a request is drafted for. Rows that share a choice decode together.

    drafter           "default", the one that learns, or the name of a loaded adapter.
    policy            a name of `dvi.settings.POLICIES`.
    num_draft_tokens  the most in a round; 0 decodes plainly.
    may_draft_less    a plan may set a lower number: the server chose this one, not the client.
    """

    drafter: str = DEFAULT_DRAFTER
    policy: str = DraftSettings.policy
    num_draft_tokens: int = DraftSettings.num_draft_tokens
    may_draft_less: bool = False


@dataclass(frozen=True)
class Timeouts:
    """Seconds since arrival after which a request that still waits, has no token yet, or has not ended is given up."""

    queue_s: float = math.inf
    first_token_s: float = math.inf
    total_s: float = math.inf


@dataclass
class Request:
    """One answer to produce. n answers to one prompt are n requests.

    request_id     the server's own number; nothing a client sent.
    tenant         the API key's name: fairness, prefix sharing, and share of an update go by it.
    num_logprobs   None: no log-probabilities; 0: of the chosen token only; else also of so many likeliest tokens.
    may_train      False: none of its tokens reaches the learner.
    domain         a label for the split of the figures, or "".
    arrived_s      time.perf_counter() when it came.
    call_id        the request_id of the first of those that are answered together; its own where it is alone.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    tenant: str = ""
    draft: DraftChoice = DraftChoice()
    num_logprobs: int | None = None
    may_train: bool = True
    domain: str = ""
    timeouts: Timeouts = Timeouts()
    arrived_s: float = 0.0
    call_id: int = -1

    def __post_init__(self) -> None:
        if self.call_id < 0:
            self.call_id = self.request_id


@dataclass
class RequestOutput:
    """News of one request after a step; `finish_reason` is set in the last one.

    text, token_ids            what is new since the last news. Text that may yet become a stop string or that ends in
                               half a character is held back; the ids are not, so the two need not match piece by piece.
    logprobs, text_offsets     of the tokens that begin in the text told so far, of all in the last news; the offsets
                               count characters of the answer's text.
    finish_reason              "stop", "length", "cancelled", "timeout", "error"; or "displaced": it had no row yet and
                               gave its place in a full queue to a tenant that holds fewer.
    error                      what went wrong, in words for the client: with "timeout" and "error" only.
    stats, num_cached_tokens   of the whole request, in the last news: counts, and prompt tokens found in the prefix
                               cache.
    queue_s, first_token_s     seconds from arrival to admission, and to the first new token; None until then.
    drafter_version            version that drafted the newest round.
    level                      what is promised of the tokens: "exact", "fast" or "lossy".
    verify_rule                the rule they were verified by, with its numbers.
    """

    request_id: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    stats: RoundStats | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    first_token_s: float | None = None
    drafter_version: int = 0
    level: str = "fast"
    verify_rule: str = VerifySettings.rule


@dataclass(frozen=True)
class Load:
    """What a server holds at this moment: the gauges' food, read when somebody asks.

    num_running, num_waiting  requests with a row, and those without one.
    num_cached_positions, num_prefix_positions  positions held by running rows, and by the prefix cache.
    drafter_version           of the default drafter.
    level, verify_rule        as of `RequestOutput`.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_cached_positions: int = 0
    num_prefix_positions: int = 0
    drafter_version: int = 0
    level: str = "fast"
    verify_rule: str = VerifySettings.rule


@dataclass
class StepReport:
    """What one `Engine.step` did, in raw counts: the monitor's food. What is there now is a `Load`.

    rounds           counts of all rounds of this step, all rows together (prefill_s and decode_s are seconds of it).
    num_rows         rows that decoded; num_prefill_tokens positions prefilled.
    num_running, num_waiting, num_preempted   after the step; preempted: during it.
    plain_s          seconds that plain decoding would have taken for the same new tokens, by measured costs;
                     0 where no cost is known. decode_s / plain_s is the inverse of the speed-up.
    drafter_version  of the default drafter.
    rounds_by_domain counts split by `Request.domain`, only of labelled requests.
    """

    seconds: float
    rounds: RoundStats = field(default_factory=RoundStats)
    num_rows: int = 0
    num_prefill_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    plain_s: float = 0.0
    drafter_version: int = 0
    rounds_by_domain: dict[str, RoundStats] = field(default_factory=dict)


class QueueFull(Exception):
    """The server holds as many requests as it may; `retry_after_s` is a guess of when those that wait will be gone."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the server is overloaded; try again in {math.ceil(retry_after_s)} s")
        self.retry_after_s = retry_after_s


class Draining(Exception):
    """The server is about to stop and takes no more requests."""
