"""The round of a tree: nodes that were chosen before anything is drawn, one pass over all of them, and a walk.

Knows a split model, a cache, the rows' state and nodes; knows nothing of who proposed them. At every node stands the
verifier's own token, drawn as it would be without drafts; the walk goes on to the child that is this token, and where
there is none it is the recovered token. That is lossless for every choice of nodes that does not look at the draw.
"""
# B rows, D hidden, N nodes with the root, U = depth of the deepest node + 1, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.decode.host_row import for_host
from dvi.decode.round import Judged, RowState, VerifiedRound
from dvi.decode.sampling import Role, gumbel_argmax, hash_gumbel, sample_from, uniform
from dvi.decode.verification import row_at
from dvi.draft.tree import ROOT, Node
from dvi.model.split import SplitModel
from dvi.model.transfers import to_device
from dvi.model.tree import Tree
from dvi.records import Draft, Verdict


@dataclass(frozen=True)
class TreeDraft:
    """Proposed nodes of B rows on the device.

    token_ids_BN  int64, the root's left out: N - 1 columns, those at or beyond num_nodes_B padding.
    num_nodes_B   int64, proposed nodes of each row.
    depth         of the deepest node of any row.
    is_chain      in every row each node follows the one before it.
    """

    tree: Tree
    token_ids_BN: Tensor
    num_nodes_B: Tensor
    depth: int
    is_chain: bool


def tree_draft(rows: Sequence[Sequence[Node]], device: torch.device) -> TreeDraft:
    """The rows' nodes, each behind its parent, as one rectangle."""
    width = max(map(len, rows), default=0)
    parents = [[node.parent - ROOT for node in row] for row in rows]
    is_chain = all(row == list(range(len(row))) for row in parents)
    if is_chain:
        parents = [list(range(width))] * len(rows)
    tree = Tree.of_parents(parents, device)
    numbers = [[len(row), *(node.token_id for node in row), *[0] * (width - len(row))] for row in rows]
    numbers_BX = to_device(numbers, device, dtype=torch.int64)
    depth = max((node.depth + 1 for row in rows for node in row), default=0)
    return TreeDraft(tree, numbers_BX[:, 1:], numbers_BX[:, 0], depth, is_chain)


def verify_tree(
    split: SplitModel, cache: object, state: RowState, draft: TreeDraft, *, drafter_version: int,
    keeps_logits: bool = False,
) -> VerifiedRound:
    """The round of these nodes, without a wait. Its tensors are those of the walk alone, as if it had been a chain:
    U positions, of which those behind the last accepted node repeat it."""
    ids_BN = torch.cat([state.last_token_B[:, None], draft.token_ids_BN], dim=1)
    of_tree = {} if draft.is_chain else {"tree": draft.tree}
    placement = cache.place(offset=0, width=draft.tree.num_nodes, rows=state.rows, **of_tree)
    hidden_BND = split.shallow(ids_BN, cache, placement)
    final_BND = split.deep(hidden_BND, ids_BN, cache, placement)
    logits_BNV = split.head(final_BND)
    target_BN = _choices(draft, logits_BNV, cache, state)
    path_BU, num_accepted_B = walk(draft.tree.parents_BN, ids_BN, draft.num_nodes_B, target_BN, depth=draft.depth)
    node_N = torch.arange(1, draft.tree.num_nodes, device=ids_BN.device)
    is_behind_BN = draft.tree.parents_BN[:, 1:] == path_BU[:, -1:]
    has_more_B1 = (is_behind_BN & (node_N <= draft.num_nodes_B[:, None])).any(1, keepdim=True)
    verdict = Verdict(num_accepted_B, target_BN.gather(1, path_BU[:, -1:]).squeeze(1))
    is_finite_B = final_BND.sum((1, 2), dtype=torch.float32).isfinite()
    path_ids_BU = ids_BN.gather(1, path_BU)
    chain = Draft(
        token_ids_BT=path_ids_BU[:, 1:], num_drafted_B=draft.num_nodes_B, hidden_BUD=_along(hidden_BND, path_BU),
        num_positions=None, probs_BTV=None, log_probs_BT=None, drafter_version=drafter_version,
    )
    anchor_BD = row_at(final_BND, path_BU[:, -1])
    judged = Judged(verdict, anchor_BD, for_host(chain, verdict, is_finite_B, path_BU, has_more_B1))
    logits_BUV = _along(logits_BNV, path_BU) if keeps_logits else None
    return VerifiedRound(chain, path_ids_BU, _along(final_BND, path_BU), judged, logits_BUV, is_walk=True)


def walk(
    parents_BN: Tensor, ids_BN: Tensor, num_nodes_B: Tensor, target_BN: Tensor, *, depth: int
) -> tuple[Tensor, Tensor]:
    """From the root on to the child that is the target's token, as long as there is one.

    ids_BN: tokens, the root's first. num_nodes_B: nodes that count, the root's left out. Returns path_BU, depth + 1
    nodes of which those behind the walk's end repeat it, and num_accepted_B, the steps that the walk took.
    """
    node_N = torch.arange(ids_BN.shape[1], device=ids_BN.device)
    counts_BN = (node_N > 0) & (node_N <= num_nodes_B[:, None])
    at_B = torch.zeros_like(num_nodes_B)
    path, num_accepted_B = [at_B], torch.zeros_like(num_nodes_B)
    for _ in range(depth):
        is_next_BN = (parents_BN == at_B[:, None]) & (ids_BN == target_BN.gather(1, at_B[:, None])) & counts_BN
        goes_on_B = is_next_BN.any(1)
        at_B = torch.where(goes_on_B, is_next_BN.long().argmax(1), at_B)
        num_accepted_B = num_accepted_B + goes_on_B
        path.append(at_B)
    return torch.stack(path, 1), num_accepted_B


def _choices(draft: TreeDraft, logits_BNV: Tensor, cache: object, state: RowState) -> Tensor:
    """The verifier's own token behind every node: its argmax, its Gumbel pick, or its draw for that depth."""
    sampling, lengths_B = state.sampling, cache.lengths_B[state.rows]
    seen = None
    if state.seen is not None:
        seen = state.seen.along(draft.token_ids_BN, draft.tree.ancestors_BN)
    if sampling.is_all_greedy:
        return sampling.argmax(logits_BNV, seen)
    probs_BNV, depths_BN = sampling.warp(logits_BNV, seen), draft.tree.depths_BN
    if sampling.is_gumbel:
        noise_BNV = hash_gumbel(sampling.seed_B, lengths_B[:, None] + depths_BN + 1, sampling.vocab_size)
        return gumbel_argmax(probs_BNV, noise_BNV)
    # One number a depth: only one node of each is ever walked to, and which does not depend on its own number.
    uniform_BN = uniform(sampling.seed_B[:, None], lengths_B[:, None], depths_BN, Role.CHOOSE)
    return sample_from(probs_BNV.flatten(0, 1), uniform_BN.flatten()).view_as(depths_BN)


def _along(x_BNX: Tensor, path_BU: Tensor) -> Tensor:
    """x of the path's nodes, [B, U, X]."""
    return x_BNX.gather(1, path_BU[..., None].expand(-1, -1, x_BNX.shape[-1]))
