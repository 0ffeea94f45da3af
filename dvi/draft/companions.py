"""Companions: a second opinion on every drafted token, from which a length rule reads how far to trust the draft.

After Speculative Verification (Kim et al. 2025, arXiv 2509.24328). With Pd the drafter's distribution and Pc the
companion's, at one position of a draft:

    S = sum over v of min(Pd(v), Pc(v))      how well the two agree, whatever was drawn
    A = min(1, Pc(a) / Pd(a))                what the companion thinks of the drawn token a

Both before temperature and filters. Knows draft logits, shallow states and the rows' texts; decides nothing. One that
is a model of its own is in `dvi.draft.companion_model`.
"""
# B rows, C = 2 companion scores, D hidden, T drafted tokens, V the drafter's vocabulary (trimmed or full).

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dvi.model.drafter import Drafter, DraftHead

SURE = 1e4  # a logit that leaves nothing to any other, in half precision too
# Of the average after a publish, what it was before: about the five newest versions. Of more it would lag behind a
# drafter that learns, and be a worse opinion rather than a second one.
EMA_MOMENTUM = 0.8


class Row(Protocol):
    """What a companion may know of the request in a row: its number, and its text, which ends in the newest token."""

    request_id: int

    @property
    def text_ids(self) -> list[int]: ...


class Companion(Protocol):
    """Drafts along without being asked for tokens. One companion serves one policy."""

    def follow(self, drafter: Drafter, rows: Sequence[Row]) -> None:
        """Before each round: who drafts, and for whom, row by row."""

    def begin(self, anchor_BD: Tensor) -> object:
        """State of one round, as `Drafter.begin` has one."""

    def step(self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, state: object, depth: int) -> Tensor:
        """Logits [B, V] over the drafter's vocabulary at the position whose drafter's logits are given.

        token_B, hidden_BD: the token before it (the last committed one at depth 0) and that token's h_k.
        """


def agreement(draft_logits_BV: Tensor, companion_logits_BV: Tensor) -> Tensor:
    """S of each row, float32 [B] in 0..1; 0 where either distribution is not finite."""
    shared_BV = draft_logits_BV.float().softmax(-1).minimum(companion_logits_BV.float().softmax(-1))
    return shared_BV.sum(-1).nan_to_num(nan=0.0).clamp(max=1.0)


def token_ratio(draft_logits_BV: Tensor, companion_logits_BV: Tensor, draft_ids_B: Tensor) -> Tensor:
    """A of each row's drawn token, float32 [B] in 0..1; 0 where it is not defined. draft_ids_B: ids among the V."""
    draft_B, companion_B = (
        logits_BV.float().log_softmax(-1).gather(1, draft_ids_B[:, None])[:, 0]
        for logits_BV in (draft_logits_BV, companion_logits_BV)
    )
    return (companion_B - draft_B).clamp(max=0.0).exp().nan_to_num(nan=0.0)


class Opinions:
    """What a companion says of one round's draft, position by position; of no companion, nothing.

    agreements      S of every position so far, float32 [B] each.
    may_tell_drawn  A of a position tells of the token drawn there: a length rule may hear it, before it decides on that
                    position, only where the output cannot depend on what is verified.
    """

    def __init__(
        self, companion: Companion | None, head: DraftHead, anchor_BD: Tensor, *, may_tell_drawn: bool
    ) -> None:
        self.agreements: list[Tensor] = []
        self._token_ratios: list[Tensor] = []
        self._companion, self._head, self._may_tell_drawn = companion, head, may_tell_drawn
        self._state = None if companion is None else companion.begin(anchor_BD)

    def add(self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, drawn_B: Tensor, depth: int) -> None:
        """Asks about one more position, where drawn_B was drawn; the rest is as in `Companion.step`."""
        if self._companion is None:
            return
        logits_BV = self._companion.step(token_B, hidden_BD, draft_logits_BV, self._state, depth)
        self.agreements.append(agreement(draft_logits_BV, logits_BV))
        self._token_ratios.append(token_ratio(draft_logits_BV, logits_BV, self._head.to_draft_ids(drawn_B)))

    @property
    def told_ratios(self) -> list[Tensor]:
        """A of the positions before the newest, and of that one, too, where it may be told."""
        return self._token_ratios if self._may_tell_drawn else self._token_ratios[:-1]

    def scores(self, num_drafts: int) -> Tensor | None:
        """(S, A) of the first num_drafts positions, float32 [B, T, 2]; None without any."""
        pairs = zip(self.agreements[:num_drafts], self._token_ratios[:num_drafts], strict=True)
        scores = [torch.stack(pair, -1) for pair in pairs]
        return torch.stack(scores, 1) if scores else None


class SelfCompanion:
    """The drafter itself, sharpened to its first choice.

    S is then the drafter's largest probability, its confidence; A is 1 for the first choice and 0 for any other token.
    """

    def follow(self, drafter: Drafter, rows: Sequence[Row]) -> None:
        """All it knows is told at every step."""

    def begin(self, anchor_BD: Tensor) -> None:
        return None

    def step(self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, state: None, depth: int) -> Tensor:
        first_B1 = draft_logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(draft_logits_BV).scatter(-1, first_B1, SURE)


class ExitCompanion:
    """A second exit at the split: the model's own final norm and head, on the shallow state that the drafter reads.

    An exit below the split would need states that no shallow pass keeps. At split layer 0 it knows one token only.
    """

    def __init__(self, final_norm: nn.Module) -> None:
        self._final_norm = final_norm
        self._drafter: Drafter | None = None

    def follow(self, drafter: Drafter, rows: Sequence[Row]) -> None:
        self._drafter = drafter

    def begin(self, anchor_BD: Tensor) -> None:
        return None

    def step(self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, state: None, depth: int) -> Tensor:
        return self._drafter.draft_head.frozen_logits(self._final_norm(hidden_BD))


class _PastDrafter(ABC):
    """Drafts along with what the drafter has been; equal to it until it publishes.

    With another drafter, or one whose vocabulary has been trimmed, the past begins anew.
    """

    def __init__(self) -> None:
        self._drafter: Drafter | None = None
        self._version = 0
        self._past: Drafter | None = None  # published into buffers of its own

    @torch.no_grad()
    def follow(self, drafter: Drafter, rows: Sequence[Row]) -> None:
        is_same = drafter is self._drafter and drafter.draft_head.vocab_size == self._past.draft_head.vocab_size
        if not is_same:
            self._drafter = drafter
            self._start(drafter)
        elif drafter.version != self._version:
            self._move_on(drafter)
        self._version = drafter.version

    def begin(self, anchor_BD: Tensor) -> object:
        return self._past.begin(anchor_BD)

    def step(self, token_B: Tensor, hidden_BD: Tensor, draft_logits_BV: Tensor, state: object, depth: int) -> Tensor:
        return self._past.step(hidden_BD, state, depth)

    def _start(self, drafter: Drafter) -> None:
        self._past = _copy_of(drafter)

    @abstractmethod
    def _move_on(self, drafter: Drafter) -> None:
        """The drafter has published another version."""


class OlderCompanion(_PastDrafter):
    """The version before the present one, as far as rounds have met both."""

    def _start(self, drafter: Drafter) -> None:
        super()._start(drafter)
        self._newest = _copy_of(drafter, is_published=False)

    def _move_on(self, drafter: Drafter) -> None:
        self._past.publish(self._newest, self._version)
        self._newest.load_state_dict(drafter.state_dict())


class EmaCompanion(_PastDrafter):
    """An exponential moving average of the versions' parameters."""

    def _move_on(self, drafter: Drafter) -> None:
        for average, newest in zip(self._past.parameters(), drafter.parameters(), strict=True):
            average.lerp_(newest, 1 - EMA_MOMENTUM)
        # A version gone NaN is taken back by its learner; an average would never come back. Without looking: that
        # would be a wait.
        is_finite = torch.stack([average.isfinite().all() for average in self._past.parameters()]).all()
        for average, newest in zip(self._past.parameters(), drafter.parameters(), strict=True):
            average.copy_(torch.where(is_finite, average, newest))
        self._past.publish(self._past, drafter.version)


def _copy_of(drafter: Drafter, *, is_published: bool = True) -> Drafter:
    """The drafter as it is, its parameters and published buffers copied; the frozen head stays shared."""
    head = drafter.draft_head
    kept = {id(tensor): tensor for tensor in head._frozen if tensor is not None}
    if not is_published:
        kept[id(head.served)] = None
    return copy.deepcopy(drafter, kept)
