"""The store of earlier answers: its bound, who sees what, what goes first, and what a saved one gives back."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest
import torch

from dvi.draft.places import GAP
from dvi.draft.traffic_store import LEAD_IN, MIN_BYTES, SLOT_LEN, Text, TrafficStore
from dvi.tenancy import tenant_id

ANN, BOB = 11, -22
ROOM = SLOT_LEN - LEAD_IN - 1  # tokens of a slot


def learn(store: TrafficStore, token_ids: list[int], *, tenant: int = ANN, before=(GAP, GAP)) -> Text:
    text = Text(tenant)
    store.extend(text, before, token_ids)
    return text


def held(store: TrafficStore) -> list[tuple[int, list[int]]]:
    """(tenant, tokens) of each slot, oldest first, without lead-ins."""
    state = store.state_dict()
    slots = [[t for t in slot[LEAD_IN:] if t != GAP] for slot in state["tokens_NW"].tolist()]
    return list(zip(state["tenants_N"].tolist(), slots, strict=True))


def following(store: TrafficStore, context: list[int], *, tenant: int = ANN) -> set[int]:
    """The tokens found behind a context, as far as they are known."""
    places = store.places(tenant)
    return {places.tokens[place] for place in places.find(context)} - {GAP}


def random_texts(num: int, *, seed: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(vocab_size), k=rng.randrange(1, 200)) for _ in range(num)]


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_a_text_longer_than_a_slot_goes_on_in_the_next_behind_its_last_two_tokens():
    """Catches a pair that stands across two slots and is lost, and one that is held twice."""
    store, token_ids = TrafficStore(MIN_BYTES), list(range(100, 100 + 3 * ROOM + 5))
    text = learn(store, token_ids, before=(8, 9))
    assert [slot for _, slot in held(store)] == [token_ids[i : i + ROOM] for i in range(0, len(token_ids), ROOM)]
    assert store.state_dict()["tokens_NW"][:, :LEAD_IN].tolist()[:2] == [[8, 9], token_ids[ROOM - 2 : ROOM]]
    assert len(store) == len(token_ids) and len(text.slots) == 4
    for before, token, after in zip([8, 9, *token_ids], [9, *token_ids], token_ids, strict=False):
        assert following(store, [before, token]) == {after}


def test_texts_that_grow_side_by_side_are_not_mixed():
    store = TrafficStore(MIN_BYTES)
    texts = {name: random_texts(1, seed=name, vocab_size=1000)[0] for name in range(4)}
    growing, rng = {name: Text(ANN) for name in texts}, random.Random(0)
    done = dict.fromkeys(texts, 0)
    while any(done[name] < len(texts[name]) for name in texts):
        name = rng.choice(list(texts))
        so_far, num = texts[name][: done[name]], rng.randrange(4)
        store.extend(growing[name], [GAP, GAP, *so_far][-2:], texts[name][done[name] : done[name] + num])
        done[name] = min(done[name] + num, len(texts[name]))
    assert len(store) == sum(map(len, texts.values()))
    for token_ids in texts.values():
        for end in range(3, len(token_ids)):
            assert token_ids[end] in following(store, token_ids[:end])


def test_without_tokens_before_it_a_text_has_no_pair_with_a_gap():
    store = TrafficStore(MIN_BYTES)
    learn(store, [1, 2])
    learn(store, [3, 4], before=(GAP, 7))
    assert following(store, []) == set()
    assert following(store, [7]) == {3} and following(store, [1]) == {2} and following(store, [GAP, 1]) == {2}
    assert {*store.places(ANN).find([GAP, 1]).values()} == {1}


def test_each_tenant_finds_its_own_alone_unless_they_share():
    for shares in (False, True):
        store = TrafficStore(MIN_BYTES, shares_tenants=shares)
        learn(store, [1, 2, 3], tenant=ANN)
        learn(store, [1, 2, 4], tenant=BOB)
        assert following(store, [1, 2], tenant=ANN) == ({3, 4} if shares else {3})
        assert following(store, [1, 2], tenant=BOB) == ({3, 4} if shares else {4})
        assert following(store, [1, 2], tenant=0) == ({3, 4} if shares else set())


# --- bound and eviction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 10, 10**6])
def test_long_traffic_stays_within_the_bound_and_keeps_the_newest(vocab_size):
    """Catches a dict of dead keys, and slots of texts of one token that leave no room for others."""
    store = TrafficStore(MIN_BYTES)
    learnt = []
    for token_ids in random_texts(600, seed=1, vocab_size=vocab_size):
        learn(store, token_ids)
        learnt += token_ids
        assert store.num_bytes <= store.max_bytes
    assert 2000 < len(store) < len(learnt)
    assert [token for _, slot in held(store) for token in slot] == learnt[-len(store) :]


def test_what_it_says_it_takes_is_what_python_holds_or_a_little_more():
    texts = random_texts(300, seed=2, vocab_size=5000)
    gc.collect()
    tracemalloc.start()
    try:
        store = TrafficStore(8 * MIN_BYTES)
        for token_ids in texts:
            learn(store, token_ids)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < store.num_bytes < 2 * taken


@pytest.mark.parametrize("shares", [False, True])
def test_after_all_is_dropped_nothing_is_counted_but_empty_slots(shares):
    """Catches bytes or tokens counted up and not down."""
    store = TrafficStore(MIN_BYTES, shares_tenants=shares)
    for index, token_ids in enumerate(random_texts(400, seed=3, vocab_size=50)):
        learn(store, token_ids, tenant=(ANN, BOB)[index % 2])
    for slot in [*store._owners]:
        store._drop(slot)
    assert len(store) == 0 and not store._groups and set(store._tokens) == {GAP}
    empty_bytes = store.num_bytes
    learn(store, [1])
    assert store.num_bytes > empty_bytes > 0
    store.load_state_dict(TrafficStore(MIN_BYTES).state_dict())
    assert store.num_bytes == 0


def test_a_text_whose_slot_was_evicted_goes_on_in_another():
    """Catches a token written into what is another text's by then."""
    store, slow = TrafficStore(MIN_BYTES), Text(ANN)
    store.extend(slow, (GAP, GAP), [1, 2, 3])
    for token_ids in random_texts(600, seed=4, vocab_size=10**6):
        learn(store, token_ids, tenant=BOB)
    assert not slow.slots and following(store, [1, 2]) == set()
    store.extend(slow, (2, 3), [4, 5])
    assert following(store, [2, 3]) == {4} and held(store)[-1] == (ANN, [4, 5])
    assert following(store, [3, 4], tenant=BOB) == set()


def test_too_small_a_bound_is_refused_with_one_that_would_do():
    with pytest.raises(ValueError, match=r"max_bytes must be at least 1048576, got 5; 67108864 would do"):
        TrafficStore(5)


# --- forgetting and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [False, True])
def test_forgetting_a_tenant_leaves_no_token_of_it_and_all_of_the_others(shares):
    store, ann = TrafficStore(MIN_BYTES, shares_tenants=shares), tenant_id("ann")
    going_on = learn(store, [501, 502], tenant=ann)
    learn(store, [501, 7], tenant=BOB)
    learn(store, list(range(500, 700)), tenant=ann)
    assert store.forget("ann") == 202 and store.forget("ann") == 0 and store.forget("nobody") == 0
    assert held(store) == [(BOB, [501, 7])] and not {*range(502, 700)} & {*store._tokens}
    assert following(store, [501], tenant=BOB) == {7} and len(store) == 2
    store.extend(going_on, (501, 502), [503])
    assert following(store, [501, 502], tenant=ann) == {503}


@pytest.mark.parametrize("seed", range(5))
def test_a_saved_store_finds_the_same_in_another(seed):
    store = TrafficStore(MIN_BYTES)
    texts = random_texts(150, seed=seed, vocab_size=40)
    for index, token_ids in enumerate(texts):
        learn(store, token_ids, tenant=(ANN, BOB)[index % 2], before=(index % 3, 5))
    state = {name: tensor.clone() for name, tensor in store.state_dict().items()}
    other = TrafficStore(2 * MIN_BYTES)
    learn(other, [1, 2, 3])
    other.load_state_dict(state)
    assert held(other) == held(store) and len(other) == len(store)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    for tenant in (ANN, BOB):
        for token_ids in texts[-10:]:
            for end in range(0, len(token_ids), 7):
                expected = following(store, token_ids[:end], tenant=tenant)
                assert following(other, token_ids[:end], tenant=tenant) == expected


def test_a_smaller_store_takes_the_newest_of_a_saved_one():
    store, small = TrafficStore(4 * MIN_BYTES), TrafficStore(MIN_BYTES)
    for token_ids in random_texts(600, seed=6, vocab_size=10**5):
        learn(store, token_ids)
    small.load_state_dict(store.state_dict())
    assert small.num_bytes <= MIN_BYTES and 0 < len(small) < len(store)
    assert held(small) == held(store)[-len(held(small)) :]


def test_an_empty_store_is_saved_and_loaded_and_other_slots_are_refused():
    store = TrafficStore(MIN_BYTES)
    state = store.state_dict()
    assert list(state["tokens_NW"].shape) == [0, SLOT_LEN] and state["tokens_NW"].dtype == torch.int32
    store.load_state_dict(state)
    with pytest.raises(ValueError, match=r"tokens_NW must have slots of 64 tokens, got \[3, 9\]"):
        store.load_state_dict({**state, "tokens_NW": torch.zeros(3, 9, dtype=torch.int32)})


def test_requests_under_way_go_on_after_a_load():
    store = TrafficStore(MIN_BYTES)
    text = learn(store, [1, 2, 3])
    store.load_state_dict(store.state_dict())
    store.extend(text, (2, 3), [4])
    assert following(store, [2, 3]) == {4} and [slot for _, slot in held(store)] == [[1, 2, 3], [4]]
