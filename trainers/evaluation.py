"""Measurements beside training: a frozen drafter on held-out prompts, and how fast serving runs against plain decoding.

Knows a speculator and its prompts; knows nothing of learning. Both arms of every ratio decode the same prompts in the
same process, by the same clock and the same count of emitted ids, prefill apart.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import nn

from dvi import progress
from dvi.draft_length import FixedLength, LengthPolicy
from dvi.records import GenerationResult, RoundStats, SamplingParams
from dvi.speculator import PLAIN, SelfSpeculator
from dvi.verification import StrictRule

REQUESTS_PER_PROBE = 25  # times the batch size; with PROBE_TOKENS plain tokens a row that is about 1 % of the time
PROBE_TOKENS = 16
NUM_PROBES_KEPT = 5
SHORT_ANSWER = 16  # tokens along which a reloaded drafter is held against the one that was saved


@dataclass(frozen=True)
class Measurement:
    """One frozen drafter over held-out prompts, batch 1, a fixed number of drafted tokens.

    acceptance_per_depth  given that the depth was reached.
    tokens_per_s, plain_tokens_per_s, speed_up  medians over prompts, decoding only; speed_up is of the ratios.
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


def measure(
    speculator: SelfSpeculator, prompts: list[list[int]], params: SamplingParams, *, num_draft_tokens: int,
    doing: str = "measuring",
) -> Measurement:
    """Decodes every prompt with drafts and without, the order taking turns, after one prompt to warm up.

    doing: what whoever waits is told.
    By the strict rule, whatever the speculator's own: the figures are the drafter's, and comparable.
    """
    speculator = copy.copy(speculator)
    speculator.rule = StrictRule()
    drafting, stats = FixedLength(num_draft_tokens), RoundStats()
    speeds, plain_speeds, num_mismatches = [], [], 0
    with progress.doing(doing, total=len(prompts), noun="prompts") as stage:
        for policy in (drafting, PLAIN):
            _decode(speculator, prompts[0], params, policy)
        for index, prompt in enumerate(prompts):
            order = (drafting, PLAIN) if index % 2 == 0 else (PLAIN, drafting)
            results = {policy: _decode(speculator, prompt, params, policy) for policy in order}
            stats.add(results[drafting].stats)
            speeds.append(results[drafting].stats.decode_tokens_per_s)
            plain_speeds.append(results[PLAIN].stats.decode_tokens_per_s)
            num_mismatches += results[drafting].token_ids != results[PLAIN].token_ids
            stage.advance()
    return Measurement(
        num_prompts=len(prompts),
        num_draft_tokens=num_draft_tokens,
        drafter_version=speculator.drafter.version,
        acceptance=stats.acceptance_rate,
        acceptance_per_depth=stats.acceptance_per_depth,
        mean_accepted_tokens=stats.mean_accepted_tokens,
        tokens_per_s=statistics.median(speeds),
        plain_tokens_per_s=statistics.median(plain_speeds),
        speed_up=statistics.median(s / p for s, p in zip(speeds, plain_speeds, strict=True)),
        num_mismatches=num_mismatches if params.is_greedy else None,
    )


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
    """

    def __init__(
        self, speculator: SelfSpeculator, params: SamplingParams, *, batch_size: int,
        requests_per_probe: int | None = None, probe_tokens: int = PROBE_TOKENS,
    ) -> None:
        """requests_per_probe: default REQUESTS_PER_PROBE for each row. probe_tokens: plain ones, of each row."""
        self._speculator = speculator
        self._params = replace(params, max_new_tokens=probe_tokens, ignore_eos=True, stop_strings=())
        self._requests_per_probe = requests_per_probe or REQUESTS_PER_PROBE * batch_size
        self._prompts: deque[list[int]] = deque(maxlen=batch_size)
        self._ratios: deque[float] = deque(maxlen=NUM_PROBES_KEPT)
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
        if self._num_requests < self._requests_per_probe:
            return None
        decode_s = time.perf_counter() - self._start_s - self._prefill_s
        self._ratios.append(self._num_tokens / decode_s / self._plain_tokens_per_s())
        self._restart()
        return self._ratios[-1]

    def _plain_tokens_per_s(self) -> float:
        results = list(self._speculator.generate(
            list(self._prompts), self._params, batch_size=len(self._prompts), policy=PLAIN, keep_transitions=False
        ))
        # The row admitted last has the shortest time: the others' holds prefills of rows after them.
        return sum(len(r.token_ids) for r in results) / min(r.stats.decode_s for r in results)

    def _restart(self) -> None:
        self._num_requests = self._num_tokens = 0
        self._prefill_s, self._start_s = 0.0, time.perf_counter()


def _decode(
    speculator: SelfSpeculator, prompt: list[int], params: SamplingParams, policy: LengthPolicy
) -> GenerationResult:
    return next(speculator.generate([prompt], params, batch_size=1, policy=policy, keep_transitions=False))
