"""Positions that a length rule leaves out of a round are not computed, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dvi.decode.round
import dvi.model.llama_path
from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import ConfidenceStop, DraftContext, FixedLength, LengthPolicy
from dvi.model.kv_cache import RollbackCache
from dvi.model.padded import PaddedSplit
from dvi.model.ragged import Packing, is_worth_packing
from dvi.model.split import SplitModel
from dvi.records import SamplingParams, Transitions
from tests.support.drafter_doubles import RaggedLength, random_drafter
from tests.support.exact_doubles import need_self_check, self_check_left_out
from tests.support.tiny_models import tiny_model

TOLERANCE = 1e-10
WIDTH = 4
# Verified positions of each row, of WIDTH; the sliding windows of 5 are passed by every prompt but the shortest.
COUNTS = {
    "nothing drafted": [1, 1, 1], "ragged": [2, 4, 1], "one row short": [4, 4, 3], "all": [4, 4, 4],
    "a single row": [2],
}  # fmt: skip
LENGTHS = {"equal": [7, 7, 7], "unequal": [3, 9, 6]}


def split_of(arch: str = "llama", *, split_layer: int = 1, dtype: torch.dtype = torch.float64, **config) -> SplitModel:
    model = tiny_model(arch, num_layers=3, hidden_size=32, dtype=dtype, seed=2, **config)
    return SplitModel(model, split_layer=split_layer, path="direct")


def filled_cache(split: SplitModel, lengths: list[int]) -> RollbackCache:
    cache = split.make_cache(len(lengths), 40)
    ids_BS = torch.randint(64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    place = cache.place(offset=0, width=max(lengths))
    split.deep(split.shallow(ids_BS, cache, place), ids_BS, cache, place)
    cache.commit(lengths)
    return cache


def hidden_of(split: SplitModel, cache: RollbackCache, *, seed: int = 1) -> Tensor:
    """h_k [B, WIDTH, D] of one round's positions, whose shallow keys and values lie in the cache."""
    ids_BU = torch.randint(64, (cache.rows, WIDTH), generator=torch.Generator().manual_seed(seed))
    return split.shallow(ids_BU, cache, cache.place(offset=0, width=WIDTH))


def rectangle(split: SplitModel, hidden_BUD: Tensor, cache: RollbackCache) -> tuple[Tensor, Tensor]:
    final_BUD = split.deep(hidden_BUD, None, cache, cache.place(offset=0, width=WIDTH))
    return final_BUD, split.head(final_BUD)


def packed(split: SplitModel, hidden_BUD: Tensor, cache: RollbackCache, counts: list[int]) -> tuple[Tensor, Tensor]:
    packing = Packing(torch.tensor(counts), width=WIDTH)
    final_MD = split.deep_packed(packing.pack(hidden_BUD), cache, cache.place(offset=0, width=WIDTH), packing)
    assert len(final_MD) == sum(counts)
    return packing.unpack(final_MD), packing.unpack(split.head(final_MD))


def assert_same_where_counted(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], counts: list[int]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        for row, count in enumerate(counts):
            torch.testing.assert_close(one[row, :count], other[row, :count], rtol=TOLERANCE, atol=TOLERANCE)


def norm_in_own_dtype(x: Tensor, norm: nn.Module) -> Tensor:
    return norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


def use_fused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What half precisions run, in float64; their norms in float32 would hide faults, or show rounding as one."""
    monkeypatch.setattr(dvi.model.llama_path, "_PackedBlock", dvi.model.llama_path._FusedBlock)
    monkeypatch.setattr(dvi.model.llama_path, "rms_norm", norm_in_own_dtype)


@torch.no_grad()
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_packed_pass_equals_the_rectangle_where_positions_count(arch, lengths, counts, is_fused, monkeypatch):
    """Catches rotary factors of another position, rows mixed on the way to attention or back, masks, windows and
    head groups that take packed rows for places."""
    if is_fused:
        use_fused_blocks(monkeypatch)
    split = split_of(arch)
    lengths = lengths[: len(counts)]
    found, wanted = [], []
    for results in (found, wanted):
        cache = filled_cache(split, lengths)
        hidden_BUD = hidden_of(split, cache)
        is_packed = results is found
        results += packed(split, hidden_BUD, cache, counts) if is_packed else rectangle(split, hidden_BUD, cache)
    assert_same_where_counted(found, wanted, counts)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split_layer", [0, 1, 2])
def test_any_cut_and_head_packs(split_layer, tied):
    """Catches layers that are taken from the wrong side of the cut."""
    split, counts = split_of(split_layer=split_layer, tied=tied), COUNTS["ragged"]
    caches = [filled_cache(split, LENGTHS["unequal"]) for _ in range(2)]
    hidden_BUD = hidden_of(split, caches[0])
    assert torch.equal(hidden_BUD, hidden_of(split, caches[1]))
    wanted = rectangle(split, hidden_BUD, caches[1])
    assert_same_where_counted(packed(split, hidden_BUD, caches[0], counts), wanted, counts)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_what_was_left_out_is_never_attended_to_later(arch):
    """Rounds upon rounds of random counts and commits equal rectangles whose caches saw the same commits, whatever is
    scribbled over all that is not committed: catches a round that commits, or reads, past what it computed."""
    split, generator = split_of(arch), torch.Generator().manual_seed(4)
    caches = [filled_cache(split, LENGTHS["unequal"]) for _ in range(2)]
    for seed in range(6):
        counts_B = torch.randint(1, WIDTH + 1, (3,), generator=generator)
        counts = counts_B.tolist()
        hidden = [hidden_of(split, cache, seed=seed) for cache in caches]
        found, wanted = packed(split, hidden[0], caches[0], counts), rectangle(split, hidden[1], caches[1])
        assert_same_where_counted((hidden[0], *found), (hidden[1], *wanted), counts)
        kept = [int(torch.randint(1, count + 1, (), generator=generator)) for count in counts]
        for cache in caches:
            cache.commit(kept)
        for row, length in enumerate(caches[0].lengths):
            for layer, (keys, values) in caches[0].copy_out(row, length, 40).items():
                assert keys.isfinite().all() and values.isfinite().all()
                caches[0].copy_in(row, length, {layer: (keys + 1e3, values - 1e3)})


@torch.no_grad()
def test_a_row_gone_nan_stays_alone():
    """Places that do not count hold copies: of another row they would carry its NaN into slots that are masked, where
    a probability of 0 times NaN is NaN."""
    split, counts = split_of(), COUNTS["ragged"]
    for broken in range(3):
        cache = filled_cache(split, LENGTHS["unequal"])
        hidden_BUD = hidden_of(split, cache)
        hidden_BUD[broken] = float("nan")
        final_BUD, logits_BUV = packed(split, hidden_BUD, cache, counts)
        cache.commit([1, 1, 1])
        next_BUD, _ = packed(split, hidden_of(split, cache, seed=2), cache, [1, 1, 1])
        for row in range(3):
            for tensor in (final_BUD, logits_BUV, next_BUD):
                assert tensor[row].isfinite().all() == (row != broken)


@torch.no_grad()
def test_bfloat16_packs_as_well_as_it_rounds():
    """Its weights are fused in place and its attention is PyTorch's own."""
    split, counts = split_of(dtype=torch.bfloat16), COUNTS["ragged"]
    caches = [filled_cache(split, LENGTHS["unequal"]) for _ in range(2)]
    hidden_BUD = hidden_of(split, caches[0])
    hidden_of(split, caches[1])
    found, wanted = packed(split, hidden_BUD, caches[0], counts)[1], rectangle(split, hidden_BUD, caches[1])[1]
    for row, count in enumerate(counts):
        assert (found[row, :count] - wanted[row, :count]).norm() < 0.05 * wanted[row, :count].norm()


# Whole rounds


def batch_of(split: SplitModel | PaddedSplit, policy: LengthPolicy) -> DecodingBatch:
    batch = DecodingBatch(
        split, random_drafter(split, seed=1), max_rows=5, capacity=0, policy=policy, rule=StrictRule(),
        wants_transitions=True,
    )  # fmt: skip
    for index in range(5):
        params = SamplingParams(temperature=0.8 * (index % 2), seed=index)
        batch.admit(Sequence(index, [5, 9, 33, index][index % 3 :], params, lambda _token: None, max_new_tokens=30))
    return batch


def tokens_and_experience(batch: DecodingBatch, num_rounds: int) -> tuple[list[list[int]], list[Transitions]]:
    transitions = [one for _ in range(num_rounds) for one in batch.round()]
    return [sequence.token_ids for sequence in batch.sequences], transitions


class CountedPasses:
    """Counts the positions of a split's packed passes."""

    def __init__(self, split: SplitModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_positions: list[int] = []
        deep_packed = split.deep_packed

        def counted(hidden_MD: Tensor, *args: object) -> Tensor:
            self.num_positions.append(len(hidden_MD))
            return deep_packed(hidden_MD, *args)

        monkeypatch.setattr(split, "deep_packed", counted)


def test_ragged_rounds_pack_and_give_the_rectangles_tokens_and_experience(monkeypatch):
    """Catches verdicts, anchors, counts or transitions cut from places that were not computed."""
    split = split_of()
    passes = CountedPasses(split, monkeypatch)
    batch = batch_of(split, RaggedLength(6, seed=3))
    drafted = []
    monkeypatch.setattr(batch.policy, "observe", lambda outcome: drafted.append(outcome.num_drafted))
    tokens, transitions = tokens_and_experience(batch, 8)
    rectangles = [len(counts) * (max(counts) + 1) for counts in drafted]
    counted = [sum(counts) + len(counts) for counts in drafted]
    pairs = zip(counted, rectangles, strict=True)
    assert passes.num_positions == [m for m, n in pairs if is_worth_packing(m, n)] != []

    monkeypatch.setattr(dvi.decode.round, "is_worth_packing", lambda *_: False)
    wanted_tokens, wanted = tokens_and_experience(batch_of(split, RaggedLength(6, seed=3)), 8)
    assert tokens == wanted_tokens
    for one, other in zip(transitions, wanted, strict=True):
        assert (one.num_drafted, one.num_accepted) == (other.num_drafted, other.num_accepted)
        assert torch.equal(one.token_ids_W, other.token_ids_W)
        torch.testing.assert_close(one.target_hidden_WD, other.target_hidden_WD, rtol=TOLERANCE, atol=TOLERANCE)


class OneRowDrafts(FixedLength):
    """Row 0 drafts all T, the others nothing."""

    stops_early = True

    def keep(self, context: DraftContext) -> Tensor:
        return torch.arange(len(context.is_open_B)) == 0


def test_what_is_not_computed_cannot_fail_a_row(monkeypatch):
    """h_k that is infinite at positions that do not count: their row has done nothing wrong."""
    split = split_of()
    propose = dvi.decode.round.propose

    def propose_with_inf(*args: object, **options: object) -> object:
        draft = propose(*args, **options)
        draft.hidden_BUD[1:, 1:] = float("inf")
        return draft

    monkeypatch.setattr(dvi.decode.round, "propose", propose_with_inf)
    batch = batch_of(split, OneRowDrafts(4))
    batch.round()
    assert [sequence.finish_reason for sequence in batch.sequences] == [None] * 5
    assert [outcome.num_drafted for outcome in batch.outcomes] == [4, 0, 0, 0, 0]


@pytest.mark.parametrize("policy", [FixedLength(0), FixedLength(4), ConfidenceStop(4, threshold=0.0)])
def test_a_rule_that_stops_no_row_never_packs(policy, monkeypatch):
    """A full rectangle has nothing to leave out, and packing it would only cost."""
    split = split_of()
    monkeypatch.setattr(split, "deep_packed", lambda *_: pytest.fail("packed a full rectangle"))
    batch_of(split, policy).round()


def test_exact_rounds_never_pack_and_keep_every_bit():
    """A pass of fewer positions has other bits: greedy rows of a ragged batch must hold plain decoding's float32."""
    with self_check_left_out():
        split = PaddedSplit(split_of(dtype=torch.float32), width=8)
    need_self_check(split)
    assert split._split.can_pack and not split.can_pack
    _, ragged = tokens_and_experience(batch_of(split, OneRowDrafts(6)), 4)
    _, plain = tokens_and_experience(batch_of(split, FixedLength(0)), 20)
    hidden = {(t.request_id, t.start_position + i): t.target_hidden_WD[i] for t in plain for i in range(len(t))}
    greedy = [t for t in ragged if t.request_id % 2 == 0]
    assert sum(t.num_drafted for t in greedy) > 0
    for t in greedy:
        for i in range(len(t)):
            assert torch.equal(t.target_hidden_WD[i], hidden[t.request_id, t.start_position + i])


def test_only_the_direct_path_on_a_cpu_packs():
    """Policies price a depth by this flag."""
    assert split_of().can_pack
    assert not SplitModel(tiny_model("llama"), split_layer=1, path="views").can_pack
    meta = SplitModel(tiny_model("llama", dtype=torch.float32).to("meta"), split_layer=1)
    assert meta.path == "direct" and not meta.can_pack


def test_the_host_knows_how_many_positions_count(monkeypatch):
    """The number that packing is decided by is the sum of what counts, also where a round ends early."""
    drafts = []
    propose = dvi.decode.round.propose
    monkeypatch.setattr(dvi.decode.round, "propose", lambda *a, **o: drafts.append(propose(*a, **o)) or drafts[-1])
    batch = batch_of(split_of(), RaggedLength(5, seed=1, keep=0.5))
    tokens_and_experience(batch, 8)
    for draft in drafts:
        assert draft.num_positions == int((draft.num_drafted_B + 1).sum())
        assert draft.hidden_BUD.shape[1] == int(draft.num_drafted_B.max()) + 1
    assert len({draft.hidden_BUD.shape[1] for draft in drafts}) > 1
