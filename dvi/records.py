"""The values that flow through DVI, as small documented records.

Knows shapes and units; computes nothing but ratios of its own counts. Names of tensors end in their dimensions, those
of one dimension where the name alone does not say them. A letter is the same thing everywhere:

    B  rows of a batch                              D  hidden size
    T  drafted tokens; positions of a draft block   V  vocabulary, the drafter's own where it is trimmed
    U  T + 1 verified positions                     M  positions of any rows, in one list
    Q  query positions of one pass                  N  samples: blocks, probes, requests, as the file says
    S  positions of a text or of a cache            W  positions of a stretch of experience

Any other letter is a file's own, and stands with these at its head. A digit is a dimension of that size.

One file though it is long: half of it says what a field is, and it is looked up in one place.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING

from dvi.settings import SamplingSettings

if TYPE_CHECKING:  # the front door has records, and does not wait for torch
    from torch import Tensor

GREEDY_TEMPERATURE = 0.0
SHOWN_CHARS = 40  # of a text in a repr


def _repr_with_shapes(record: object) -> str:
    """The fields that are not at their default, of tensors dtype and shape alone: a look never waits for a device."""
    shown = []
    for entry in fields(record):
        value = getattr(record, entry.name)
        if entry.default is not MISSING and value is entry.default:
            continue
        if hasattr(value, "dtype"):
            value = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        shown.append(f"{entry.name}={value}")
    return f"{type(record).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it stops. Defaults are greedy.

    temperature         0 is greedy (argmax); otherwise logits are divided by it.
    top_k               keep the k most likely tokens, 0 keeps all.
    top_p, min_p        nucleus mass in (0, 1]; minimum probability as a share of the most likely token's, in [0, 1).
    repetition_penalty  > 0; logits of tokens in prompt or answer are divided (positive) or multiplied (negative) by it,
                        as Hugging Face's. 1 is off.
    presence_penalty    subtracted from the logit of every token that the answer has already; 0 is off. As
    frequency_penalty   OpenAI's, the prompt counts in neither; this one is subtracted as often as the answer has it.
    seed                fixes every random draw of the request, independent of its batch mates.
    max_new_tokens      hard limit on generated tokens.
    stop_token_ids      end the request; the stop token is kept in `token_ids` but not in `text`.
    stop_strings        end the request as soon as its text contains one; the text is cut before it.
    ignore_eos          go on after the model's own end-of-sequence token.
    coupling            "rejection" (exact rejection sampling) or "gumbel" (shared Gumbel noise, arXiv 2408.07978:
                        the tokens for a seed are the same for every drafter, at a lower acceptance).
    """

    temperature: float = SamplingSettings.temperature
    top_k: int = SamplingSettings.top_k
    top_p: float = SamplingSettings.top_p
    min_p: float = SamplingSettings.min_p
    repetition_penalty: float = SamplingSettings.repetition_penalty
    presence_penalty: float = SamplingSettings.presence_penalty
    frequency_penalty: float = SamplingSettings.frequency_penalty
    seed: int = SamplingSettings.seed
    max_new_tokens: int = SamplingSettings.max_new_tokens
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    coupling: str = "rejection"

    def __post_init__(self) -> None:
        _check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, ">= 0")
        _check(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 keeps every token)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1] (1 keeps every token)")
        _check(0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1) (0 keeps every token)")
        _check(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty", self.repetition_penalty, "> 0 (1 is off)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite (0 is off)")
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, ">= 1")
        _check(0 <= self.seed < 2**62, "seed", self.seed, "in 0..2**62-1")
        _check(all(self.stop_strings), "stop_strings", self.stop_strings, "non-empty strings")
        _check(self.coupling in ("rejection", "gumbel"), "coupling", self.coupling, "'rejection' or 'gumbel'")

    def __repr__(self) -> str:
        always = ("temperature", "max_new_tokens")  # the rest where it is not the default
        values = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self)}
        shown = (f"{name}={value!r}" for name, (value, usual) in values.items() if name in always or value != usual)
        return f"SamplingParams({', '.join(shown)})"

    @property
    def is_greedy(self) -> bool:
        return self.temperature == GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check(is_ok: bool, name: str, value: object, bound: str) -> None:
    if not is_ok:
        raise ValueError(f"{name} must be {bound}, got {value!r}")


@dataclass
class Draft:
    """What the drafter proposes in one round, before anything is verified.

    token_ids_BT    int64; columns at or beyond num_drafted_B are padding.
    num_drafted_B   int64, 0..T: how many columns of the row count as drafted.
    hidden_BUD      h_k of the U input positions (the last committed token, then the drafted ones).
    num_positions   how many of all the B x U input positions count, sum of num_drafted + 1; None where the host would
                    have to wait to know.
    probs_BTV       the distribution each token was drawn from, after all warping; None when drafting was greedy.
    log_probs_BT    log-probability under the drafter, unwarped, of each token; None when nobody learns from it.
    drafter_version the version whose weights drafted every token of this round.
    companion_scores_BTC  where a companion drafted along: (S, A) of each position, float32, see
                    `dvi.draft.companions`.
    """

    token_ids_BT: Tensor
    num_drafted_B: Tensor
    hidden_BUD: Tensor
    num_positions: int | None
    probs_BTV: Tensor | None
    log_probs_BT: Tensor | None
    drafter_version: int
    companion_scores_BTC: Tensor | None = None

    __repr__ = _repr_with_shapes


@dataclass
class Verdict:
    """The verifier's answer: the row commits its first num_accepted drafts and then next_token.

    num_accepted_B  int64, 0..num_drafted.
    next_token_B    int64: the recovered token (after a rejection) or the bonus token (after full acceptance).
    num_waived_B    int64, 0..num_accepted: accepted by a lossy rule alone; None where the rule is lossless.
    """

    num_accepted_B: Tensor
    next_token_B: Tensor
    num_waived_B: Tensor | None = None

    __repr__ = _repr_with_shapes


@dataclass
class Transitions:
    """Experience of one round (or one prefill) of one request: a stretch of W consecutive *committed* positions.

    Column i is absolute position start_position + i. The drafted token there was proposed at depth i of the round;
    it earned reward 1 if i < num_accepted and 0 if i == num_accepted < num_drafted. Other columns carry no reward:
    the bonus position drafted nothing. Positions after the first rejection are not committed and not here.

    token_ids_W         int64: the input token at each position.
    hidden_WD           h_k, the split layer's output.
    target_hidden_WD    h_L, the verifier's final hidden state after the final norm: the frozen head maps it to logits.
    num_drafted         0 for prefill and for rounds without drafts.
    num_accepted        0..num_drafted; W == num_accepted + 1 after a round, or num_accepted where the text ended there.
    draft_token_ids_W   int64; -1 where nothing was drafted.
    draft_log_probs_W   float32; 0 where nothing was drafted.
    is_prefill          True for prompt text: the verifier read it, nobody generated it.
    num_waived          0..num_accepted: of the accepted drafts, those that a lossy rule alone let pass.
    tenant              whose request it was: the API key's name; "" where there are no keys.
    """

    request_id: int
    start_position: int
    token_ids_W: Tensor
    hidden_WD: Tensor
    target_hidden_WD: Tensor
    num_drafted: int
    num_accepted: int
    draft_token_ids_W: Tensor
    draft_log_probs_W: Tensor
    drafter_version: int
    num_waived: int = 0
    is_prefill: bool = False
    tenant: str = ""

    __repr__ = _repr_with_shapes

    @property
    def is_honest(self) -> bool:
        """False when a lossy rule let one of its drafts pass: usable for KL, never as a reward."""
        return self.num_waived == 0

    def __len__(self) -> int:
        return self.token_ids_W.shape[0]


@dataclass
class ReplayBatch:
    """N draft blocks of T positions, as the drafter would have met them: one anchor, then depth 0..T-1.

    anchor_ND         h_L of the position before the block (zeros at the start of a sequence).
    hidden_NTD        h_k of the block's positions.
    target_hidden_NTD h_L of the block's positions.
    token_ids_NT      int64, the input tokens.
    mask_NT           bool: the position exists; every loss term is averaged over it.
    action_NT         int64: the token really drafted at this position and depth; 0 where has_reward_NT is False.
    reward_NT         float32: 1 accepted, 0 first rejection.
    has_reward_NT     bool: an honest drafted outcome of this very depth, up to and including the first rejection.
    behaviour_log_probs_NT  float32: log-probability of the action under the version that drafted it.
    staleness_N       int64: current drafter version minus the version that drafted the block's first action.
    """

    anchor_ND: Tensor
    hidden_NTD: Tensor
    target_hidden_NTD: Tensor
    token_ids_NT: Tensor
    mask_NT: Tensor
    action_NT: Tensor
    reward_NT: Tensor
    has_reward_NT: Tensor
    behaviour_log_probs_NT: Tensor
    staleness_N: Tensor

    __repr__ = _repr_with_shapes


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms at one step; see `trainers.learning.losses` for each formula."""

    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    accepted_ce: float = 0.0
    policy_gradient: float = 0.0
    entropy: float = 0.0
    total_variation: float = 0.0
    lk_hybrid: float = 0.0


@dataclass
class UpdateReport:
    """What one optimizer step did. `losses` holds each term's unweighted value in nats (TV in 0..1)."""

    step: int
    drafter_version: int
    phase: str
    losses: dict[str, float]
    weights: LossWeights
    grad_norm: float
    num_positions: int
    seconds: float
    published: bool
    skipped_reason: str | None = None


@dataclass
class RoundStats:
    """Raw counts of one request or of a whole run; ratios are properties.

    Accepted and new tokens are those of the answers: what a round accepted behind the end of its text is in neither.
    `committed_tokens` is the raw count of the verdicts, accepted + 1 each, ends or not. `num_drafted` is all that was
    drafted. `num_waived` of the accepted ones were accepted by a lossy rule alone; where an end cut a round with some,
    as many as may be.
    """

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_waived: int = 0
    committed_tokens: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    drafted_per_depth: list[int] = field(default_factory=list)
    accepted_per_depth: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def __repr__(self) -> str:
        return (
            f"RoundStats({self.new_tokens} tokens in {self.num_rounds} rounds, {self.num_accepted} of "
            f"{self.num_drafted} drafts accepted, MAT {self.mean_accepted_tokens:.2f}, "
            f"{self.decode_tokens_per_s:.1f} tokens/s)"
        )

    def count_round(
        self, *, num_drafted: int, num_accepted: int, num_waived: int = 0, num_kept: int | None = None,
        num_committed: int | None = None, num_reached: int | None = None,
    ) -> None:
        """Adds one round of one row. drafted_per_depth counts depths reached: up to the first rejection or the end.

        num_kept: tokens that became text, where the text ended inside what was committed; num_committed: all of that.
        num_reached: depths at which a drafted token was judged, where its nodes are no chain.
        """
        num_kept = num_accepted + 1 if num_kept is None else num_kept
        self.num_rounds += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_waived += num_waived
        self.committed_tokens += num_accepted + 1 if num_committed is None else num_committed
        self.new_tokens += num_kept
        num_reached = min(num_accepted + 1 if num_reached is None else num_reached, num_drafted, num_kept)
        while len(self.drafted_per_depth) < num_reached:
            self.drafted_per_depth.append(0)
            self.accepted_per_depth.append(0)
        for depth in range(num_reached):
            self.drafted_per_depth[depth] += 1
            self.accepted_per_depth[depth] += depth < num_accepted

    def add(self, other: RoundStats) -> None:
        """Adds another run's counts and seconds to this one's."""
        for name in ("num_rounds", "num_drafted", "num_accepted", "num_waived", "committed_tokens", "new_tokens",
                     "prompt_tokens", "prefill_s", "decode_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.drafted_per_depth, other.drafted_per_depth),
                             (self.accepted_per_depth, other.accepted_per_depth)):
            mine.extend([0] * (len(theirs) - len(mine)))
            for depth, count in enumerate(theirs):
                mine[depth] += count

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted, of all that was drafted; 0 when nothing was."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def honest_acceptance_rate(self) -> float:
        """The same without what a lossy rule alone let pass: what the drafter has earned."""
        return (self.num_accepted - self.num_waived) / self.num_drafted if self.num_drafted else 0.0

    @property
    def acceptance_per_depth(self) -> list[float]:
        """Acceptance at each depth given that the depth was reached."""
        return [a / max(d, 1) for a, d in zip(self.accepted_per_depth, self.drafted_per_depth, strict=True)]

    @property
    def mean_accepted_tokens(self) -> float:
        """MAT: new tokens per verify pass, with the recovered or bonus token, as Spec-Bench counts it."""
        return self.new_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def num_accepted_past_end(self) -> int:
        """Tokens that verdicts gave behind the ends of texts: drafted and verified for nobody."""
        return self.committed_tokens - self.new_tokens

    @property
    def decode_tokens_per_s(self) -> float:
        return self.new_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """The verifier's own log-probabilities at one generated token, before temperature, filters and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class GenerationResult:
    """One finished request. token_ids are the new tokens only; text is without stop strings and special tokens.

    accept_lengths: tokens that each round gave, recovered or bonus token included; they sum to len(token_ids).
    finish_reason: "stop", "length" or "error"; error: then, what went wrong, where something raised it.
    """

    index: int
    request_id: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RoundStats
    drafter_version: int
    level: str
    accept_lengths: list[int] = field(default_factory=list)
    transitions: list[Transitions] = field(default_factory=list)
    error: str | None = None

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN_CHARS else self.text[: SHOWN_CHARS - 3] + "..."
        return (
            f"GenerationResult({self.index}: {text!r}, {len(self.token_ids)} tokens, {self.finish_reason}, "
            f"MAT {self.stats.mean_accepted_tokens:.2f}, drafter v{self.drafter_version}, {self.level})"
        )


@dataclass(frozen=True)
class DrafterVersion:
    """One published state of a drafter.

    created_s      seconds since the epoch.
    source         "initial", "learner", "rollback" or "resume".
    step           optimizer steps behind it.
    canary_score   expected accepted prefix of a stored block, as the canary measured it before publishing; None where
                   it did not.
    is_live        it drafts now.
    is_kept        its weights are still held, so that `Learner.rollback` can return to it.
    """

    version: int
    created_s: float
    source: str
    step: int
    canary_score: float | None
    is_live: bool
    is_kept: bool


@dataclass(frozen=True)
class LearnerMemory:
    """What a learner keeps beside its parameters.

    replay_bytes   stored experience.
    states         of the drafter: versions that a rollback can return to, the best, and the one being published.
    canary_blocks  training blocks of which a candidate's score is taken.
    """

    replay_bytes: int
    states: int
    canary_blocks: int


@dataclass(frozen=True, order=True)
class ServingPlan:
    """How a server runs.

    split_layer              layers below it draft.
    num_draft_tokens         T, the most drafted in a round; 0 decodes plainly.
    max_rows                 requests that decode together.
    prefill_tokens_per_step  prompt positions read, at most, in a step that reads prompts.
    rounds_per_prefill       prompts are read before every so many-th round. 1 shares each step between reading and
                             decoding by the work there is (ExeGPT's workload-aware allocation); more lets the two take
                             turns (its round-robin allocation).
    tensor_parallel          processes that share every layer.
    """

    split_layer: int
    num_draft_tokens: int
    max_rows: int
    prefill_tokens_per_step: int
    rounds_per_prefill: int = 1
    tensor_parallel: int = 1
