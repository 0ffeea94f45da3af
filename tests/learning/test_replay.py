"""The replay buffer against a slow list of lists, and the promises one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from torch import Tensor

from dvi.records import ReplayBatch, Transitions
from dvi.tenancy import tenant_id
from trainers.learning.replay import ReplayBuffer

HIDDEN = 2
SEGMENT_LEN = 4


def make_buffer(**changes) -> ReplayBuffer:
    sizes = {"capacity_positions": 28, "hidden_size": HIDDEN, "max_block": 3, "segment_len": SEGMENT_LEN}
    return ReplayBuffer(**sizes | changes)


def make_stretch(
    values: list[float],
    *,
    request_id: int = 0,
    start_position: int = 0,
    num_drafted: int = 0,
    version: int = 0,
    num_waived: int = 0,
    tenant: str = "",
) -> Transitions:
    """A stretch whose rows can be told apart: h_k = value, h_L = -value, token = position, action = 100 + column.

    All drafts but the last column's were accepted: W = num_accepted + 1, as after a round.
    """
    values_W = torch.tensor(values)
    is_drafted_W = torch.arange(len(values)) < num_drafted
    return Transitions(
        request_id=request_id,
        start_position=start_position,
        token_ids_W=start_position + torch.arange(len(values)),
        hidden_WD=values_W[:, None].repeat(1, HIDDEN),
        target_hidden_WD=-values_W[:, None].repeat(1, HIDDEN),
        num_drafted=num_drafted,
        num_accepted=max(len(values) - 1, 0) if num_drafted else 0,
        draft_token_ids_W=torch.where(is_drafted_W, 100 + torch.arange(len(values)), -1),
        draft_log_probs_W=torch.where(is_drafted_W, -0.5 - torch.arange(len(values)), 0.0),
        drafter_version=version,
        num_waived=num_waived,
        tenant=tenant,
    )


def sample(buffer: ReplayBuffer, num_blocks: int = 64, block_len: int = 3, *, seed: int = 0, **changes) -> ReplayBatch:
    arguments = {"current_version": 0, "generator": torch.Generator().manual_seed(seed)}
    return buffer.sample(num_blocks, block_len, **arguments | changes)


def starts(batch: ReplayBatch) -> list[float]:
    """The value at which each block starts; blocks that found no start are left out."""
    return batch.hidden_NTD[batch.mask_NT[:, 0], 0, 0].tolist()


# The oracle: Python lists, one row at a time.


@dataclass
class Row:
    value: float
    position: int
    depth: int
    action: int
    reward: float
    log_prob: float
    version: int


@dataclass
class Segment:
    request_id: int
    rows: list[Row] = field(default_factory=list)

    def start_indices(self) -> list[int]:
        return [i for i in range(len(self.rows)) if i > 0 or self.rows[0].position == 0]


class ListReplay:
    """What ReplayBuffer promises, written as plainly as possible."""

    def __init__(self, *, num_ring: int, num_reservoir: int, seed: int = 0) -> None:
        self.ring: list[Segment | None] = [None] * num_ring
        self.cursor = 0
        self.reservoir: list[Segment] = []
        self.num_reservoir = num_reservoir
        self.num_evicted = 0
        self.num_refused = 0
        self.open: dict[int, Segment] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, stretch: Transitions) -> None:
        for i in range(len(stretch)):
            value = stretch.hidden_WD[i, 0].item()
            if not math.isfinite(value):
                self.num_refused += 1
                continue
            position = stretch.start_position + i
            segment = self.open.get(stretch.request_id)
            if segment is None or len(segment.rows) == SEGMENT_LEN or segment.rows[-1].position + 1 != position:
                segment = self.new_segment(stretch.request_id)
            is_draft = i < stretch.num_drafted and stretch.is_honest
            segment.rows.append(
                Row(
                    value, position, i if is_draft else -1, stretch.draft_token_ids_W[i].item(),
                    float(i < stretch.num_accepted), stretch.draft_log_probs_W[i].item(), stretch.drafter_version,
                )
            )

    def new_segment(self, request_id: int) -> Segment:
        evicted = self.ring[self.cursor]
        if evicted is not None:
            self.open = {owner: segment for owner, segment in self.open.items() if segment is not evicted}
            self.num_evicted += 1
            if len(self.reservoir) < self.num_reservoir:
                self.reservoir.append(evicted)
            else:
                place = int(torch.randint(self.num_evicted, (), generator=self.generator))
                if place < self.num_reservoir:
                    self.reservoir[place] = evicted
        segment = Segment(request_id)
        self.ring[self.cursor] = self.open[request_id] = segment
        self.cursor = (self.cursor + 1) % len(self.ring)
        return segment

    def forget(self, request_id: int) -> None:
        self.open.pop(request_id, None)
        self.ring = [None if s is not None and s.request_id == request_id else s for s in self.ring]
        for i in reversed(range(len(self.reservoir))):
            if self.reservoir[i].request_id == request_id:
                self.reservoir[i] = self.reservoir[-1]
                self.reservoir.pop()

    def segments(self) -> list[Segment]:
        return [s for s in self.ring if s is not None] + self.reservoir

    def start_values(self) -> set[float]:
        return {s.rows[i].value for s in self.segments() for i in s.start_indices()}

    def __len__(self) -> int:
        return sum(len(s.rows) for s in self.segments())

    def check_block(self, batch: ReplayBatch, n: int, *, current_version: int, max_staleness: int) -> None:
        """Asserts that block n is what this store holds from the block's first value on."""
        first = batch.hidden_NTD[n, 0, 0].item()
        [(segment, start)] = [
            (s, i) for s in self.segments() for i in s.start_indices() if s.rows[i].value == first
        ]
        anchor = -segment.rows[start - 1].value if start else 0.0
        assert batch.anchor_ND[n].tolist() == [anchor] * HIDDEN
        assert batch.staleness_N[n] == current_version - segment.rows[start].version
        for i in range(batch.mask_NT.shape[1]):
            exists = start + i < len(segment.rows)
            assert batch.mask_NT[n, i] == exists
            row = segment.rows[start + i] if exists else None
            is_rewarded = exists and row.depth == i and current_version - row.version <= max_staleness
            assert batch.has_reward_NT[n, i] == is_rewarded
            if exists:
                assert batch.hidden_NTD[n, i].tolist() == [row.value] * HIDDEN
                assert batch.target_hidden_NTD[n, i].tolist() == [-row.value] * HIDDEN
                assert batch.token_ids_NT[n, i] == row.position
            outcome = (batch.action_NT[n, i], batch.reward_NT[n, i], batch.behaviour_log_probs_NT[n, i])
            assert outcome == ((row.action, row.reward, row.log_prob) if is_rewarded else (0, 0, 0))


REQUESTS = st.integers(0, 3)
ADD = st.tuples(
    st.just("add"),
    REQUESTS,
    st.integers(0, 6),  # rows; 0 is an empty stretch
    st.integers(0, 5),  # drafted
    st.sampled_from(["next", "next", "next", "again", "jump", "restart"]),
    st.sampled_from([0, 0, 1]),  # waived
    st.sampled_from([None, None, None, 0, 2]),  # a row that is not finite
)
END_OR_FORGET = st.tuples(st.sampled_from(["end", "end", "forget"]), REQUESTS)
# Long enough that most histories evict from the ring and some turn the reservoir over.
OPERATIONS = st.lists(st.one_of(ADD, ADD, ADD, ADD, ADD, END_OR_FORGET), min_size=15, max_size=40)


def play(operations: list[tuple], *replays, value: float = 1.0, after: dict[int, int] | None = None) -> dict[int, int]:
    """Runs the same random history into every store; each row gets a value of its own.

    Returns each request's next position; given as `after`, the requests go on from there.
    """
    next_position = dict(after) if after else dict.fromkeys(range(4), 0)
    for version, (verb, request_id, *rest) in enumerate(operations):
        if verb != "add":
            for replay in replays:
                if verb == "forget":
                    replay.forget([request_id] if isinstance(replay, ReplayBuffer) else request_id)
                elif isinstance(replay, ReplayBuffer):
                    replay.end(request_id)
                else:
                    replay.open.pop(request_id, None)
            continue
        num_rows, num_drafted, where, num_waived, bad_row = rest
        position = next_position[request_id]
        position = {"next": position, "again": max(position - num_rows, 0), "jump": position + 3, "restart": 0}[where]
        next_position[request_id] = position + num_rows
        values = [value + i for i in range(num_rows)]
        value += num_rows
        if bad_row is not None and bad_row < num_rows:
            values[bad_row] = math.nan
        stretch = make_stretch(
            values, request_id=request_id, start_position=position, num_drafted=num_drafted, version=version,
            num_waived=num_waived, tenant=f"tenant {request_id % 3}",
        )
        for replay in replays:
            replay.add(stretch)
    return next_position


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 1000), max_staleness=st.integers(0, 40))
def test_samples_hold_exactly_what_a_list_of_lists_would_hold(operations, seed, max_staleness):
    # Catches writes into an evicted segment, anchors across a gap, rewards at the wrong depth, lost or invented rows.
    buffer = make_buffer(capacity_positions=20, reservoir_fraction=0.4, seed=seed)
    oracle = ListReplay(num_ring=3, num_reservoir=2, seed=seed)
    play(operations, buffer, oracle)
    assert len(buffer) == len(oracle)
    assert buffer.num_refused == oracle.num_refused
    if not len(buffer):
        return
    version = len(operations)
    # 600 blocks, 360 of them over the ring's 12 rows: the odds of missing one are below 1e-6.
    batch = sample(buffer, 600, seed=seed, current_version=version, aligned_fraction=0.0, max_staleness=max_staleness)
    assert set(starts(batch)) == oracle.start_values()
    aligned = sample(buffer, 40, seed=seed, current_version=version, aligned_fraction=1.0, max_staleness=max_staleness)
    capped = sample(
        buffer, 40, seed=seed, current_version=version, max_staleness=max_staleness, max_tenant_share=0.5
    )
    for blocks, count in ((batch, 60), (aligned, 40), (capped, 40)):
        for n in range(count):
            if blocks.mask_NT[n, 0]:
                oracle.check_block(blocks, n, current_version=version, max_staleness=max_staleness)
            else:
                assert not blocks.mask_NT[n].any() and not blocks.has_reward_NT[n].any()


@settings(max_examples=30, deadline=None)
@given(before=OPERATIONS, after=OPERATIONS, seed=st.integers(0, 1000))
def test_a_restored_buffer_goes_on_bit_for_bit(tmp_path_factory, before, after, seed):
    # Catches a cursor, an open segment or the reservoir's generator left out of the saved state.
    straight, restored = (make_buffer(capacity_positions=20, reservoir_fraction=0.4, seed=seed + i) for i in range(2))
    next_position = play(before, straight)
    path = tmp_path_factory.mktemp("state") / "replay.safetensors"
    save_file(straight.state_dict(), path)
    restored.load_state_dict(load_file(path))
    play(after, straight, restored, value=1000.0, after=next_position)
    for name, tensor in straight.state_dict().items():
        assert tensor.equal(restored.state_dict()[name]), name
    if len(straight):
        for share in (0.4, 1.0):
            one, other = (sample(buffer, seed=seed, max_tenant_share=share) for buffer in (straight, restored))
            assert all(tensor.equal(getattr(other, name)) for name, tensor in vars(one).items())


# Blocks.


def test_a_block_at_a_round_start_carries_the_rounds_actions_and_rewards():
    # Catches an off-by-one between a draft and its verdict: two accepted, the third rejected.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0]), make_stretch([2.0, 3.0, 4.0], start_position=1, num_drafted=4))
    batch = sample(buffer, aligned_fraction=1.0)
    assert set(starts(batch)) == {2.0}
    assert batch.has_reward_NT.all()
    assert batch.action_NT[0].tolist() == [100, 101, 102]
    assert batch.reward_NT[0].tolist() == [1.0, 1.0, 0.0]
    assert batch.behaviour_log_probs_NT[0].tolist() == [-0.5, -1.5, -2.5]
    assert batch.anchor_ND[0].tolist() == [-1.0, -1.0]


def test_the_bonus_position_carries_no_reward():
    # Catches a reward for a position that drafted nothing.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0, 3.0], num_drafted=2))
    batch = sample(buffer, aligned_fraction=1.0)
    assert batch.has_reward_NT[0].tolist() == [True, True, False]
    assert batch.mask_NT.all()


def test_a_window_inside_a_round_carries_no_rewards():
    # Catches rewards given to drafts made at another depth, from another anchor.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0, 3.0, 4.0], num_drafted=4))
    batch = sample(buffer, aligned_fraction=0.0)
    is_inside = batch.hidden_NTD[:, 0, 0] > 1.0
    assert is_inside.any() and not batch.has_reward_NT[is_inside].any()


def test_a_sequence_starts_from_a_zero_anchor():
    # Catches an anchor read from whatever lies before the segment in memory.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0, 3.0, 4.0]), make_stretch([7.0, 8.0], request_id=1))
    batch = sample(buffer, 200)
    is_first = batch.hidden_NTD[:, 0, 0] == 7.0
    assert is_first.any() and (batch.anchor_ND[is_first] == 0).all()


def test_a_dishonest_round_is_seen_by_kl_but_never_rewarded():
    # Catches training on acceptances that a lossy rule granted.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0, 3.0], num_drafted=3, num_waived=1))
    batch = sample(buffer, aligned_fraction=1.0)
    assert set(starts(batch)) == {1.0, 2.0, 3.0}
    assert not batch.has_reward_NT.any()


@pytest.mark.parametrize(("current_version", "has_reward"), [(3, True), (7, True), (8, False)])
def test_drafts_older_than_the_staleness_bound_carry_no_reward(current_version, has_reward):
    # Catches policy gradients from drafters long gone.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0], num_drafted=2, version=3))
    batch = sample(buffer, aligned_fraction=1.0, current_version=current_version, max_staleness=4)
    assert (batch.staleness_N == current_version - 3).all()
    assert batch.has_reward_NT[:, 0].all() == has_reward
    assert batch.mask_NT[:, :2].all()


def test_aligned_blocks_are_drawn_evenly_from_round_starts_of_long_and_short_rounds():
    # Catches a draw through positions, which would prefer rounds with many acceptances and so bias the rewards.
    buffer = make_buffer(capacity_positions=40, reservoir_fraction=0.0)
    for request_id, num_rows in enumerate([4, 1, 3, 2]):
        buffer.add(make_stretch([10.0 * request_id + i for i in range(num_rows)], request_id=request_id, num_drafted=4))
    drawn = torch.tensor(starts(sample(buffer, 2000, aligned_fraction=1.0)))
    counts = [(drawn == 10.0 * request_id).sum().item() for request_id in range(4)]
    assert sum(counts) == 2000
    # The seed is fixed; over seeds a fair draw would fail once in a thousand.
    assert chisquare(counts).pvalue > 1e-3


def test_the_stated_shares_are_aligned_and_from_the_reservoir():
    # Catches a share counted twice: aligned blocks must come from both regions alike.
    buffer = make_buffer(capacity_positions=40, reservoir_fraction=0.5)
    for request_id in range(20):
        buffer.add(make_stretch([100.0 * request_id + i for i in range(4)], request_id=request_id, num_drafted=4))
    batch = sample(buffer, 40, aligned_fraction=0.25)
    from_ring = batch.hidden_NTD[:, 0, 0] >= 1500
    is_aligned = batch.hidden_NTD[:, 0, 0] % 100 == 0
    assert from_ring.sum() == 20
    # Five of twenty are aligned by request, others by chance.
    assert is_aligned[from_ring].sum() >= 5 and is_aligned[~from_ring].sum() >= 5
    assert not is_aligned.all()


# Memory.


def test_the_reservoir_keeps_old_and_new_segments_alike():
    # Catches a reservoir that keeps the first or the latest evictions. 200 runs, 6 evictions, 2 places.
    counts = torch.zeros(6)
    for seed in range(200):
        buffer = make_buffer(capacity_positions=12, reservoir_fraction=0.7, seed=seed)
        for value in range(7):
            buffer.add(make_stretch([float(value)], request_id=value))
        kept = buffer.state_dict()["owners"][1:]
        counts[kept] += 1
    assert counts.sum() == 400
    # Fixed seeds; over seeds a fair reservoir would fail less than once in a thousand.
    assert chisquare(counts).pvalue > 1e-3


def test_a_request_does_not_write_on_into_a_segment_the_ring_gave_away():
    # Catches an open handle that outlives its slot: request 0 would overwrite request 2's rows.
    buffer = make_buffer(capacity_positions=8, reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0]))
    buffer.add(make_stretch([11.0, 12.0], request_id=1))
    buffer.add(make_stretch([21.0, 22.0], request_id=2))
    buffer.add(make_stretch([3.0, 4.0], start_position=2))
    assert set(starts(sample(buffer, 200))) == {21.0, 22.0, 4.0}
    assert len(buffer) == 4


def test_a_segment_can_be_sampled_while_it_is_written():
    # Catches blocks that run on into the unwritten part.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0]))
    batch = sample(buffer)
    assert batch.mask_NT[batch.hidden_NTD[:, 0, 0] == 2.0].tolist()[0] == [True, False, False]
    buffer.add(make_stretch([3.0], start_position=2))
    batch = sample(buffer)
    assert batch.mask_NT[batch.hidden_NTD[:, 0, 0] == 2.0].tolist()[0] == [True, True, False]


def test_the_bounds_on_rows_and_bytes_hold_and_memory_never_grows():
    # Catches a buffer that grows with traffic.
    buffer = make_buffer(max_bytes=5000)
    num_bytes = buffer.num_bytes
    for i in range(50):
        buffer.add(make_stretch([float(i)] * 6, request_id=i % 3, start_position=6 * i))
        assert len(buffer) <= 28
    assert buffer.num_bytes == num_bytes <= 5000


def test_too_small_a_byte_budget_names_the_capacity_that_fits():
    # Catches a remedy that does not work.
    with pytest.raises(ValueError, match=r"over max_bytes 1000; \d+ positions would fit") as error:
        make_buffer(max_bytes=1000)
    fitting = int(str(error.value).split(";")[1].split()[0])
    assert make_buffer(capacity_positions=fitting, max_bytes=1000).num_bytes <= 1000
    with pytest.raises(ValueError, match="over max_bytes"):
        make_buffer(capacity_positions=fitting + SEGMENT_LEN, max_bytes=1000)


def test_forgotten_requests_leave_no_trace_in_memory():
    # Catches a deletion that only hides: the hidden states of a forgotten request must be gone.
    buffer = make_buffer()
    for i in range(12):
        buffer.add(make_stretch([100.0 * (i % 3) + 7.0] * 3, request_id=i % 3, start_position=3 * i))
    buffer.forget([1, 99])
    assert not (buffer.state_dict()["hidden"] == 107.0).any()
    assert 107.0 not in starts(sample(buffer, 200))
    buffer.forget([0, 2])
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="empty"):
        sample(buffer)


@settings(max_examples=30, deadline=None)
@given(operations=OPERATIONS, tenant=st.integers(0, 2))
def test_nothing_a_forgotten_tenant_brought_is_left_in_memory(operations, tenant):
    # Catches remnants: of evicted segments under shorter new ones, in the gap the reservoir's last segment leaves.
    buffer = make_buffer(capacity_positions=20, reservoir_fraction=0.4)
    play(operations, buffer)
    owners, before = buffer._segments.tenants, len(buffer)
    of_tenant = [length for owner, length in zip(owners, buffer._segments.lengths, strict=True)
                 if owner == tenant_id(f"tenant {tenant}")]
    # Every row holds a value of its own, so what belongs to whom can be told from the values.
    brought = values_of(operations, tenant)
    assert buffer.forget_tenant(f"tenant {tenant}") == sum(of_tenant) == before - len(buffer)
    for name in ("hidden", "target_hidden"):
        left = set(buffer.state_dict()[name].abs().flatten().tolist())
        assert not left & brought
    if len(buffer):
        assert not set(starts(sample(buffer, 200, max_tenant_share=0.5))) & brought
    assert buffer.forget_tenant(f"tenant {tenant}") == 0
    play(operations, buffer)  # and it goes on


def values_of(operations: list[tuple], tenant: int) -> set[float]:
    """The values that `play` gives the rows of this tenant's requests."""
    values, value = set(), 1.0
    for verb, request_id, *rest in operations:
        if verb == "add":
            if request_id % 3 == tenant:
                values |= {value + i for i in range(rest[0])}
            value += rest[0]
    return values


def test_the_bytes_of_a_forgotten_stretch_are_in_no_tensor():
    # Catches a field that is not wiped: facts, log-probabilities, kinds.
    buffer = make_buffer(capacity_positions=24, reservoir_fraction=0.5)
    secret = [123_456_789, 987_654_321, 555_444_333, 222_111_000]
    for i in range(12):
        stretch = make_stretch([1e3 + i] * 4, request_id=i, num_drafted=4, tenant="leaver" if i % 2 else "")
        stretch.token_ids_W = torch.tensor(secret) + i
        stretch.draft_token_ids_W = torch.tensor(secret) - i
        stretch.draft_log_probs_W = torch.full((4,), -7.0 - i)
        buffer.add(stretch)
    assert buffer.forget_tenant("leaver") > 0
    assert buffer.forget_tenant("") > 0
    assert len(buffer) == buffer.num_tenants == 0
    assert not any(buffer.state_dict()[name].any() for name in ("hidden", "target_hidden", "log_prob", "facts", "kind"))


# Shares.


def shares_of(batch: ReplayBatch) -> dict[int, float]:
    """Share of the blocks that could start by tenant, where a row's value is the tenant's number."""
    drawn = [int(value) for value in starts(batch)]
    return {tenant: drawn.count(tenant) / len(drawn) for tenant in set(drawn)}


@pytest.mark.parametrize("reservoir_fraction", [0.0, 0.5])
def test_a_hostile_key_with_nearly_all_positions_fills_a_fifth_of_every_batch(reservoir_fraction):
    # Catches a cap on average only, and blocks masked instead of drawn from others.
    buffer = make_buffer(capacity_positions=800, reservoir_fraction=reservoir_fraction)
    for i in range(190):
        buffer.add(make_stretch([9.0] * SEGMENT_LEN, request_id=i, tenant="hostile", num_drafted=4))
    for i in range(10):
        tenant = i % 5
        # The second segment of each has one position that a block can start at.
        buffer.add(make_stretch([float(tenant)] * 2, request_id=1000 + i, start_position=i // 5, tenant=f"{tenant}"))
    for seed in range(50):
        batch = sample(buffer, 32, seed=seed, max_tenant_share=0.2)
        shares = shares_of(batch)
        assert batch.mask_NT[:, 0].all()
        assert set(shares) == {0, 1, 2, 3, 4, 9} and shares[9] <= 0.2
    assert shares_of(sample(buffer, 320))[9] > 0.8


def test_fewer_tenants_than_the_share_allows_for_divide_a_batch_evenly():
    # Catches blocks left empty because three times a fifth is not the whole.
    buffer = make_buffer(capacity_positions=400, reservoir_fraction=0.0)
    for i in range(60):
        tenant = i if i in (1, 2) else 0
        buffer.add(make_stretch([float(tenant)] * 3, request_id=i, tenant=str(tenant)))
    batch = sample(buffer, 32, max_tenant_share=0.2)
    assert batch.mask_NT[:, 0].all()
    assert all(0.3 <= share <= 11 / 32 for share in shares_of(batch).values())


def test_what_one_tenant_stores_alone_is_drawn_as_if_there_were_no_shares():
    # Catches a server without keys whose runs changed, and a share of 1 that is not "off".
    buffer = make_buffer(capacity_positions=40, reservoir_fraction=0.5)
    for i in range(20):
        buffer.add(make_stretch([float(i)] * 3, request_id=i))
    one, other = sample(buffer), sample(buffer, max_tenant_share=0.2)
    assert all(tensor.equal(getattr(other, name)) for name, tensor in vars(one).items())


def test_tenants_below_the_cap_are_drawn_in_proportion_and_their_blocks_are_aligned_alike():
    # Catches an equal share for all, and tenants that always come in the aligned half of a batch.
    buffer = make_buffer(capacity_positions=400, reservoir_fraction=0.0)
    for i in range(60):
        tenant = 1 if i % 4 == 0 else 2
        buffer.add(make_stretch([float(tenant)] * 4, request_id=i, num_drafted=4, tenant=str(tenant)))
    counts, aligned = [], []
    for seed in range(100):
        batch = sample(buffer, 16, seed=seed, max_tenant_share=0.8)
        is_one_N = batch.hidden_NTD[:, 0, 0] == 1
        counts.append(int(is_one_N.sum()))
        aligned.append(int(is_one_N[:8].sum()))
    assert counts == [4] * 100
    assert 1.5 < sum(aligned) / 100 < 2.5  # half of 4; 0 or 4 if tenants came in order


def test_another_tenants_request_of_the_same_number_does_not_go_on_with_a_segment():
    # Catches request numbers that begin anew after a restart: the segment would belong to two keys.
    buffer = make_buffer(reservoir_fraction=0.0)
    buffer.add(make_stretch([1.0, 2.0], tenant="a"))
    buffer.add(make_stretch([3.0], start_position=2, tenant="b"))
    assert buffer.forget_tenant("a") == 2 and len(buffer) == 1


@pytest.mark.parametrize("part", ["hidden_WD", "target_hidden_WD", "draft_log_probs_W"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted_and_never_stored(part, bad):
    # Catches one broken forward pass that poisons every later update.
    buffer = make_buffer(reservoir_fraction=0.0)
    stretch = make_stretch([1.0, 2.0, 3.0], num_drafted=3)
    getattr(stretch, part)[1] = bad
    buffer.add(stretch)
    assert buffer.num_refused == 1 and len(buffer) == 2
    assert set(starts(sample(buffer))) == {1.0}  # the row after the gap has no anchor


def test_states_that_overflow_the_stored_dtype_are_refused():
    # Catches a finite float32 state that becomes infinite in float16.
    buffer = make_buffer(dtype=torch.float16)
    buffer.add(make_stretch([1.0, 1e6]))
    assert buffer.num_refused == 1 and len(buffer) == 1


def test_stored_rows_are_copies_and_serve_autograd():
    # Catches tensors made under inference_mode fed to autograd, and rows that change with the server's buffers.
    with torch.inference_mode():
        stretch = make_stretch([1.0, 2.0])
    buffer = make_buffer()
    with torch.inference_mode():
        buffer.add(stretch)
        stretch.hidden_WD.zero_()
    batch = sample(buffer)
    weight = torch.ones(HIDDEN, requires_grad=True)
    (batch.hidden_NTD @ weight).sum().backward()
    assert weight.grad is not None and (weight.grad > 0).all()


def test_states_that_carry_a_gradient_do_not_make_the_memory_carry_one():
    # Catches a graph that grows with every write.
    buffer, stretch = make_buffer(), make_stretch([1.0, 2.0])
    stretch.hidden_WD = stretch.hidden_WD.requires_grad_()
    buffer.add(stretch)
    assert not sample(buffer).hidden_NTD.requires_grad


def test_adding_stretches_together_or_one_by_one_is_the_same():
    # Catches verdicts on finiteness that slip from one stretch to the next.
    stretches: list[Transitions] = [
        make_stretch([1.0, math.nan, 3.0]), make_stretch([]), make_stretch([4.0, 5.0], request_id=1),
    ]
    together, apart = make_buffer(), make_buffer()
    together.add(*stretches)
    for stretch in stretches:
        apart.add(stretch)
    assert all(tensor.equal(apart.state_dict()[name]) for name, tensor in together.state_dict().items())


def test_the_same_seed_draws_the_same_blocks():
    # Catches draws from the global generator.
    buffer = make_buffer()
    buffer.add(make_stretch([float(i) for i in range(20)]))

    def drawn(seed: int) -> Tensor:
        return sample(buffer, seed=seed).hidden_NTD

    assert drawn(1).equal(drawn(1)) and not drawn(1).equal(drawn(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_block": 4}, r"max_block must be in 1\.\.3 for segment_len 4, got 4; segment_len 32 would do"),
        ({"capacity_positions": 3}, "capacity_positions must hold a segment of 4, got 3"),
        ({"reservoir_fraction": 1.0}, r"reservoir_fraction must be in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_a_remedy(changes, message):
    # Catches a buffer that can hold nothing, found out at the first sample.
    with pytest.raises(ValueError, match=message):
        make_buffer(**changes)


def test_a_block_longer_than_agreed_is_refused():
    # Catches a silently shortened draft length.
    buffer = make_buffer()
    buffer.add(make_stretch([1.0]))
    with pytest.raises(ValueError, match=r"block_len must be in 1\.\.3 \(max_block\), got 4"):
        sample(buffer, block_len=4)


@pytest.mark.parametrize("changes", [{"reservoir_fraction": 0.5}, {"dtype": torch.float64}, {"segment_len": 7}])
def test_a_state_of_other_sizes_is_refused(changes):
    # Catches a resume that reads rows at the wrong places: 28 rows are 7 x 4 and 4 x 7.
    with pytest.raises(ValueError, match="build the buffer as the saved one was"):
        make_buffer(**changes).load_state_dict(make_buffer().state_dict())
