"""How many of the proposed nodes a round verifies: those that earn more than they cost.

Knows estimates and measured seconds; knows no tokens and no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from dvi.draft.costs import CostTable
from dvi.draft.sources import Source
from dvi.draft.tree import ROOT, Node


def path_estimates(nodes: Sequence[Node]) -> list[float]:
    """The probability that each node is accepted: the product of the estimates from the root to it."""
    paths: list[float] = []
    for node in nodes:
        paths.append(node.estimate * (1.0 if node.parent == ROOT else paths[node.parent]))
    return paths


class NodeBudget:
    """Stands where a length policy may: a source proposes, and as many of its nodes are verified as bring most tokens a
    second, by their estimates and by what passes cost here.

    A round of B rows with n nodes each brings B + the sum of its nodes' path estimates, and takes verify_s[B (n + 1)];
    nodes come best first, so of all numbers the best is chosen, 0 among them (CaDDTree, arXiv 2606.01813, with n
    settled for all rows at once since a pass is a rectangle). Without costs all are verified, up to max_nodes.
    """

    def __init__(self, source: Source, max_nodes: int, costs: CostTable | None = None) -> None:
        if max_nodes < 0:
            raise ValueError(f"max_nodes must be >= 0, got {max_nodes}; 16 suits most machines")
        self.source, self.max_nodes, self.costs = source, max_nodes, costs

    def choose_nodes(self, paths: Sequence[Sequence[float]]) -> int:
        """Nodes per row. paths: of each row, `path_estimates` of what is proposed, best first."""
        most = min(self.max_nodes, max(map(len, paths), default=0))
        if self.costs is None:
            return most
        num_rows, best, best_rate, earned = len(paths), 0, 0.0, float(len(paths))
        for count in range(most + 1):
            if count:
                earned += sum(row[count - 1] for row in paths if len(row) >= count)
            rate = earned / self.costs.round_s(num_rows * (count + 1), 0)
            if rate > best_rate:
                best, best_rate = count, rate
        return best
