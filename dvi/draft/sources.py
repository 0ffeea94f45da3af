"""What proposes drafts: the protocol of a source, and of the state it keeps for one request.

Knows token ids, tenants and nodes; knows nothing of tensors or of how a proposal is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dvi.draft.tree import MAX_WIDTH, Node


class SourceRow(Protocol):
    """A source's side of one request, from its prompt to its end."""

    def propose(self, *, budget: int, max_depth: int, width: int = MAX_WIDTH) -> list[Node]:
        """At most `budget` nodes of at most `max_depth` levels, likeliest path first; see `dvi.draft.tree.grow`.

        A function of committed text alone, so whoever verifies may draw afterwards and lose nothing.
        """

    def observe(self, token_ids: Sequence[int]) -> None:
        """Takes in what the verifier committed, in order. A row whose states were not finite is not observed."""

    def close(self) -> None:
        """The request has ended: nothing of it is held beyond what the source has learnt. May be called twice."""


class Source(Protocol):
    """Gives each request a row of its own.

    name       as nodes carry it.
    is_frozen  nothing is learnt from any request, as while something is measured; each still has its own text.
    """

    name: str
    is_frozen: bool

    def open(self, prompt_ids: Sequence[int], *, tenant: str = "", teaches: bool = True) -> SourceRow:
        """teaches False: nothing of this request stays, and none other learns from it."""

    def forget(self, tenant: str) -> int:
        """Drops all that was learnt from one tenant's requests; returns the number of tokens dropped."""
