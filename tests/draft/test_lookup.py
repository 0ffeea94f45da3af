"""Lookup against a second writing that scans every text for candidates, estimates and trees; and who learns what."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from dvi.draft import places
from dvi.draft.calibration import Calibration
from dvi.draft.lookup import CHANCE, DOUBT, NUM_KINDS, OWN_WEIGHT, Lookup, LookupRow
from dvi.draft.places import MAX_MATCH
from dvi.draft.traffic_store import MIN_BYTES, TrafficStore
from dvi.draft.tree import LEAST_PATH, ROOT, Node, grow

EVERY = 1000  # a width that cuts nothing off


@dataclass(frozen=True)
class Scanned:
    """The second writing of a place: all matches of the last 1..8 tokens, found by comparing at every token.

    texts  (tokens, weight, first place that counts) of the own text and of the others'.
    """

    texts: tuple[tuple[tuple[int, ...], int, int], ...]
    context: tuple[int, ...]

    def candidates(self, width: int) -> list[tuple[int, float]]:
        chosen: dict[int, float] = {}
        for length in range(min(MAX_MATCH, len(self.context)), 0, -1):
            weights: Counter[int] = Counter()
            for tokens, weight, first in self.texts:
                for place in range(max(first, length), len(tokens)):
                    if tokens[place - length : place] == self.context[-length:]:
                        weights[tokens[place]] += weight
            for token, weight in weights.items():
                if token not in chosen:
                    chosen[token] = weight / (weights.total() + DOUBT) * (1 - CHANCE**length)
        return list(chosen.items())[:width]

    def then(self, token_id: int) -> Scanned:
        return Scanned(self.texts, (*self.context, token_id))


def rounded(candidates: list[tuple[int, float]]) -> dict[int, float]:
    """By token: what is the same in another order of summing, and what comes first among equals, is left out."""
    assert len({token for token, _ in candidates}) == len(candidates)
    return {token: round(estimate, 12) for token, estimate in candidates}


def path_set(nodes: list[Node]) -> set[tuple[tuple[int, ...], float]]:
    """(tokens from the text on, estimate) of each node."""
    paths: list[tuple[int, ...]] = []
    for node in nodes:
        paths.append((*(paths[node.parent] if node.parent != ROOT else ()), node.token_id))
    return {(path, round(node.estimate, 12)) for path, node in zip(paths, nodes, strict=True)}


def learnt(source: Lookup, prompt: list[int], answer: list[int], **options) -> LookupRow:
    row = source.open(prompt, **options)
    row.observe(answer)
    return row


def proposed(row: LookupRow, *, budget: int = 4, max_depth: int = 4) -> list[int]:
    return [node.token_id for node in row.propose(budget=budget, max_depth=max_depth)]


@pytest.fixture
def source() -> Lookup:
    return Lookup(TrafficStore(MIN_BYTES))


# --- against the second writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_candidates_and_trees_are_those_of_every_match_in_every_text(seed, monkeypatch, source):
    """Catches own text that does not weigh more or counts twice, shares of the wrong total, and stale places.

    Without the bounds on places, which the index's own tests are about. Answers fit in one slot each.
    """
    monkeypatch.setattr(places, "MAX_PLACES", 10**9)
    monkeypatch.setattr(places, "MAX_FOUND", 10**9)
    rng = random.Random(seed)
    vocab = range(rng.choice((2, 3, 6)))
    others = [(rng.choices(vocab, k=rng.randrange(2, 9)), rng.choices(vocab, k=rng.randrange(1, 50))) for _ in range(4)]
    for prompt, answer in others:
        learnt(source, prompt, answer).close()
    prompt, answer = rng.choices(vocab, k=rng.randrange(0, 20)), rng.choices(vocab, k=40)
    row, at = source.open(prompt), 0
    while at < len(answer):
        row.observe(answer[at : at + 3])
        source.calibration = Calibration(NUM_KINDS)  # estimates are told as they are
        at += 3
        text = (*prompt, *answer[:at])
        scanned = Scanned(
            ((text, OWN_WEIGHT, 1), *(((*before[-2:], *rest), 1, 2) for before, rest in others)), text
        )
        assert rounded(row.place().candidates(EVERY)) == rounded(scanned.candidates(EVERY))
        every = {"budget": EVERY, "max_depth": 5, "width": EVERY}
        assert path_set(row.propose(**every)) == path_set(grow(scanned, source="lookup", **every))


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_never_has_twins_and_fewer_children_are_the_first_of_more(seed, source):
    rng = random.Random(seed)
    for _ in range(5):
        learnt(source, rng.choices(range(4), k=5), rng.choices(range(4), k=100)).close()
    row = learnt(source, rng.choices(range(4), k=30), rng.choices(range(4), k=30))
    for width, budget in itertools.product((1, 2, 4), (1, 4, 16)):
        nodes = row.propose(budget=budget, max_depth=6, width=width)
        assert len(nodes) <= budget and nodes == row.propose(budget=budget, max_depth=6, width=width)
        assert len({(node.parent, node.token_id) for node in nodes}) == len(nodes)
        assert max(Counter(node.parent for node in nodes).values()) <= width
        assert row.place().candidates(width) == row.place().candidates(EVERY)[:width]
        assert all(LEAST_PATH <= node.estimate < 1 for node in nodes)


# --- estimates --------------------------------------------------------------------------------------------------------


def first_estimate(text: list[int]) -> float:
    return Lookup().open(text).propose(budget=1, max_depth=1)[0].estimate


def test_longer_matches_and_more_places_are_trusted_more_and_contradiction_less():
    by_length = [first_estimate([*range(10, 20), 99, 55, *range(20 - length, 20)]) for length in range(1, 13)]
    assert by_length[:8] == sorted(set(by_length[:8])) and set(by_length[7:]) == {by_length[7]}
    by_count = [first_estimate([*[1, 2, 50] * count, 1, 2]) for count in range(1, 6)]
    assert by_count == sorted(set(by_count))
    assert first_estimate([1, 2, 7, 1, 2, 3, 1, 2, 3, 1, 2]) < first_estimate([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2])


def test_own_text_outweighs_two_others_and_not_four(source):
    for num_others, expected in ((2, 8), (4, 9)):
        source.forget("")
        for _ in range(num_others):
            learnt(source, [1, 2], [9]).close()
        assert proposed(source.open([1, 2, 8, 1, 2]), budget=1) == [expected]


def test_what_the_longest_match_says_comes_before_what_shorter_ones_say():
    candidates = Lookup().open([1, 2, 3, 50, 3, 60, 3, 60, 3, 60, 1, 2, 3]).place().candidates(4)
    assert [token for token, _ in candidates] == [50, 60]  # 60 three times, behind 3 alone


def test_a_draft_may_run_on_into_what_it_repeats():
    """Catches a walk that ends where the text does: a loop of two tokens is drafted to any depth."""
    nodes = Lookup().open([5, 6] * 10).propose(budget=6, max_depth=6, width=1)
    assert [node.token_id for node in nodes] == [5, 6, 5, 6, 5, 6]


# --- calibration ------------------------------------------------------------------------------------------------------


def counts(source: Lookup) -> tuple[float, float]:
    """(accepted, samples) of all bins."""
    accepted, samples = source.calibration.state()
    return sum(accepted), sum(samples)


def test_each_place_that_was_reached_is_scored_up_to_the_first_token_that_nobody_suggested(source):
    row = source.open([1, 2, 3, 4, 1])
    row.observe([2])
    assert counts(source) == (0, 0)  # nothing was proposed
    row.propose(budget=4, max_depth=4)
    row.observe([3, 9])
    assert counts(source) == (1, 2)
    row.observe([1])
    assert counts(source) == (1, 2)


def test_what_was_suggested_is_scored_before_the_text_grows():
    """Catches a score of the answer by itself: behind the last 1 stands 3 by then."""
    source = Lookup()
    row = source.open([1, 2, 1])
    row.propose(budget=4, max_depth=4)
    row.observe([3])
    assert counts(source) == (0, 1)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_measured_and_silent_requests_leave_the_calibration_as_it_was(is_frozen, source):
    source.is_frozen = is_frozen
    row = source.open([1, 2, 1], teaches=is_frozen)
    row.propose(budget=4, max_depth=4)
    row.observe([2])
    assert counts(source) == (0, 0)


@pytest.mark.parametrize("text", [[1, 2, 1, 2, 1, 3, 1], [1, 2, 1, 3, 1]])
def test_suggestions_that_fail_are_told_to_fail_also_where_as_much_was_thought_of_both(text, source):
    for _ in range(50):
        row = source.open(text)
        row.propose(budget=4, max_depth=4)
        row.observe([3])
        source.forget("")
    after = dict(source.open(text).place().candidates(4))
    assert after[3] > 0.6 > 0.2 > after[2]
    assert source.calibration.error > 0.1


def test_a_saved_lookup_proposes_the_same_in_another(source):
    rng = random.Random(0)
    row = source.open([1, 2])
    for _ in range(50):
        row.propose(budget=4, max_depth=4)
        row.observe(rng.choices(range(4), k=2))
    state, others = source.state_dict(), (Lookup(TrafficStore(MIN_BYTES)), Lookup())
    for other in others:
        other.load_state_dict(state)
        assert counts(other) == counts(source) and other.calibration.error is None
    expected = source.open([3, 1, 2]).propose(budget=16, max_depth=4)
    assert others[0].open([3, 1, 2]).propose(budget=16, max_depth=4) == expected != []
    others[0].load_state_dict(others[1].state_dict())  # of one without a store: what is held stays
    assert len(others[0].store) == 100


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[], [1]])
def test_a_prompt_of_no_or_one_token_proposes_nothing_until_something_repeats(prompt, source):
    row = source.open(prompt)
    assert row.propose(budget=4, max_depth=4) == []
    row.observe([1])
    assert proposed(row, budget=1) == ([1] if prompt else [])
    row.observe([1, 1])
    assert proposed(row, budget=2) == [1, 1]


@pytest.mark.parametrize(("budget", "max_depth"), [(0, 4), (4, 0)])
def test_no_budget_or_no_depth_gives_no_nodes(budget, max_depth, source):
    assert source.open([1, 2, 1, 2]).propose(budget=budget, max_depth=max_depth) == []


def test_every_commit_is_found_by_others_at_once_and_prompts_never(source):
    """Catches a store that learns at the end of a request alone, and one that shows what users wrote."""
    growing, other = source.open([1, 2, 3, 4, 5, 6]), source.open([5, 6])
    assert proposed(other) == proposed(source.open([1, 2])) == []
    growing.observe([7])
    assert proposed(other, max_depth=1) == [7]
    growing.observe([8, 9])
    assert proposed(other) == [7, 8, 9]


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_in_how_many_commits_a_text_came_changes_nothing(step):
    rng = random.Random(0)
    answer = rng.choices(range(5), k=150)
    expected, source = Lookup(TrafficStore(MIN_BYTES)), Lookup(TrafficStore(MIN_BYTES))
    at_once, row = learnt(expected, [1, 2], answer), source.open([1, 2])
    for start in range(0, len(answer), step):
        row.observe(answer[start : start + step])
    for left, right in ((row, at_once), (source.open([3, 2, 1]), expected.open([3, 2, 1]))):
        assert left.propose(budget=32, max_depth=8) == right.propose(budget=32, max_depth=8)


def test_a_request_that_may_not_teach_leaves_nothing_and_still_has_its_own_text_and_others(source):
    learnt(source, [], [1, 2, 3]).close()
    quiet = learnt(source, [70, 71], [72, 70], teaches=False)
    assert len(source.store) == 3 and proposed(quiet, budget=3) == [71, 72, 70]
    quiet.observe([1])
    assert proposed(quiet) == [2, 3]
    assert proposed(source.open([70])) == []


def test_frozen_nothing_is_learnt_and_what_comes_after_is_not_joined_to_what_came_before(source):
    row = learnt(source, [], [1, 2])
    source.is_frozen = True
    row.observe([3, 1, 2])
    learnt(source, [], [40, 41]).close()
    assert len(source.store) == 2 and proposed(row, budget=2) == [3, 1] and proposed(source.open([40])) == []
    source.is_frozen = False
    row.observe([60])
    assert proposed(source.open([1])) == [2, 60] and len(source.store) == 3  # pair 1 2, not 2 60 after the first 2


def test_tenants_are_apart_and_one_is_forgotten_alone(source):
    learnt(source, [], [1, 2, 3], tenant="ann").close()
    bob = learnt(source, [], [1, 4], tenant="bob")
    assert proposed(source.open([1], tenant="ann")) == [2, 3] and proposed(source.open([1], tenant="bob")) == [4]
    assert proposed(source.open([1], tenant="")) == []
    row = source.open([1], tenant="ann")
    assert source.forget("ann") == 3 and source.forget("ann") == 0
    assert proposed(row) == [] and len(source.store) == 2
    bob.observe([1])
    assert proposed(bob, budget=3) == [4, 1, 4]


def test_shared_all_find_all_and_one_is_still_forgotten_alone():
    source = Lookup(TrafficStore(MIN_BYTES, shares_tenants=True))
    learnt(source, [], [1, 2], tenant="ann").close()
    learnt(source, [], [1, 3], tenant="bob").close()
    assert sorted(proposed(source.open([1], tenant="eve"), max_depth=1)) == [2, 3]
    assert source.forget("ann") == 2 and proposed(source.open([1], tenant="eve")) == [3]


def test_without_a_store_each_request_has_its_own_text_alone():
    source = Lookup()
    learnt(source, [], [1, 2, 3]).close()
    assert proposed(source.open([1, 2])) == [] and source.forget("") == 0
    assert proposed(learnt(source, [1, 2], [1]), budget=3) == [2, 1, 2]


def test_a_closed_request_holds_no_text_and_may_be_closed_again(source):
    row = learnt(source, [1, 2, 3], [1, 2])
    row.close()
    row.close()
    assert row.propose(budget=4, max_depth=4) == [] and not row._own
    assert proposed(source.open([2, 3], teaches=False), budget=2) == [1, 2]
