"""From logits to distributions, and from counters to random draws, row by row.

Knows logits, seen tokens and seeds; knows nothing of models or of who drafts and who verifies: both sides call the same
`SamplingBatch.warp`. Everything on tensors is free of host syncs and of data-dependent shapes, so it can be captured in
a CUDA graph; only host facts (`is_all_greedy`, ...) choose between code paths.

Which draw belongs to what. Rejection-mode draws are keyed by (request seed, committed length at the start of the round,
depth in the round, role), not by absolute position alone. After a rejection the next round drafts the same absolute
positions again, and a learner may have trained on the discarded draft in between: drawing with the same number again
would correlate the drafter's weights with the draw and bias the law. The committed length grows with every round, so
each draw is used once. For the same reason two requests that one learner serves need different seeds (`dvi.seeds`;
neighbouring ones will do, keys draw independently). Gumbel noise is keyed by (request seed, absolute position, token)
on purpose: there the output is a function of the noise and the target alone, whatever the drafter learnt.
"""
# B rows, Q query positions, S positions of a text, T drafted tokens, U = T + 1, V vocabulary, X = V + 1 of which the
# last is for ids that do not count.

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dvi.model.greedy import likeliest
from dvi.model.transfers import to_device
from dvi.records import SamplingParams


class Role(IntEnum):
    """What a draw decides. One request, round and depth has one draw of each."""

    DRAFT = 0
    ACCEPT = 1
    RECOVER = 2
    GUMBEL = 3
    CHOOSE = 4


class SamplingBatch:
    """The sampling settings of B requests as tensors, and the warping they ask for.

    A row's result does not depend on the settings of its batch mates: a setting that is off changes no bit.

    is_all_greedy, has_penalties, has_filters, is_gumbel   host facts, any row (is_all_greedy: every row).
    is_blind_to_drafts                                     a host fact: the output is the verifier's, or the noise's
                                                           and the verifier's, whatever is drafted and verified.
    seed_B, is_greedy_B                                    int64 and bool, on the device.
    Raises ValueError for an empty batch and for rows that differ in `coupling`.
    """

    def __init__(self, params: list[SamplingParams], *, vocab_size: int, device: torch.device | str) -> None:
        couplings = sorted({p.coupling for p in params})
        if len(couplings) != 1:
            raise ValueError(f"all rows of a batch must share one coupling, got {couplings}; batch them apart")
        self.vocab_size = vocab_size
        self.is_gumbel = couplings == ["gumbel"]
        self.is_all_greedy = all(p.is_greedy for p in params)
        self.is_blind_to_drafts = self.is_all_greedy or self.is_gumbel
        self.has_penalties = any(p.has_penalties for p in params)
        self._has_ranking = any(_effective_top_k(p, vocab_size) < vocab_size or p.top_p < 1 for p in params)
        self._has_min_p = any(p.min_p > 0 for p in params)
        self.has_filters = self._has_ranking or self._has_min_p

        integers = [(p.seed, p.is_greedy, _effective_top_k(p, vocab_size)) for p in params]
        self.seed_B, is_greedy_B, top_k_B = to_device(integers, device, dtype=torch.int64).unbind(1)
        self.is_greedy_B, self._top_k_B11 = is_greedy_B.bool(), top_k_B[:, None, None]
        reals = [
            (
                1.0 if p.is_greedy else p.temperature, p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
                p.top_p if p.top_p < 1 else math.inf, math.log(p.min_p) if p.min_p else -math.inf,
            )
            for p in params
        ]  # fmt: skip
        columns = to_device(reals, device, dtype=torch.float64)[:, :, None, None].unbind(1)
        self._temperature_B11, self._repetition_B11, self._presence_B11, self._frequency_B11, *filters = columns
        self._top_p_B11, self._log_min_p_B11 = filters

    def warp(self, logits_BQV: Tensor, seen: Seen | None = None) -> Tensor:
        """The distribution each next token is drawn from, [B, Q, V], float64 for float64 logits and float32 otherwise.

        Penalties, then temperature, top-k (ties with the k-th are kept), top-p (the smallest set, most likely first
        and lowest id first among ties, whose mass reaches top_p), min-p, as Hugging Face orders them; renormalised.
        Greedy rows are one-hot at the argmax of the penalised logits, lowest id first among ties.
        seen: the tokens before each position (`SeenTokens`); needed only when has_penalties.
        A row of the result is a distribution or, if its logits hold NaN or +inf, may be NaN throughout.
        """
        logits_BQV = self._penalise(logits_BQV, seen)
        if self.is_all_greedy:
            return _one_hot_argmax(logits_BQV)
        probs_BQV = self._filter(logits_BQV).softmax(-1)
        return torch.where(self.is_greedy_B[:, None, None], _one_hot_argmax(logits_BQV), probs_BQV)

    def warp_logits(self, logits_BQV: Tensor, seen: Seen | None = None) -> Tensor:
        """The logits behind `warp`, [B, Q, V]: -inf where a filter excludes a token. Greedy rows have temperature 1."""
        return self._filter(self._penalise(logits_BQV, seen))

    def _filter(self, logits_BQV: Tensor) -> Tensor:
        """Penalised logits after temperature and filters."""
        scaled_BQV = logits_BQV
        if not self.is_all_greedy:
            scaled_BQV = logits_BQV / self._temperature_B11.to(logits_BQV.dtype)
        # Filters only choose what to keep, and one softmax in vocabulary order follows: bits never depend on a sort.
        if self._has_ranking:
            scaled_BQV = scaled_BQV.masked_fill(~self._ranked_keep(scaled_BQV), -math.inf)
        if self._has_min_p:
            floor_BQ1 = scaled_BQV.amax(-1, keepdim=True) + self._log_min_p_B11.to(scaled_BQV.dtype)
            scaled_BQV = scaled_BQV.masked_fill(scaled_BQV < floor_BQ1, -math.inf)
        return scaled_BQV

    def argmax(self, logits_BQV: Tensor, seen: Seen | None = None) -> Tensor:
        """The greedy token ids [B, Q], penalties applied: what `warp` puts all mass on in greedy rows."""
        return likeliest(self._penalise(logits_BQV, seen) if self.has_penalties else logits_BQV)

    def _penalise(self, logits_BQV: Tensor, seen: Seen | None) -> Tensor:
        if logits_BQV.dtype != torch.float64:
            logits_BQV = logits_BQV.float()
        if not self.has_penalties:
            return logits_BQV
        assert seen is not None, "penalties need the seen tokens"
        repetition_B11, presence_B11, frequency_B11 = (
            x.to(logits_BQV.dtype) for x in (self._repetition_B11, self._presence_B11, self._frequency_B11)
        )
        penalised_BQV = torch.where(logits_BQV < 0, logits_BQV * repetition_B11, logits_BQV / repetition_B11)
        penalised_BQV = torch.where(seen.anywhere_BQV, penalised_BQV, logits_BQV)
        penalised_BQV = penalised_BQV - frequency_B11 * seen.times_generated_BQV
        return torch.where(seen.times_generated_BQV > 0, penalised_BQV - presence_B11, penalised_BQV)

    def _ranked_keep(self, logits_BQV: Tensor) -> Tensor:
        """What top-k and then top-p keep, bool [B, Q, V]; at least the most likely token."""
        # Stable, or which of several tied tokens survives would depend on the machine. (bfloat16 logits tie often.)
        sorted_BQV, order_BQV = logits_BQV.sort(dim=-1, descending=True, stable=True)
        last_B1 = (self._top_k_B11 - 1).expand(-1, logits_BQV.shape[1], 1)
        kept_BQV = sorted_BQV >= sorted_BQV.gather(-1, last_B1)
        # float64: a float32 running sum over 100k tokens is off by more than the tail it decides about.
        probs_BQV = sorted_BQV.masked_fill(~kept_BQV, -math.inf).softmax(-1, dtype=torch.float64)
        mass_before_BQV = probs_BQV.cumsum(-1) - probs_BQV
        kept_BQV &= mass_before_BQV < self._top_p_B11
        return torch.zeros_like(kept_BQV).scatter(-1, order_BQV, kept_BQV)


def _effective_top_k(params: SamplingParams, vocab_size: int) -> int:
    return min(params.top_k, vocab_size) or vocab_size


def _one_hot_argmax(logits_BQV: Tensor) -> Tensor:
    return torch.zeros_like(logits_BQV).scatter(-1, logits_BQV.argmax(-1, keepdim=True), 1.0)


@dataclass(frozen=True)
class Seen:
    """The tokens before each of Q positions, for the penalties.

    anywhere_BQV         bool: in the prompt or in the answer; what the repetition penalty is about.
    times_generated_BQV  int32: how often in the answer alone; what the presence and frequency penalties are about.
    """

    anywhere_BQV: Tensor
    times_generated_BQV: Tensor


class SeenTokens:
    """Which tokens each row's prompt and committed answer contain, for the penalties. Fixed addresses, no syncs.

    Prompt and answer are told apart for good: a request that lost its row tells both again, each as what it is.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        # One spare column swallows what is not valid: a scatter with a fixed shape needs somewhere to put it.
        self._anywhere_BX = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=device)
        self._times_generated_BX = torch.zeros(rows, vocab_size + 1, dtype=torch.int32, device=device)
        self.vocab_size = vocab_size

    def add_prompt(self, token_ids_BS: Tensor, valid_BS: Tensor) -> None:
        """Marks each row's valid token ids as read; ids where valid_BS is False may be anything."""
        self._anywhere_BX.scatter_(1, torch.where(valid_BS, token_ids_BS, self.vocab_size), True)

    def add_generated(self, token_ids_BS: Tensor, valid_BS: Tensor) -> None:
        """Counts each row's valid token ids as generated, every one as often as it comes."""
        self.add_prompt(token_ids_BS, valid_BS)
        index_BS = torch.where(valid_BS, token_ids_BS, self.vocab_size)
        ones_BS = torch.ones_like(index_BS, dtype=torch.int32)
        self._times_generated_BX.scatter_add_(1, index_BS, ones_BS)

    def clear_row(self, row: int) -> None:
        """Forgets one row, for the next request that takes it."""
        self._anywhere_BX[row] = False
        self._times_generated_BX[row] = 0

    def with_drafts(self, token_ids_BT: Tensor) -> Seen:
        """Of U = T + 1 positions: number j has the committed tokens before it and the drafted tokens before j.

        Penalties apply per token, not per block, so each verified position sees its own past. All ids in 0..V-1.
        """
        num_drafts = token_ids_BT.shape[1]
        depth_T = torch.arange(num_drafts, device=token_ids_BT.device)
        is_before_UT = depth_T < torch.arange(num_drafts + 1, device=token_ids_BT.device)[:, None]
        return self._after(torch.where(is_before_UT, token_ids_BT[:, None, :], self.vocab_size))

    def after_drafts(self, token_ids_BT: Tensor) -> Seen:
        """Of the one position after all T drafted tokens: what one draft step needs."""
        return self._after(token_ids_BT[:, None, :])

    def along(self, token_ids_BN: Tensor, ancestors_BN: Tensor) -> Seen:
        """Of a tree's nodes, the root first: each has the committed tokens and those on its way from the root.

        token_ids_BN: the nodes' but the root's, one column less than ancestors_BN, which is `Tree`'s.
        """
        node_N = torch.arange(1, ancestors_BN.shape[1], device=ancestors_BN.device)
        is_above_BNN = (ancestors_BN[..., None] >> node_N & 1).bool()
        return self._after(torch.where(is_above_BNN, token_ids_BN[:, None, :], self.vocab_size))

    def _after(self, index_BQT: Tensor) -> Seen:
        """Of Q positions, each after the committed tokens and its own T drafted ones."""
        shape = -1, index_BQT.shape[1], -1
        anywhere_BQX = self._anywhere_BX[:, None, :].expand(shape).scatter(2, index_BQT, True)
        ones_BQT = torch.ones_like(index_BQT, dtype=torch.int32)
        times_BQX = self._times_generated_BX[:, None, :].expand(shape).scatter_add(2, index_BQT, ones_BQT)
        return Seen(anywhere_BQX[..., :-1], times_BQX[..., :-1])


# --- draws ------------------------------------------------------------------------------------------------------------

_UNIFORM_BITS = 48
# splitmix64's increment and multipliers (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as the
# signed integers with the same bits: torch has no unsigned 64-bit arithmetic, and int64 products wrap.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 >> copies the sign; a hash needs zeros shifted in.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _key(*words: Tensor | int) -> Tensor:
    """64 bits that depend on every bit and on the order of the words, which broadcast: splitmix64's finaliser, chained.

    Each word, the seed too, is mixed before the next one comes, or (seed, counter) pairs of nearby seeds would meet.
    """
    state: Tensor | int = 0
    for word in words:
        state = _mix((state + _INCREMENT) ^ word)
    return state


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def _uniform_from(state: Tensor) -> Tensor:
    return _shift_right(state, 64 - _UNIFORM_BITS).double() * 2.0**-_UNIFORM_BITS


def uniform(seed_B: Tensor, counter_B: Tensor, depth: int | Tensor, role: Role) -> Tensor:
    """The draw of this key: float64 in [0, 1 - 2**-48], the same number for the same key on every device.

    seed_B, counter_B, depth  int64, broadcast against each other; the counter is the committed length at the start of
                              the round. For all depths at once: seed_B[:, None], counter_B[:, None], arange(T).
    """
    return _uniform_from(_key(seed_B, counter_B, depth, int(role)))


def hash_gumbel(seed_B: Tensor, position_BQ: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, Q, V], float64, finite, keyed by (seed, absolute position, token).

    position_BQ: int64, the position the chosen token will take, so that draft and verify meet the same noise.
    """
    token_V = torch.arange(vocab_size, device=position_BQ.device)
    key_BQV = _key(seed_B[:, None, None], int(Role.GUMBEL), position_BQ[..., None], token_V)
    # Half a step keeps the uniform inside (0, 1).
    uniform_BQV = _uniform_from(key_BQV) + 2.0 ** -(_UNIFORM_BITS + 1)
    return -torch.log(-torch.log(uniform_BQV))


def gumbel_argmax(probs_BQV: Tensor, noise_BQV: Tensor) -> Tensor:
    """Token ids [B, Q] distributed as probs_BQV when the noise is Gumbel; never a token of probability zero.

    With the same noise on both sides, draft and target choose the same token with probability at least
    (1 - TV) / (1 + TV), and `verify_greedy` on the two choices is the whole verification (arXiv 2408.07978).
    """
    return (probs_BQV.double().log() + noise_BQV).argmax(-1)


def sample_from(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Token ids [B] by inverse CDF in float64: the first whose cumulative mass exceeds uniform * total.

    Never an id of probability zero, for any uniform in [0, 1) and also where parallel prefix sums are not monotone.
    probs_BV need not sum to 1. A row with NaN, or all zero, gives id 0.
    """
    cumulative_BV = probs_BV.double().cumsum(-1)
    # A long parallel scan may differ by a rounding between neighbours, so a zero-probability id could seem to add mass.
    cumulative_BV = torch.where(probs_BV > 0, cumulative_BV, -1.0)
    threshold_B1 = uniform_B[:, None] * cumulative_BV.amax(-1, keepdim=True)
    return (cumulative_BV > threshold_B1).to(torch.uint8).argmax(-1)
