"""Measurements beside training: a drafter on held-out prompts, and how fast serving runs against plain decoding.

Knows a speculator and its prompts; knows nothing of learning. Both arms of every ratio decode the same prompts in the
same process, by the same clock and the same count of emitted ids, prefill apart.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import nn

from dvi import progress
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import FixedLength, LengthPolicy
from dvi.records import GenerationResult, RoundStats, SamplingParams
from trainers.learning.recordings import RecordedText, record, replay_rounds

PROBE_SHARE = 0.02  # of the time that plain decoding for comparison may take
PROBE_TOKENS = 16
NUM_PROBES_KEPT = 5
SHORT_ANSWER = 16  # tokens


@dataclass(frozen=True)
class Measurement:
    """One frozen drafter over held-out prompts.

    acceptance, mean_accepted_tokens  of rounds of num_draft_tokens drafts each, whatever the length rule, so that they
                          tell what was learnt (under sampling or penalties, of the length rule's own rounds);
                          acceptance_per_depth given that the depth was reached.
    tokens_per_s, plain_tokens_per_s, speed_up  by the speculator's own length rule, policy, at batch 1: medians over
                          prompts, decoding only; speed_up is of the ratios.
    plain_lead            how many times as fast plain decoding is in the faster of float32 and bfloat16, where that is
                          known: plain_tokens_per_s and speed_up are over that one's.
    num_mismatches        prompts whose tokens differ from plain decoding's; None under sampling, where they may.
    """

    num_prompts: int
    num_draft_tokens: int
    drafter_version: int
    acceptance: float
    acceptance_per_depth: list[float]
    mean_accepted_tokens: float
    tokens_per_s: float
    plain_tokens_per_s: float
    speed_up: float
    num_mismatches: int | None
    policy: str = "fixed"
    plain_lead: float = 1.0


def headline(before: Measurement, after: Measurement) -> str:
    """What a run brought, in one sentence: speed against plain decoding, the tokens, and how it was before."""
    if after.speed_up >= 1.005:
        speed = f"{after.speed_up:.2f}x faster than plain decoding"
    elif after.speed_up >= 0.995:
        speed = "as fast as plain decoding"
    else:
        speed = f"{after.speed_up:.2f} of plain decoding's speed"
    other = ", plain decoding in the dtype that is faster at it" if after.plain_lead > 1 else ""
    sentence = f"{speed} ({after.tokens_per_s:.3g} against {after.plain_tokens_per_s:.3g} tokens/s{other})"
    if after.num_mismatches is not None:
        num_equal = after.num_prompts - after.num_mismatches
        share = "all" if not after.num_mismatches else f"{num_equal} of"
        sentence += f", the same tokens in {share} {after.num_prompts} answers"
    learnt = f"{before.mean_accepted_tokens:.2f} -> {after.mean_accepted_tokens:.2f}"
    return f"{sentence}; it was {before.speed_up:.2f}x before learning (mean accepted tokens {learnt})"


class HeldOutRequests:
    """Prompts that are never trained on. Judged by the strict rule, whatever the speculator's own, so that the figures
    are the drafter's, and comparable.

    Greedy answers do not depend on the drafter: they are recorded once with their states, and a later drafter's rounds
    are found without decoding again.
    """

    def __init__(
        self, speculator: SelfSpeculator, prompts: list[list[int]], params: SamplingParams, *, num_draft_tokens: int,
        plain_lead: float = 1.0,
    ) -> None:
        """num_draft_tokens: of the rounds that acceptance is measured in; of 0 nothing could be, and 1 is taken.
        plain_lead: see `Measurement`."""
        self.speculator = speculator
        self.prompts, self._params, self.num_draft_tokens = prompts, params, max(num_draft_tokens, 1)
        self._plain_lead = plain_lead
        self._texts: list[RecordedText] = []

    def __len__(self) -> int:
        return len(self.prompts)

    def measure(self, doing: str = "measuring") -> Measurement:
        """Decodes every prompt with drafts and plainly, the order taking turns, after one prompt to warm up.

        A length rule that learns begins anew: what it thought of the drafter at the last measurement holds no more.
        doing: what whoever waits is told.
        """
        self.speculator = self.speculator.afresh(rule=StrictRule())
        drafted_stats, speeds, plain_speeds, num_mismatches = RoundStats(), [], [], 0
        with progress.doing(doing, total=2 * (len(self) + 1), noun="answers") as stage:
            for index, prompt in enumerate([self.prompts[0], *self.prompts]):
                arms: dict[LengthPolicy | None, GenerationResult] = {}
                for policy in (None, PLAIN) if index % 2 else (PLAIN, None):
                    arms[policy] = self._decode(prompt, policy)
                    stage.advance()
                drafted, plain = arms[None], arms[PLAIN]
                if not index:
                    continue
                drafted_stats.add(drafted.stats)
                speeds.append(drafted.stats.decode_tokens_per_s)
                plain_speeds.append(plain.stats.decode_tokens_per_s)
                num_mismatches += drafted.token_ids != plain.token_ids
                if self.is_replayable and len(self._texts) < index:
                    self._record(prompt, plain.token_ids)
        rounds = self.replay() if self.is_replayable else drafted_stats
        return Measurement(
            num_prompts=len(self),
            num_draft_tokens=self.num_draft_tokens,
            drafter_version=self.speculator.drafter.version,
            acceptance=rounds.acceptance_rate,
            acceptance_per_depth=rounds.acceptance_per_depth,
            mean_accepted_tokens=rounds.mean_accepted_tokens,
            tokens_per_s=statistics.median(speeds),
            plain_tokens_per_s=statistics.median(plain_speeds) * self._plain_lead,
            speed_up=statistics.median(s / p for s, p in zip(speeds, plain_speeds, strict=True)) / self._plain_lead,
            num_mismatches=num_mismatches if self._params.is_greedy else None,
            policy=self.speculator.policy,
            plain_lead=self._plain_lead,
        )

    @property
    def is_replayable(self) -> bool:
        """Whether the verifier's own choice at each position is all that decides: greedy, and nothing penalised."""
        params = self._params
        return params.is_greedy and params.repetition_penalty == 1 and params.presence_penalty == 0

    def replay(self) -> RoundStats:
        """The rounds that the drafter as it is now would make of the plain answers; decodes only what never was."""
        if not self._texts:
            for prompt in self.prompts:
                self._record(prompt, self._decode(prompt, PLAIN).token_ids)
        return replay_rounds(self.speculator.drafter, self._texts, num_draft_tokens=self.num_draft_tokens)

    def _record(self, prompt: list[int], answer: list[int]) -> None:
        self._texts.append(record(self.speculator.split, prompt + answer, prompt_len=len(prompt)))

    def _decode(self, prompt: list[int], policy: LengthPolicy | None) -> GenerationResult:
        options = {"batch_size": 1, "policy": policy, "keep_transitions": False}
        return next(self.speculator.generate([prompt], self._params, **options))


def weights_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two drafters have the same tensors, draft vocabulary included, to the bit."""
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


def drafts_alike(
    speculator: SelfSpeculator, other: nn.Module, prompt: list[int], params: SamplingParams, *, num_draft_tokens: int
) -> bool:
    """Whether another drafter has the same weights and drafts with them the same, to the bit, along one short answer.

    That is the same tokens with the same log-probabilities. The text alone would say nothing: it is the verifier's.
    """
    drafting, params = FixedLength(num_draft_tokens), replace(params, max_new_tokens=SHORT_ANSWER)
    own = speculator.drafter
    if not weights_alike(own, other):
        return False

    def trace() -> list[object]:
        result = next(speculator.generate([prompt], params, batch_size=1, policy=drafting))
        stretches = [(s.draft_token_ids_W.tolist(), s.draft_log_probs_W.tolist()) for s in result.transitions]
        return [result.token_ids, stretches]

    expected = trace()
    speculator.drafter = other
    try:
        return trace() == expected
    finally:
        speculator.drafter = own


class SpeedProbe:
    """Serving's running speed as a ratio to plain decoding, training included in serving's time.

    Now and then a few tokens of the newest prompts are decoded plainly, in a batch as wide as serving's.
    plain_tokens_per_s is what the newest probe found; None before the first.
    """

    plain_tokens_per_s: float | None = None

    def __init__(
        self, speculator: SelfSpeculator, params: SamplingParams, *, batch_size: int,
        requests_per_probe: int | None = None, probe_tokens: int = PROBE_TOKENS,
    ) -> None:
        """requests_per_probe: default as often as probes take no more than PROBE_SHARE of the time. probe_tokens: plain
        ones, of each row."""
        self._speculator = speculator
        self._params = replace(params, max_new_tokens=probe_tokens, ignore_eos=True, stop_strings=())
        self._batch_size, self._requests_per_probe = batch_size, requests_per_probe
        self._prompts: deque[list[int]] = deque(maxlen=batch_size)
        self._ratios: deque[float] = deque(maxlen=NUM_PROBES_KEPT)
        self._probe_s = 0.0  # what the newest probe took
        self._restart()

    @property
    def speed_up(self) -> float | None:
        """Median of the newest probes; None before the first."""
        return statistics.median(self._ratios) if self._ratios else None

    def leave_out(self, seconds: float) -> None:
        """Takes time off serving's: a pause in which nothing was served."""
        self._start_s += seconds

    def observe(self, prompt: list[int], result: GenerationResult) -> float | None:
        """Counts one finished request, and probes when it is time: then returns the ratio since the last probe."""
        self._prompts.append(prompt)
        self._num_requests += 1
        self._num_tokens += result.stats.new_tokens
        self._prefill_s += result.stats.prefill_s
        now_s = time.perf_counter()
        if not self._is_due(now_s - self._start_s):
            return None
        decode_s = now_s - self._start_s - self._prefill_s
        self.plain_tokens_per_s = self._measure_plain()
        self._ratios.append(self._num_tokens / decode_s / self.plain_tokens_per_s)
        self._restart()
        self._probe_s = self._start_s - now_s
        return self._ratios[-1]

    def _is_due(self, elapsed_s: float) -> bool:
        if self._requests_per_probe is not None:
            return self._num_requests >= self._requests_per_probe
        return self._num_requests >= self._batch_size and elapsed_s >= self._probe_s / PROBE_SHARE

    def _measure_plain(self) -> float:
        results = list(self._speculator.generate(
            list(self._prompts), self._params, batch_size=len(self._prompts), policy=PLAIN, keep_transitions=False
        ))
        # The row admitted last has the shortest time: the others' holds prefills of rows after them.
        return sum(len(r.token_ids) for r in results) / min(r.stats.decode_s for r in results)

    def _restart(self) -> None:
        self._num_requests = self._num_tokens = 0
        self._prefill_s, self._start_s = 0.0, time.perf_counter()
