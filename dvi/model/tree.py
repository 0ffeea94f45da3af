"""The shape of a round's draft: nodes that hang from the last committed token, each by its parent.

Knows indices; knows nothing of tokens, caches or who proposed what. A chain is the tree in which each node's parent is
the one before it. A node's position in the text follows its depth, its slot in the cache its index.
"""
# B rows, N nodes with the root, Q of them in one pass, S cache slots.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.model.transfers import to_device

MAX_NODES = 63  # with the root: who is above a node is one int64, a bit a node


@dataclass(frozen=True)
class Tree:
    """Shapes of B rows' drafts, on the device.

    parents_BN    int64: each node's parent, of a smaller index than its own. Node 0 is the last committed token; its
                  parent is itself.
    depths_BN     int64: steps from the root, 0 for the root.
    ancestors_BN  int64: bit i is set where node i lies on the way from the root to the node, both included.
    """

    parents_BN: Tensor
    depths_BN: Tensor
    ancestors_BN: Tensor

    @classmethod
    def of_parents(cls, parents: list[list[int]], device: torch.device) -> Tree:
        """From each row's parents, the root's left out; shorter rows are filled up with leaves of the root.

        Raises ValueError for a parent that does not come before its child, and for more nodes than MAX_NODES.
        """
        num_nodes = 1 + max(map(len, parents), default=0)
        if num_nodes > MAX_NODES:
            raise ValueError(f"a draft has at most {MAX_NODES} nodes with its root, got {num_nodes}")
        columns: tuple[list[list[int]], ...] = ([], [], [])
        for row in parents:
            of_row, depths, ancestors = [0], [0], [1]
            for node, parent in enumerate([*row, *[0] * (num_nodes - 1 - len(row))], start=1):
                if not 0 <= parent < node:
                    raise ValueError(f"the parent of node {node} must be in 0..{node - 1}, got {parent}")
                of_row.append(parent)
                depths.append(depths[parent] + 1)
                ancestors.append(ancestors[parent] | 1 << node)
            for column, values in zip(columns, (of_row, depths, ancestors), strict=True):
                column.append(values)
        return cls(*to_device(columns, device, dtype=torch.int64).unbind())

    @property
    def num_nodes(self) -> int:
        return self.parents_BN.shape[1]


@dataclass(frozen=True)
class PlacedTree:
    """A tree behind the committed positions of its rows, as Q of its nodes see it in one pass.

    depths_BN is the whole tree's, ancestors_BQ the queries', lengths_B the committed positions of their rows.
    """

    depths_BN: Tensor
    ancestors_BQ: Tensor
    lengths_B: Tensor

    def position_BS(self, num_slots: int) -> Tensor:
        """The position in the text of what each slot holds; of slots behind the tree nothing that counts."""
        slot_S, node_BS = self._nodes(num_slots)
        of_node_BS = self.lengths_B[:, None] + self.depths_BN.gather(1, node_BS.clamp(0, self.depths_BN.shape[1] - 1))
        return torch.where(node_BS < 0, slot_S, of_node_BS)

    def is_seen_BQS(self, num_slots: int) -> Tensor:
        """bool: whether each query may see each slot, windows apart: what is committed, and its own ancestors."""
        _, node_BS = self._nodes(num_slots)
        is_ancestor_BQS = (self.ancestors_BQ[:, :, None] >> node_BS.clamp(0, MAX_NODES)[:, None]) & 1
        return (node_BS < 0)[:, None] | is_ancestor_BQS.bool()

    def _nodes(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """The slots [S], and the node that stands in each [B, S], negative where a committed position does."""
        slot_S = torch.arange(num_slots, device=self.lengths_B.device)
        return slot_S, slot_S - self.lengths_B[:, None]
