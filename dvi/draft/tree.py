"""The tree of tokens that a round may verify, grown best first from whatever knows what comes next.

Knows token ids and estimates, on the host; knows no tensors, models or verdicts. A chain is a tree of width 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple, Protocol

ROOT = -1  # the parent of nodes that follow the text itself
LEAST_PATH = 0.02  # a path of nodes that is accepted less often is not proposed
MAX_WIDTH = 4  # children of a node


class Node(NamedTuple):
    """One proposed token.

    parent    index of the node before it, less than its own, or ROOT. No two children of a parent are the same token.
    depth     0 where the parent is ROOT, else the parent's + 1.
    estimate  P(accepted | its parent is), in (0, 1].
    source    what proposed it: the name of a `Source`.
    """

    token_id: int
    parent: int
    depth: int
    estimate: float
    source: str


class Place(Protocol):
    """Where a source stands: behind the text and, in a tree, behind a path of nodes."""

    def candidates(self, width: int) -> Sequence[tuple[int, float]]:
        """At most `width` token ids, each once, with P(accepted | this place is reached), in (0, 1]."""

    def then(self, token_id: int) -> Place:
        """The place behind one more token; this one stays as it is."""


def grow(
    root: Place, *, source: str, budget: int, max_depth: int, width: int = MAX_WIDTH, least_path: float = LEAST_PATH
) -> list[Node]:
    """At most `budget` nodes in falling order of their paths, a path being the product of the estimates along it.

    A node's parent is in the list before it, so every beginning of the list is a tree too, the best of its size. Of
    equal paths the one found first comes first.

    max_depth  of levels; 0 gives no nodes. width: of children at most, 1 for a chain. least_path: no less is proposed.
    """
    nodes: list[Node] = []
    waiting: list[tuple[float, int, int, float, int, int, Place]] = []
    order = count()

    def offer(place: Place, parent: int, depth: int, path: float) -> None:
        for token_id, estimate in place.candidates(width):
            if path * estimate >= least_path:
                heapq.heappush(waiting, (-path * estimate, next(order), token_id, estimate, parent, depth, place))

    if budget > 0 and max_depth > 0:
        offer(root, ROOT, 0, 1.0)
    while waiting and len(nodes) < budget:
        falling, _, token_id, estimate, parent, depth, place = heapq.heappop(waiting)
        nodes.append(Node(token_id, parent, depth, estimate, source))
        if len(nodes) < budget and depth + 1 < max_depth:
            offer(place.then(token_id), len(nodes) - 1, depth + 1, -falling)
    return nodes
