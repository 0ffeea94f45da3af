"""Best-first growth: a tree is the best of its size, in order, without twins, and a chain where width is 1."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from dvi.draft.tree import LEAST_PATH, ROOT, Node, grow


@dataclass(frozen=True)
class Random:
    """A place whose candidates are a function of the path to it."""

    seed: int
    path: tuple[int, ...] = ()
    num: int = 3

    def candidates(self, width: int) -> list[tuple[int, float]]:
        rng = random.Random(f"{self.seed} {self.path}")
        tokens = rng.sample(range(10), self.num)
        return [(token, rng.choice((0.9, 0.5, 0.3, 0.1))) for token in tokens][:width]

    def then(self, token_id: int) -> Random:
        return Random(self.seed, (*self.path, token_id), self.num)


def paths(nodes: list[Node]) -> list[float]:
    """Product of the estimates along each node's path."""
    products: list[float] = []
    for node in nodes:
        products.append(node.estimate * (products[node.parent] if node.parent != ROOT else 1.0))
    return products


def all_paths(place: Random, *, max_depth: int, width: int, product: float = 1.0) -> list[float]:
    """Of every node that may be proposed at all, slowly."""
    if max_depth == 0:
        return []
    found = []
    for token, estimate in place.candidates(width):
        found += [product * estimate]
        found += all_paths(place.then(token), max_depth=max_depth - 1, width=width, product=product * estimate)
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_other_tree_of_so_many_nodes_has_likelier_paths(seed, width):
    """Catches a growth by levels, by estimates instead of paths, and one that stops at the first hopeless child."""
    best = sorted(all_paths(Random(seed), max_depth=4, width=width), reverse=True)
    best = [path for path in best if path >= LEAST_PATH]
    for budget in (0, 1, 4, 8, 50):
        nodes = grow(Random(seed), source="x", budget=budget, max_depth=4, width=width)
        assert paths(nodes) == pytest.approx(best[:budget], rel=1e-12)  # products in another order


@pytest.mark.parametrize("seed", range(20))
def test_parents_come_first_siblings_differ_and_every_beginning_is_a_tree(seed):
    nodes = grow(Random(seed), source="x", budget=30, max_depth=5)
    assert nodes == grow(Random(seed), source="x", budget=30, max_depth=5)
    assert len({(node.parent, node.token_id) for node in nodes}) == len(nodes)
    for index, node in enumerate(nodes):
        assert ROOT <= node.parent < index and node.source == "x"
        assert node.depth == (0 if node.parent == ROOT else nodes[node.parent].depth + 1)
    for budget in range(len(nodes)):
        assert grow(Random(seed), source="x", budget=budget, max_depth=5) == nodes[:budget]


def test_a_chain_is_a_tree_of_width_one():
    nodes = grow(Random(3), source="x", budget=6, max_depth=6, width=1, least_path=0.0)
    assert [node.parent for node in nodes] == [ROOT, 0, 1, 2, 3, 4]
    assert [node.depth for node in nodes] == list(range(6))


@pytest.mark.parametrize(("budget", "max_depth"), [(0, 4), (4, 0), (0, 0)])
def test_without_budget_or_depth_nothing_is_even_asked(budget, max_depth):
    class Unasked(Random):
        def candidates(self, width: int) -> list[tuple[int, float]]:
            raise AssertionError("asked")

    assert grow(Unasked(0), source="x", budget=budget, max_depth=max_depth) == []


def test_paths_below_the_floor_are_left_out_and_equal_ones_keep_the_order_found():
    @dataclass(frozen=True)
    class Even:
        def candidates(self, width: int) -> list[tuple[int, float]]:
            return [(token, 0.25) for token in range(width)]

        def then(self, token_id: int) -> Even:
            return self

    nodes = grow(Even(), source="x", budget=100, max_depth=9)
    assert len(nodes) == 4 + 16 and min(paths(nodes)) == 0.25**2 > LEAST_PATH > 0.25**3
    assert [node.token_id for node in nodes] == list(itertools.chain(range(4), *[range(4)] * 4))
