"""Rounds of chosen nodes: the output is the verifier's for every tree, mode and path, and follows its law exactly."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dvi import SamplingParams, SelfSpeculator
from dvi.decode.speculator import PLAIN
from dvi.decode.tree_round import tree_draft, walk
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import FixedLength
from dvi.draft.node_budget import NodeBudget, path_estimates
from dvi.draft.tree import ROOT, Node
from dvi.model.native import library
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
PATHS = [
    "views", "direct",
    pytest.param("native", marks=pytest.mark.skipif(library.load() is None, reason="no compiled kernels")),
]  # fmt: skip
SETTINGS = {
    "greedy": {}, "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "gumbel": {"temperature": 0.8, "coupling": "gumbel", "seed": 3},
}  # fmt: skip


class Scripted:
    """A source whose nodes come from a function of the text so far; counts what it was asked and told."""

    name = "scripted"

    def __init__(self, propose):
        self._propose, self.observed, self.closed = propose, [], 0

    def open(self, prompt_ids, *, tenant="", teaches=True):
        row, text = type("Row", (), {})(), list(prompt_ids)

        def propose(*, budget, max_depth, width=4):
            nodes = [node for node in self._propose(text, width) if node.depth < max_depth][:budget]
            assert all(node.parent < index for index, node in enumerate(nodes))
            return nodes

        def observe(token_ids):
            text.extend(token_ids)
            self.observed.append(list(token_ids))

        def close():
            self.closed += 1

        row.propose, row.observe, row.close = propose, observe, close
        return row

    def forget(self, tenant):
        return 0


def tree_of(texts: list[list[int]], wrong: random.Random):
    """Nodes on and off the path of known texts: each true token beside a false one, with a child of its own."""

    def propose(text: list[int], width: int) -> list[Node]:
        known = next((one[len(text) :] for one in texts if one[: len(text)] == text), [])[:5]
        nodes, on_path = [], ROOT
        for depth, token in enumerate(known):
            if width > 1:
                nodes.append(Node((token + 1 + wrong.randrange(50)) % 64, on_path, depth, 0.5, "scripted"))
                if depth < 4:
                    nodes.append(Node(token, len(nodes) - 1, depth + 1, 0.5, "scripted"))
            nodes.append(Node(token, on_path, depth, 0.5, "scripted"))
            on_path = len(nodes) - 1
        return nodes

    return propose


def speculator_of(path: str, mode: str = "fast") -> SelfSpeculator:
    is_native = path == "native"
    model = tiny_model(
        "mistral", num_layers=3, dtype=torch.float32 if is_native else torch.float64,
        **({"head_dim": 32} if is_native else {}),
    )  # fmt: skip
    return SelfSpeculator(model, None, split_layer=1, path=path, mode=mode)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("path", PATHS)
def test_trees_give_the_tokens_of_plain_decoding_in_fewer_rounds(path, settings):
    """Catches a walk to a sibling, penalties of the wrong branch, keys left at the nodes' slots, rows mixed in a batch
    whose rows end and are replaced, and a tree that runs past a text's end."""
    speculator = speculator_of(path)
    prompts = [[3, 5, 7], [9, 2, 4, 6, 8, 1], [11], [13, 17, 19, 23]]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, **settings) for n in (13, 30, 21, 8)]
    plain = {r.index: r for r in speculator.generate(prompts, params, policy=PLAIN, batch_size=3)}
    texts = [prompt + plain[index].token_ids for index, prompt in enumerate(prompts)]
    source = Scripted(tree_of(texts, random.Random(1)))
    found = {r.index: r for r in speculator.generate(prompts, params, policy=NodeBudget(source, 20), batch_size=3)}
    for index in range(len(prompts)):
        assert found[index].token_ids == plain[index].token_ids
        stats = found[index].stats
        assert stats.num_rounds < plain[index].stats.num_rounds / 2 and stats.mean_accepted_tokens > 2
        assert sum(stats.accepted_per_depth) == stats.num_accepted <= sum(stats.drafted_per_depth) <= stats.num_drafted
    assert source.closed == 4 and sum(map(len, source.observed)) == sum(len(p.token_ids) for p in plain.values())


@pytest.mark.parametrize("path", PATHS)
def test_a_lookup_in_the_requests_own_text_changes_no_token(path):
    speculator = speculator_of(path)
    prompts = [[3, 5, 7, 3, 5, 7, 3], [9, 2, 9, 2, 9]]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    plain = {r.index: r.token_ids for r in speculator.generate(prompts, params, policy=PLAIN)}
    lookup = speculator.afresh(source="lookup", policy="fixed")
    assert {r.index: r.token_ids for r in lookup.generate(prompts, params)} == plain


def test_padded_exact_mode_verifies_chains():
    """Its passes have one shape and no room for a tree; where nodes branch it asks for chains."""
    speculator = speculator_of("direct", mode="exact")
    prompt, params = [3, 5, 7], SamplingParams(max_new_tokens=20, ignore_eos=True)
    (plain,) = speculator.generate([prompt], params, policy=PLAIN)
    source = Scripted(tree_of([prompt + plain.token_ids], random.Random(1)))
    (found,) = speculator.generate([prompt], params, policy=NodeBudget(source, 8))
    assert found.token_ids == plain.token_ids and found.stats.num_rounds < plain.stats.num_rounds / 2


def test_the_walks_output_follows_the_verifiers_law_for_any_tree():
    """Every choice at every node enumerated, with its probability: the law of what is committed is the target's own,
    in float64, for a tree with siblings, a wrong branch and a hole in its vocabulary."""
    vocabulary, generator = 3, torch.Generator().manual_seed(0)

    def law(text: tuple[int, ...]) -> list[float]:
        generator.manual_seed(hash(text) % 1000)
        return torch.rand(vocabulary, generator=generator, dtype=torch.float64).softmax(0).tolist()

    nodes = [Node(0, ROOT, 0, 0.5, "s"), Node(2, ROOT, 0, 0.3, "s"), Node(1, 0, 1, 0.5, "s"), Node(1, 1, 1, 0.5, "s")]
    texts = [(), (0,), (2,), (0, 1), (2, 1)]  # what stands before each node's choice
    draft = tree_draft([nodes], CPU)
    ids_1N = torch.tensor([[9, *(node.token_id for node in nodes)]])
    found: dict[tuple[int, ...], float] = {}
    for choices in itertools.product(range(vocabulary), repeat=len(texts)):
        probability = 1.0
        for text, choice in zip(texts, choices, strict=True):
            probability *= law(text)[choice]
        path_1U, accepted_1 = walk(
            draft.tree.parents_BN, ids_1N, draft.num_nodes_B, torch.tensor([choices]), depth=draft.depth
        )
        kept = [ids_1N[0, node].item() for node in path_1U[0, 1 : accepted_1.item() + 1].tolist()]
        committed = (*kept, choices[path_1U[0, -1].item()])
        found[committed] = found.get(committed, 0.0) + probability
    for committed, probability in found.items():
        expected = 1.0
        for length, token in enumerate(committed):
            expected *= law(committed[:length])[token]
        assert abs(probability - expected) < 1e-12
    assert abs(sum(found.values()) - 1) < 1e-12


def test_padding_and_tokens_beside_the_tree_are_never_walked_to():
    """A short row's padding holds token 0 below the root: a target of 0 must not accept it."""
    draft = tree_draft([[Node(5, ROOT, 0, 0.5, "s"), Node(6, ROOT, 0, 0.4, "s")], []], CPU)
    ids_2N = torch.tensor([[9, 5, 6], [9, 0, 0]])
    path_2U, accepted_2 = walk(
        draft.tree.parents_BN, ids_2N, draft.num_nodes_B, torch.tensor([[6, 1, 1], [0, 0, 0]]), depth=1
    )
    assert accepted_2.tolist() == [1, 0] and path_2U.tolist() == [[0, 2], [0, 0]]


def test_sampled_rows_are_reproducible_and_end_where_they_must():
    speculator = speculator_of("direct")
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=5)
    lookup = speculator.afresh(source="lookup")
    first, second = ([r.token_ids for r in lookup.generate([[3, 5, 3, 5, 3]], params)] for _ in range(2))
    assert first == second and len(first[0]) == 20


def test_log_probabilities_and_transitions_are_those_of_the_committed_path():
    speculator = speculator_of("direct")
    prompt, params = [3, 5, 7], SamplingParams(max_new_tokens=12, ignore_eos=True)
    (plain,) = speculator.generate([prompt], params, policy=PLAIN)
    source = Scripted(tree_of([prompt + plain.token_ids], random.Random(1)))
    (found,) = speculator.generate([prompt], params, policy=NodeBudget(source, 20))

    def stretches(result):
        return [
            (one.start_position + at, one.token_ids_W[at].item(), one.target_hidden_WD[at])
            for one in result.transitions for at in range(len(one))
        ]  # fmt: skip

    for mine, theirs in zip(stretches(found), stretches(plain), strict=False):
        assert mine[:2] == theirs[:2]
        torch.testing.assert_close(mine[2], theirs[2], rtol=1e-5, atol=1e-5)
    assert all(one.num_drafted == 0 for one in found.transitions)


@pytest.mark.parametrize(("name", "weighs"), [("fixed", False), ("goodput", True), ("auto", True)])
def test_a_policys_name_says_whether_nodes_are_weighed(name, weighs):
    """Catches a server whose "auto" verifies all that is proposed, whatever it costs."""
    speculator, costs = speculator_of("direct").afresh(source="lookup"), CostTable({1: 1.0}, {1: 1.0})
    assert (speculator.new_policy(name, 4, costs=lambda: costs).costs is costs) == weighs
    assert isinstance(speculator.new_policy(name, 0, costs=lambda: costs), FixedLength)


def chain(*estimates: float) -> list[float]:
    return path_estimates([Node(1, index - 1, index, estimate, "s") for index, estimate in enumerate(estimates)])


@pytest.mark.parametrize(
    ("slope", "expected"), [(0.0, 4), (0.05, 4), (0.3, 2), (2.0, 0)],
)
def test_the_budget_takes_nodes_while_they_earn_what_they_cost(slope, expected):
    """verify(n) = 1 + slope (n - 1); the best n of E(n) / verify(n) by hand."""
    costs = CostTable({1: 1.0}, {rows: 1 + slope * (rows - 1) for rows in (1, 2, 3, 5, 9)})
    assert NodeBudget(None, 16, costs).choose_nodes([chain(0.9, 0.8, 0.5, 0.5)]) == expected
    assert NodeBudget(None, 16).choose_nodes([chain(0.9, 0.8, 0.5, 0.5), chain(0.1)]) == 4
    assert NodeBudget(None, 3).choose_nodes([chain(0.9, 0.8, 0.5, 0.5)]) == 3
