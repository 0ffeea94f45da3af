"""Drafts by looking up what followed the same tokens before: in the request's own text, and in earlier answers.

Knows token ids, tenants and places; knows nothing of tensors, models or verdicts, and needs no training. After suffix
decoding (arXiv 2411.04975), with a bounded memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dvi.draft.calibration import Calibration
from dvi.draft.places import GAP, MAX_MATCH, Found, Places
from dvi.draft.traffic_store import LEAD_IN, SLOT_LEN, Text, TrafficStore
from dvi.draft.tree import MAX_WIDTH, Node, grow
from dvi.tenancy import tenant_id

OWN_WEIGHT = 3  # of a place in the request's own text, where one in another's weighs 1
DOUBT = 1.5  # added to the weights that a share is taken of: few places tell little
CHANCE = 0.55  # that a match of one token is one by chance, of two tokens its square, and so on

# Of a candidate, for the calibration: whether it is the first at its place, and the length of its match.
NUM_KINDS = 2 * (MAX_MATCH + 1)

_TRUST = [1 - CHANCE**length for length in range(MAX_MATCH + 1)]


class _Side(NamedTuple):
    """The places that one body of text leads to. mine: slots left out, for they repeat the request's own text."""

    places: Places
    weight: int
    mine: set[int]
    found: Found


class Evidence(NamedTuple):
    """A token that may come next.

    kind      0..NUM_KINDS-1.
    estimate  its share of all weight at matches at least so long, less DOUBT and the odds of chance.
    """

    token_id: int
    kind: int
    estimate: float


class LookupPlace:
    """Behind a request's text, or behind a path of tokens after it; see `dvi.draft.tree.Place`."""

    __slots__ = ("_calibration", "_last", "_sides")

    def __init__(self, sides: list[_Side], last: int, calibration: Calibration) -> None:
        self._sides, self._last, self._calibration = sides, last, calibration

    def candidates(self, width: int) -> list[tuple[int, float]]:
        """See `evidence`, which the calibration makes probabilities of."""
        probability = self._calibration.probability
        return [(token_id, probability(kind, estimate)) for token_id, kind, estimate in self.evidence(width)]

    def evidence(self, width: int) -> list[Evidence]:
        """What followed the longest match, most often first, then what followed shorter ones beside."""
        votes: list[list[tuple[int, int]]] = [[] for _ in range(MAX_MATCH + 1)]
        for places, weight, mine, found in self._sides:
            tokens = places.tokens
            for place, length in found.items():
                token_id = tokens[place]
                if token_id != GAP and not (mine and place // SLOT_LEN in mine):
                    votes[length].append((token_id, weight))
        weights: dict[int, int] = {}
        total, chosen = DOUBT, []
        for length in range(MAX_MATCH, 0, -1):
            if not votes[length]:
                continue
            num_known = len(weights)
            for token_id, weight in votes[length]:
                weights[token_id] = weights.get(token_id, 0) + weight
                total += weight
            if len(weights) > num_known:
                for token_id in sorted([*weights][num_known:], key=weights.__getitem__, reverse=True):
                    kind = length if chosen else MAX_MATCH + 1 + length
                    chosen.append(Evidence(token_id, kind, weights[token_id] / total * _TRUST[length]))
                    if len(chosen) == width:
                        return chosen
        return chosen

    def then(self, token_id: int) -> LookupPlace:
        """The place behind one more token."""
        sides = [
            _Side(places, weight, mine, places.follow(found, self._last, token_id))
            for places, weight, mine, found in self._sides
        ]
        return LookupPlace(sides, token_id, self._calibration)


class LookupRow:
    """One request's own text, and its part in the store."""

    def __init__(self, source: Lookup, prompt_ids: Sequence[int], *, tenant: int, teaches: bool) -> None:
        self._source, self._tenant, self._teaches = source, tenant, teaches
        self._text = Text(tenant)
        self._proposed: LookupPlace | None = None
        self._own = Places(array("i", [GAP] * LEAD_IN + [*prompt_ids, GAP]))
        for place in range(LEAD_IN + 1, len(self._own.tokens)):
            self._own.add(place)

    def place(self) -> LookupPlace:
        """Behind the text so far."""
        context = self._own.tokens[-1 - MAX_MATCH : -1]
        sides = [_Side(self._own, OWN_WEIGHT, set(), self._own.find(context))]
        if self._source.store is not None:
            places = self._source.store.places(self._tenant)
            sides.append(_Side(places, 1, self._text.slots, places.find(context)))
        return LookupPlace(sides, context[-1], self._source.calibration)

    def propose(self, *, budget: int, max_depth: int, width: int = MAX_WIDTH) -> list[Node]:
        """See `dvi.draft.sources.SourceRow`."""
        if budget <= 0 or max_depth <= 0:
            return []
        self._proposed = self.place()
        return grow(self._proposed, source=Lookup.name, budget=budget, max_depth=max_depth, width=width)

    def observe(self, token_ids: Sequence[int]) -> None:
        """Adds committed tokens to the request's own text, and to what the source learns unless that is not to be."""
        tokens = self._own.tokens
        if self._source.is_frozen or not self._teaches:
            self._text.end = None  # what may be learnt after this does not follow what was learnt before
        else:
            self._calibrate(token_ids)
            if self._source.store is not None:
                self._source.store.extend(self._text, tokens[-1 - LEAD_IN : -1], token_ids)
        self._proposed = None
        for token_id in token_ids:
            tokens[-1] = token_id
            tokens.append(GAP)
            self._own.add(len(tokens) - 1)

    def _calibrate(self, token_ids: Sequence[int]) -> None:
        """Scores what could have been proposed last, before any text has grown by the answer to it."""
        place = self._proposed
        if place is None:
            return
        for token_id in token_ids:
            for candidate, kind, estimate in place.evidence(MAX_WIDTH):
                self._source.calibration.observe(kind, estimate, candidate == token_id)
            place = place.then(token_id)

    def close(self) -> None:
        """Drops the request's own text; what the store has learnt stays."""
        self._teaches, self._proposed, self._own = False, None, Places(array("i", [GAP] * (LEAD_IN + 1)))


class Lookup:
    """A `dvi.draft.sources.Source` that proposes what the text so far and earlier answers suggest.

    store         of earlier answers; None: each request has its own text alone. Prompts are not learnt, only looked up
                  by their own request: they take a store's room and made no draft better.
    calibration   makes probabilities of what lookups suggest, from what became of such suggestions: counts alone, of
                  all tenants.
    is_frozen     nothing is learnt from any request.
    """

    name = "lookup"

    def __init__(self, store: TrafficStore | None = None) -> None:
        self.store, self.is_frozen = store, False
        self.calibration = Calibration(NUM_KINDS)

    def open(self, prompt_ids: Sequence[int], *, tenant: str = "", teaches: bool = True) -> LookupRow:
        """See `dvi.draft.sources.Source`."""
        return LookupRow(self, prompt_ids, tenant=tenant_id(tenant), teaches=teaches)

    def forget(self, tenant: str) -> int:
        """See `dvi.draft.sources.Source`. Requests under way keep their own text, and what they add is learnt anew."""
        return 0 if self.store is None else self.store.forget(tenant)

    def state_dict(self) -> dict[str, Tensor]:
        """Store and calibration, fit for safetensors."""
        calibration = torch.tensor(self.calibration.state(), dtype=torch.float64, device="cpu")
        return {"calibration": calibration} | ({} if self.store is None else self.store.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what state_dict gave in place of all that is held. A saved store is left out where there is none here.

        Raises ValueError when it came from something else.
        """
        self.calibration.load_state(state["calibration"].tolist())
        if self.store is not None and "tokens_NW" in state:
            self.store.load_state_dict(state)
