"""Several ranks, one drafter: the same updates as one process would make, and nobody waits or goes another way."""
# N blocks.

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import time

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dvi.distributed import PeerLostError, join, wait
from dvi.records import LossWeights, ReplayBatch
from tests.support.random_traffic import SETTINGS, serving, stretch
from tests.support.ranks import run_ranks, try_ranks
from trainers.learning.losses import BatchTotals, RewardBaseline
from trainers.learning.online import SMALLEST_PART, OnlineTrainer
from trainers.learning.student import Student

# Every term that has a mean of its own: each is taken over other positions, of which the halves have different numbers.
WEIGHTS = LossWeights(
    forward_kl=1.0, reverse_kl=0.3, accepted_ce=0.5, policy_gradient=0.7, entropy=0.1, total_variation=0.2
)


def digest(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()


def blocks(num_blocks: int) -> ReplayBatch:
    """Random float64 blocks with ragged ends and rewards."""
    generator = torch.Generator().manual_seed(7)
    shape, hidden_size = (num_blocks, 4), 12
    random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    mask_NT = torch.arange(4) < torch.randint(1, 5, (num_blocks, 1), generator=generator)
    has_reward_NT = mask_NT & (torch.rand(shape, generator=generator) < 0.7)
    return ReplayBatch(
        anchor_ND=random(num_blocks, hidden_size), hidden_NTD=random(*shape, hidden_size),
        target_hidden_NTD=random(*shape, hidden_size), token_ids_NT=torch.zeros(shape, dtype=torch.int64),
        mask_NT=mask_NT, action_NT=torch.randint(30, shape, generator=generator) * has_reward_NT,
        reward_NT=(torch.rand(shape, generator=generator) < 0.5).float(), has_reward_NT=has_reward_NT,
        behaviour_log_probs_NT=torch.full(shape, -3.0), staleness_N=torch.zeros(num_blocks, dtype=torch.int64),
    )  # fmt: skip


def part_of(batch: ReplayBatch, rows: slice) -> ReplayBatch:
    return ReplayBatch(**{name: tensor[rows] for name, tensor in vars(batch).items()})


def take_updates(kind: str, slices: int) -> tuple[list[np.ndarray], list[float], np.ndarray]:
    """The weights, gradient norms and baseline after three updates on this rank's part of twelve blocks."""
    # Drafters are float32 by design; in this process, which runs nothing else, they are float64.
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    peers = join(timeout_s=30)
    speculator = serving(kind)
    settings = dataclasses.replace(SETTINGS, normalise_advantage=True)
    student = Student(speculator.split, speculator.drafter, settings, peers=peers)
    whole, baseline, norms = blocks(12), RewardBaseline(8), []
    totals = BatchTotals.of(whole)
    share = 12 // peers.num_ranks
    mine = part_of(whole, slice(share * peers.rank, share * (peers.rank + 1)))
    for _ in range(3):
        student.clear_gradient()
        for index in range(slices):
            size = share // slices
            student.add_gradient(
                part_of(mine, slice(size * index, size * (index + 1))), totals=totals, weights=WEIGHTS,
                baseline=baseline, is_last=index == slices - 1,
            )  # fmt: skip
        wait(student.sum_gradient())
        norms.append(student.clip_gradient())
        student.update()
        baseline.update(totals)
    assert peers.is_alone or isinstance(student._model, DistributedDataParallel)
    peers.leave()
    return [p.detach().numpy() for p in student.drafter.parameters()], norms, baseline.values_T.numpy()


@pytest.mark.parametrize(
    ("kind", "slices", "num_ranks"), [("anchored", 1, 2), ("lora_head", 3, 2), ("recurrent", 1, 4)]
)
def test_ranks_with_a_part_each_take_the_update_of_one_with_all(kind, slices, num_ranks):
    """Catches means over a rank's own positions, sums that are averaged, and a gradient that goes out too early."""
    ((expected_weights, expected_norms, expected_baseline),) = run_ranks(take_updates, kind, 1, num_ranks=1)
    assert all(weight.dtype == np.float64 for weight in expected_weights)
    for weights, norms, baseline in run_ranks(take_updates, kind, slices, num_ranks=num_ranks):
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-12)
        np.testing.assert_allclose(baseline, expected_baseline, rtol=1e-12)
        for found, expected in zip(weights, expected_weights, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def learn(num_rounds_by_rank: list[int], changes: dict) -> dict:
    """Rounds of traffic on each rank as its loop would have them, then idle until all are done."""
    peers = join(timeout_s=30)
    speculator = serving(draft_vocab_size=12)
    trainer = OnlineTrainer(speculator, dataclasses.replace(SETTINGS, **changes), peers=peers)
    digests = {0: digest(speculator.drafter)}

    def look() -> None:
        digests.setdefault(speculator.drafter.version, digest(speculator.drafter))

    for index in range(num_rounds_by_rank[peers.rank]):
        trainer.observe([stretch(1000 * peers.rank + index, num_accepted=index % 4)])
        trainer.step_if_due(is_idle=True)
        look()
    trainer.notices.is_done = 1
    while trainer.agreed is None or trainer.agreed.is_done < peers.num_ranks:
        trainer.step_if_due(is_idle=True)
        look()
    trainer.finish_tick()
    look()
    peers.leave()
    return {
        "steps": trainer.num_steps, "version": speculator.drafter.version, "digests": digests,
        "rollbacks": trainer.num_rollbacks, "vocab": speculator.drafter.draft_head.vocab_size,
        "losses": trainer.last_report.losses, "positions": trainer.last_report.num_positions,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_rounds", "changes"),
    [
        ([60, 60], {"tokens_before_trim": 200}),
        ([80, 0], {"tokens_before_trim": 100}),  # one rank never has anything
        ([200, 40], {"blocks_per_slice": 5, "steps_per_canary": 3, "canary_tolerance": 0.0}),
        ([60, 5, 0, 90], {"compress_gradient": True, "budget": 0.5, "rounds_per_step": 4}),
    ],
)
def test_all_ranks_publish_the_same_versions(num_rounds, changes):
    """Catches ranks that part: a step, a trim, a canary or a publish that only some of them make, and any deadlock of
    ranks that are idle, busy, or done at different times."""
    ranks = run_ranks(learn, num_rounds, changes, num_ranks=len(num_rounds))
    first = ranks[0]
    assert first["steps"] > 3 and first["version"] > 1
    assert all(rank["version"] == first["version"] and rank["steps"] == first["steps"] for rank in ranks)
    assert all(rank["rollbacks"] == first["rollbacks"] and rank["losses"] == first["losses"] for rank in ranks)
    num_with_data = sum(rounds >= 40 for rounds in num_rounds)
    blocks_each = max(SETTINGS.blocks_per_step // len(num_rounds), SMALLEST_PART)
    assert first["positions"] >= 0.8 * num_with_data * blocks_each * SETTINGS.block_len
    assert first["vocab"] == (12 if "tokens_before_trim" in changes else 30)
    for rank in ranks:
        shared = rank["digests"].keys() & first["digests"].keys()
        assert first["version"] in shared and len(shared) > 1
        assert all(rank["digests"][version] == first["digests"][version] for version in shared)


def fall_silent(victim: int, is_dead: bool) -> str:
    """What a rank meets when another dies, or no longer answers."""
    peers = join(timeout_s=3)
    trainer = OnlineTrainer(serving(), SETTINGS, peers=peers)
    try:
        for index in itertools.count():
            trainer.observe([stretch(index)])
            trainer.step_if_due(is_idle=True)
            if peers.rank == victim and index == 30:
                time.sleep(0 if is_dead else 8)
                os._exit(1)
    except PeerLostError as error:
        with pytest.raises(PeerLostError):
            trainer.step_if_due()
        return str(error)


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_lost_rank_is_an_error_with_a_name_and_no_hang(is_dead):
    """Catches a rank that waits for ever for one that died or hangs, or that goes on alone."""
    (is_well, reason), _ = try_ranks(fall_silent, 1, is_dead, timeout_s=20)
    assert is_well and "rank 0 of 2 lost another rank" in reason


def roll_back() -> tuple[list[int], str, str | None]:
    peers = join(timeout_s=30)
    speculator = serving()
    trainer = OnlineTrainer(speculator, SETTINGS, peers=peers)
    refusal = None
    for index in itertools.count():
        trainer.observe([stretch(index)])
        trainer.step_if_due(is_idle=True)
        if speculator.drafter.version >= 2:
            break
    if peers.is_first:
        trainer.rollback(0)
    else:
        try:
            trainer.rollback(0)
        except ValueError as error:
            refusal = str(error)
    trainer.notices.is_done = 1
    while trainer.agreed is None or trainer.agreed.is_done < 2:
        trainer.step_if_due(is_idle=True)
    sources = [(v.version, v.source) for v in trainer.versions()]
    peers.leave()
    return sources, digest(speculator.drafter), refusal


def test_a_rollback_of_rank_0_holds_on_all():
    """Catches a rollback that one rank makes alone: from then on its version numbers mean other weights."""
    (first, weights, _), (second, others, refusal) = run_ranks(roll_back)
    assert first == second and weights == others
    assert [source for _, source in first].count("rollback") == 1
    assert "rank 0" in refusal


def be_busy(patience_s: float) -> tuple[int, int]:
    """Steps made while rank 1 had no time for any, and then with it."""
    peers = join(timeout_s=30)
    trainer = OnlineTrainer(serving(), dataclasses.replace(SETTINGS, budget=0.9), peers=peers)
    has_time, allows = peers.is_first, trainer.budget.allows
    trainer.budget.allows = lambda *args, **options: allows(*args, **options) and has_time
    num_steps = []
    for _ in range(2):
        until_s = time.monotonic() + patience_s
        while time.monotonic() < until_s:
            trainer.observe([stretch(len(num_steps))])
            trainer.step_if_due(is_idle=True)
        num_steps.append(trainer.num_steps)
        has_time = True
    trainer.notices.is_done = True
    while trainer.agreed.is_done < 2:
        trainer.step_if_due(is_idle=True)
    peers.leave()
    return tuple(num_steps)


def test_a_rank_without_time_makes_no_step_because_another_has_some():
    """Catches budgets that add up: each rank's steps at every rank's cost."""
    for while_busy, afterwards in run_ranks(be_busy, 1.0):
        assert while_busy == 0 < afterwards
