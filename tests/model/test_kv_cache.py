"""RollbackCache: whatever was written, rolled back, moved or reused, a pass sees what a fresh prefill would show it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvi.model.kv_cache import Placement, RollbackCache

ROWS, CAPACITY, LAYERS, HEADS, HEAD_DIM = 3, 24, 2, 2, 4
MAX_WIDTH = 4
CPU = torch.device("cpu")


def new_cache(rows: int = ROWS, capacity: int = CAPACITY) -> RollbackCache:
    return RollbackCache(rows=rows, capacity=capacity, device=CPU)


def keys_of(token_ids_BQ: Tensor, layer: int) -> Tensor:
    """Keys [B, H, Q, D] that tell tokens, layers, heads and columns apart. Values are their negatives."""
    signature_HD = torch.arange(HEADS * HEAD_DIM).view(HEADS, 1, HEAD_DIM) + 10 * layer
    return (token_ids_BQ[:, None, :, None] * 100 + signature_HD).double()


def write(cache: RollbackCache, layer: int, token_ids_BQ: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    keys = keys_of(token_ids_BQ, layer)
    return cache.write(layer, keys, -keys, placement)


def seen_by_a_fresh_prefill(token_ids: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [H, S, D] after writing the tokens, and nothing else ever, into a cache of one row."""
    cache = new_cache(rows=1)
    written = write(cache, layer, torch.tensor([token_ids]), cache.place(offset=0, width=len(token_ids)))
    return written[0][0], written[1][0]


class History:
    """A cache driven by random operations beside the plain lists of tokens that should have survived in each row."""

    def __init__(self) -> None:
        self.cache = new_cache()
        self.survivors: list[list[int]] = [[] for _ in range(ROWS)]
        self._next_token = 1

    def new_tokens(self, rows: int, width: int) -> Tensor:
        ids = torch.arange(rows * width).view(rows, width) + self._next_token
        self._next_token += rows * width
        return ids

    def round(self, data: st.DataObject) -> None:
        """Tokens one at a time through layer 0, all at once through layer 1; some rows; each commits what it likes."""
        first = data.draw(st.integers(0, ROWS - 1), "first row")
        rows = slice(first, data.draw(st.integers(first + 1, ROWS), "end row"))
        room = CAPACITY - max(len(tokens) for tokens in self.survivors[rows])
        if room == 0:
            return
        width = data.draw(st.integers(1, min(MAX_WIDTH, room)), "width")
        visible = data.draw(st.sampled_from((None, CAPACITY)), "visible")
        ids_BQ = self.new_tokens(rows.stop - rows.start, width)
        for i in range(width):
            write(self.cache, 0, ids_BQ[:, i : i + 1], self.cache.place(offset=i, width=1, rows=rows, visible=visible))
        write(self.cache, 1, ids_BQ, self.cache.place(offset=0, width=width, rows=rows, visible=visible))
        kept = data.draw(st.lists(st.integers(0, width), min_size=len(ids_BQ), max_size=len(ids_BQ)), "kept")
        self.cache.commit(kept, rows=rows)
        for row, ids_Q, num_kept in zip(range(rows.start, rows.stop), ids_BQ.tolist(), kept, strict=True):
            self.survivors[row] += ids_Q[:num_kept]

    def roll_back(self, data: st.DataObject) -> None:
        lengths = [data.draw(st.integers(0, len(tokens)), "length") for tokens in self.survivors]
        self.cache.set_lengths(lengths)
        self.survivors = [tokens[:length] for tokens, length in zip(self.survivors, lengths, strict=True)]

    def copy_row(self, data: st.DataObject) -> None:
        source, target = (data.draw(st.integers(0, ROWS - 1), name) for name in ("source", "target"))
        self.cache.copy_row(source=source, target=target)
        self.survivors[target] = list(self.survivors[source])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_history_shows_the_next_pass_what_a_fresh_prefill_of_the_survivors_would(data):
    """Catches slots off by one, rows mixed up, commits that keep rejected tokens and masks that show stale ones."""
    history = History()
    operations = st.sampled_from((history.round, history.round, history.roll_back, history.copy_row))
    for _ in range(data.draw(st.integers(1, 8), "operations")):
        data.draw(operations)(data)
    cache = history.cache
    assert cache.lengths == cache.lengths_B.tolist() == [len(tokens) for tokens in history.survivors]
    width = min(2, CAPACITY - max(cache.lengths))
    if width == 0:
        return
    ids_BQ = history.new_tokens(ROWS, width)
    placement = cache.place(offset=0, width=width)
    mask_BQS = placement.mask_B1QS()[:, 0]
    for layer in range(LAYERS):
        keys, values = write(cache, layer, ids_BQ, placement)
        for row in range(ROWS):
            for query in range(width):
                seen_S = mask_BQS[row, query]
                expected = seen_by_a_fresh_prefill(history.survivors[row] + ids_BQ[row, : query + 1].tolist(), layer)
                assert torch.equal(keys[row][:, seen_S], expected[0])
                assert torch.equal(values[row][:, seen_S], expected[1])


def test_rows_of_equal_and_of_unequal_length_are_written_alike():
    """The two ways to write, by slice and by index, must not drift apart: row 0 does the same in both caches."""
    by_slice, by_index = new_cache(rows=2), new_cache(rows=2)
    by_index.set_lengths([0, 3])
    ids_BQ = torch.tensor([[1, 2, 3], [4, 5, 6]])
    placements = [cache.place(offset=1, width=3) for cache in (by_slice, by_index)]
    assert placements[0].slots is not None
    assert placements[1].slots is None
    keys = [write(cache, 0, ids_BQ, place)[0] for cache, place in zip((by_slice, by_index), placements, strict=True)]
    assert torch.equal(keys[0][0, :, 1:4], keys[1][0, :, 1:4])


def test_a_stacked_write_is_the_same_as_writing_keys_and_values():
    """Catches a stacked layout that swaps keys with values or lands in another row."""
    stacked, apart = new_cache(), new_cache()
    ids_1Q = torch.tensor([[7, 8]])
    row = slice(1, 2)
    keys, values = write(apart, 0, ids_1Q, apart.place(offset=0, width=2, rows=row))
    both = stacked.write_stacked(0, torch.cat([keys, values]), stacked.place(offset=0, width=2, rows=row))
    assert torch.equal(both[:1], keys)
    assert torch.equal(both[1:], values)
    assert torch.equal(write(stacked, 0, ids_1Q, stacked.place(offset=2, width=2))[0][1, :, :2], keys[0])


def test_keys_and_values_of_different_sizes_are_kept():
    """Latent attention caches them so; one shared shape would fail or cut."""
    cache = new_cache(rows=1)
    keys, values = torch.ones(1, 4, 2, 6), torch.full((1, 1, 2, 3), 2.0)
    seen = cache.write(0, keys, values, cache.place(offset=0, width=2))
    assert torch.equal(seen[0], keys)
    assert torch.equal(seen[1], values)


def test_buffers_never_move_while_the_capacity_lasts():
    """A CUDA graph replays addresses: one reallocation on write, commit or rollback and it reads freed memory."""
    cache = new_cache()
    ids_BQ = torch.ones(ROWS, 2, dtype=torch.int64)

    def addresses() -> list[int]:
        written = [write(cache, layer, ids_BQ, cache.place(offset=0, width=2)) for layer in range(LAYERS)]
        return [tensor.data_ptr() for pair in written for tensor in pair] + [cache.lengths_B.data_ptr()]

    before = addresses()
    cache.commit([2, 1, 0])
    assert addresses() == before
    cache.copy_row(source=0, target=2)
    cache.open_row(1, CAPACITY)
    assert addresses() == before
    cache.set_lengths([0] * ROWS)
    assert addresses() == before


def test_growing_for_a_longer_sequence_keeps_what_other_rows_hold():
    """A row opened for more positions than fit must not cost its batch mates their keys."""
    cache = new_cache(rows=2, capacity=4)
    ids_BQ = torch.tensor([[1, 2, 3], [4, 5, 6]])
    write(cache, 0, ids_BQ, cache.place(offset=0, width=3))
    cache.commit([3, 3])
    cache.open_row(0, 10)
    assert cache.capacity >= 10
    assert cache.lengths == [0, 3]
    keys, _ = write(cache, 0, torch.tensor([[7], [8]]), cache.place(offset=0, width=1))
    assert torch.equal(keys[1], seen_by_a_fresh_prefill([4, 5, 6, 8], 0)[0])


def test_a_pass_that_exactly_fills_the_capacity_fits_and_one_more_is_refused_with_the_size_needed():
    """Catches an off-by-one at the end, where a write would wrap or fail deep inside a model."""
    cache = new_cache(rows=2, capacity=8)
    cache.set_lengths([1, 5])
    cache.place(offset=1, width=2)
    with pytest.raises(ValueError, match="at least 9 positions for this pass, got 8"):
        cache.place(offset=2, width=2)


def test_a_short_row_may_still_run_alone_when_another_is_full():
    """Capacity counts the rows of the pass only, or one long request would stop its batch mates."""
    cache = new_cache(rows=2, capacity=8)
    cache.set_lengths([1, 8])
    assert cache.place(offset=0, width=7, rows=slice(0, 1)).visible == 8


def test_slots_nobody_wrote_are_finite():
    """Attention multiplies masked values by zero, and uninitialised memory may hold NaN: 0 * NaN is NaN."""
    cache = new_cache()
    ids_B1 = torch.ones(ROWS, 1, dtype=torch.int64)
    keys, values = write(cache, 0, ids_B1, cache.place(offset=3, width=1, visible=CAPACITY))
    assert keys.isfinite().all()
    assert values.isfinite().all()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_mask_shows_a_query_its_own_slot_and_the_earlier_ones_within_the_window(window):
    """Checked against the definition by loops, with rows of unequal length and slots beyond the furthest row."""
    cache = new_cache()
    cache.set_lengths([0, 2, 6])
    placement = cache.place(offset=1, width=3, visible=CAPACITY)
    mask = placement.mask_B1QS(window=window)
    assert mask.shape == (ROWS, 1, 3, CAPACITY)
    for row, length in enumerate(cache.lengths):
        for query in range(3):
            position = length + 1 + query
            first = 0 if window is None else max(0, position - window + 1)
            assert mask[row, 0, query].nonzero().flatten().tolist() == list(range(first, position + 1))


def test_an_additive_mask_is_zero_where_the_boolean_one_attends_and_lowest_elsewhere():
    """Eager attention adds the mask: True would add one, and -inf in a whole row would give NaN."""
    cache = new_cache()
    cache.set_lengths([0, 2, 6])
    placement = cache.place(offset=0, width=2)
    may_attend, additive = placement.mask_B1QS(window=2), placement.mask_B1QS(window=2, dtype=torch.float32)
    assert (additive[may_attend] == 0).all()
    assert (additive[~may_attend] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 4, 4], [4, 4, 3]])
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("visible", [None, CAPACITY])
def test_a_pass_called_trivially_causal_has_nothing_masked(lengths, offset, width, visible):
    """Callers drop the mask then; doing so with several queries, unequal rows or unwritten slots is silently wrong."""
    cache = new_cache()
    cache.set_lengths(lengths)
    placement = cache.place(offset=offset, width=width, visible=visible)
    if placement.is_trivially_causal:
        assert placement.mask_B1QS().all()
    assert placement.is_trivially_causal == (len(set(lengths)) == 1 and width == 1 and visible is None)


def test_num_bytes_counts_every_buffer_once():
    """Keys and values may be two views of one tensor; counting the tensor and its views would double the figure."""
    cache = new_cache()
    for layer in range(LAYERS):
        write(cache, layer, torch.ones(ROWS, 1, dtype=torch.int64), cache.place(offset=0, width=1))
    assert cache.num_bytes == LAYERS * 2 * ROWS * HEADS * CAPACITY * HEAD_DIM * torch.float64.itemsize


def filled(token_ids_by_row: list[list[int]]) -> RollbackCache:
    """A cache whose rows hold these tokens, committed."""
    cache = new_cache(rows=len(token_ids_by_row))
    for row, token_ids in enumerate(token_ids_by_row):
        placement = cache.place(offset=0, width=len(token_ids), rows=slice(row, row + 1))
        for layer in range(LAYERS):
            write(cache, layer, torch.tensor([token_ids]), placement)
        cache.commit([len(token_ids)], rows=slice(row, row + 1))
    return cache


def held(cache: RollbackCache, row: int) -> list[list[int]]:
    """The row's tokens as each layer's keys, and as its values, tell them."""
    found = []
    for layer, both in cache.copy_out(row, 0, cache.lengths[row]).items():
        for sign, tensor_HSD in zip((1, -1), both, strict=True):
            found.append(((sign * tensor_HSD[0, :, 0] - 10 * layer) / 100).long().tolist())
    return found


def test_swapped_rows_hold_each_others_tokens():
    """Catches a swap that overwrites one side, forgets a layer or stops at the shorter length."""
    cache = filled([[1, 2, 3], [4, 5, 6, 7, 8], [9]])
    cache.swap_rows(1, 2)
    assert cache.lengths == [3, 1, 5] and cache.lengths_B.tolist() == cache.lengths
    for row, token_ids in enumerate(([1, 2, 3], [9], [4, 5, 6, 7, 8])):
        assert held(cache, row) == [token_ids] * 2 * LAYERS


def test_a_segment_copied_out_serves_another_row_of_another_cache():
    """Catches views that change when their row is reused, and a cache that has allocated nothing yet."""
    source, target = filled([[1, 2, 3, 4, 5], [6]]), new_cache(rows=2)
    segments = [source.copy_out(0, 0, 2), source.copy_out(0, 2, 4)]
    source.wipe_row(0)
    start = 0
    for segment in segments:
        target.copy_in(1, start, segment)
        target.commit([2], rows=slice(1, 2))
        start += 2
    assert held(target, 1) == [[1, 2, 3, 4]] * 2 * LAYERS
    assert target.lengths == [0, 4]


def test_a_row_beyond_the_last_makes_room_and_loses_nothing():
    """Catches rows that are cut, lengths that are forgotten, and graphs that still know the old addresses."""
    cache = filled([[1, 2, 3], [4, 5]])
    epoch = cache.epoch
    cache.open_row(2, CAPACITY)
    assert cache.rows >= 3 and cache.epoch > epoch and cache.capacity == CAPACITY
    assert cache.lengths == [3, 2, *[0] * (cache.rows - 2)] and cache.lengths_B.tolist() == cache.lengths
    placement = cache.place(offset=0, width=2, rows=slice(0, 3))
    for layer in range(LAYERS):
        write(cache, layer, torch.tensor([[7, 7], [8, 8], [9, 9]]), placement)
    cache.commit([1, 2, 1], rows=slice(0, 3))
    for row, token_ids in enumerate(([1, 2, 3, 7], [4, 5, 8, 8], [9])):
        assert held(cache, row) == [token_ids] * 2 * LAYERS
