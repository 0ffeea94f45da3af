"""Draft trees in the cache and in every path: what survives of any history of trees equals a fresh prefill of it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dvi.model.kv_cache import RollbackCache
from dvi.model.native import library
from dvi.model.split import SplitModel
from dvi.model.tree import MAX_NODES, Tree
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
TOLERANCE = {"views": 1e-9, "direct": 1e-5, "native": 1e-4}  # direct keeps the models' float32 norms
CASES = [("views", arch) for arch in ("llama", "mistral", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3")]
CASES += [("direct", arch) for arch in ("llama", "mistral", "qwen2", "qwen3")]
CASES += [
    pytest.param("native", arch, marks=pytest.mark.skipif(library.load() is None, reason="no compiled kernels"))
    for arch in ("llama", "mistral", "qwen2", "qwen3")
]


def split_of(path: str, arch: str, dtype: torch.dtype | None = None) -> SplitModel:
    is_native = path == "native"
    sizes = {"head_dim": 32} if is_native else {}
    model = tiny_model(
        arch, num_layers=3, seed=2, dtype=dtype or (torch.float32 if is_native else torch.float64), **sizes
    )
    return SplitModel(model, split_layer=1, path=path)


def random_parents(num_drafts: int, source: random.Random) -> list[int]:
    return [source.randrange(node) for node in range(1, num_drafts + 1)]


def random_path(parents: list[int], source: random.Random) -> list[int]:
    """From the root on to some node: a verdict may end anywhere."""
    path = [0]
    while children := [node for node, parent in enumerate(parents, start=1) if parent == path[-1]]:
        if source.random() < 0.25:
            break
        path.append(source.choice(children))
    return path


def verify(split: SplitModel, cache: RollbackCache, ids_BN: Tensor, tree: Tree, rows: slice) -> Tensor:
    """Logits of all nodes: shallow level by level where parents come first, as a drafter would, then one deep pass."""
    num_nodes = tree.num_nodes
    halves = [(0, num_nodes // 2), (num_nodes // 2, num_nodes)]
    hidden = [
        split.shallow(ids_BN[:, a:b], cache, cache.place(offset=a, width=b - a, rows=rows, tree=tree))
        for a, b in halves if b > a
    ]  # fmt: skip
    placement = cache.place(offset=0, width=num_nodes, rows=rows, tree=tree)
    return split.head(split.deep(torch.cat(hidden, dim=1), ids_BN, cache, placement))


def prefilled(split: SplitModel, texts: list[list[int]], capacity: int) -> tuple[RollbackCache, list[Tensor]]:
    """Each text in a row of its own; the logits of its positions."""
    cache, logits = split.make_cache(len(texts), capacity), []
    for row, text in enumerate(texts):
        rows, ids_1S = slice(row, row + 1), torch.tensor([text])
        place = cache.place(offset=0, width=len(text), rows=rows)
        logits.append(split.head(split.deep(split.shallow(ids_1S, cache, place), ids_1S, cache, place))[0])
        cache.commit([len(text)], rows=rows)
    return cache, logits


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("path", "arch"), CASES)
def test_any_history_of_trees_and_partial_acceptance_equals_a_fresh_prefill_of_what_survived(path, arch, seed):
    """Catches a node that sees a sibling, a position that follows the slot, keys left where the node lay, a window
    counted in slots, and rows mixed where one accepts another branch than its mate. Texts pass windows of 5."""
    split, source = split_of(path, arch), random.Random(seed)
    texts = [[source.randrange(64) for _ in range(length)] for length in (4, 9, 6)]
    cache, _ = prefilled(split, texts, 120)
    rows = slice(0, 3)
    for _ in range(4):
        parents = [random_parents(source.choice((0, 3, 7)), source) for _ in texts]
        tree = Tree.of_parents(parents, CPU)
        ids = [[source.randrange(64) for _ in range(tree.num_nodes)] for _ in texts]
        logits_BNV = verify(split, cache, torch.tensor(ids), tree, rows)
        paths = [random_path(row, source) for row in parents]
        cache.commit_paths(paths, rows=rows)
        for text, row_ids, kept in zip(texts, ids, paths, strict=True):
            text += [row_ids[node] for node in kept]
        _, fresh = prefilled(split, texts, 120)
        for row, kept in enumerate(paths):
            found, expected = logits_BNV[row, kept], fresh[row][-len(kept) :]
            torch.testing.assert_close(found, expected, rtol=TOLERANCE[path], atol=TOLERANCE[path])
    # A chain after all that reads what the trees left.
    ids_BQ = torch.tensor([[3, 5, 7]] * 3)
    found = verify(split, cache, ids_BQ, Tree.of_parents([[0, 1]] * 3, CPU), rows)
    _, fresh = prefilled(split, [text + [3, 5, 7] for text in texts], 130)
    for row in range(3):
        torch.testing.assert_close(found[row], fresh[row][-3:], rtol=TOLERANCE[path], atol=TOLERANCE[path])


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_nodes_of_a_tree_have_the_bits_of_their_text_in_the_kernels(arch, dtype):
    """Slots lie apart, sums run in the order of the text: a tree changes no bit."""
    split, source = split_of("native", arch, dtype), random.Random(3)
    for length in (5, 14, 40):
        text = [source.randrange(64) for _ in range(length)]
        cache, _ = prefilled(split, [text], 96)
        parents = random_parents(20, source)
        tree = Tree.of_parents([parents], CPU)
        ids = [source.randrange(64) for _ in range(21)]
        logits_1NV = verify(split, cache, torch.tensor([ids]), tree, slice(0, 1))
        for node in range(21):
            line, at = [node], node
            while at:
                at = parents[at - 1]
                line.insert(0, at)
            _, [expected_SV] = prefilled(split, [text + [ids[one] for one in line]], 128)
            assert torch.equal(logits_1NV[0, node], expected_SV[-1])


def test_a_chain_is_the_tree_in_which_each_parent_comes_just_before():
    cache = RollbackCache(rows=2, capacity=20, device=CPU)
    cache.set_lengths([3, 5])
    chain, tree = cache.place(offset=1, width=3), Tree.of_parents([[0, 1, 2], [0, 1, 2]], CPU)
    placed = cache.place(offset=1, width=3, tree=tree)
    for window in (None, 2):
        assert torch.equal(chain.mask_B1QS(window=window), placed.mask_B1QS(window=window))
    assert torch.equal(chain.positions_BQ, placed.positions_BQ) and torch.equal(chain.slots_BQ, placed.slots_BQ)


def test_shorter_rows_are_filled_with_leaves_of_the_root():
    tree = Tree.of_parents([[0, 1], []], CPU)
    assert tree.parents_BN.tolist() == [[0, 0, 1], [0, 0, 0]] and tree.depths_BN.tolist() == [[0, 1, 2], [0, 1, 1]]
    assert tree.ancestors_BN.tolist() == [[0b1, 0b11, 0b111], [0b1, 0b11, 0b101]]
    assert Tree.of_parents([[]], CPU).num_nodes == 1


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[1]], r"parent of node 1 must be in 0\.\.0, got 1"),
        ([[0] * MAX_NODES], "at most 63 nodes with its root, got 64"),
    ],
)
def test_impossible_trees_are_refused_with_the_bound(parents, message):
    with pytest.raises(ValueError, match=message):
        Tree.of_parents(parents, CPU)
