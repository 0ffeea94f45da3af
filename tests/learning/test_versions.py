"""Published versions: what is kept of them, and the way back."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.support.random_traffic import assert_same, serving, state_of, stretch, trainer_of
from trainers.learning.online import OnlineTrainer
from trainers.learning.versions import KEPT_VERSIONS, LISTED_VERSIONS, Snapshot, VersionHistory


def test_publishing_what_serves_already_is_counted_and_not_done():
    """Catches swaps that are none: new numbers, and prefixes thrown away, for the same weights."""
    speculator = serving()
    trainer = trainer_of(speculator, steps_per_publish=1, steps_per_canary=2)
    trainer._student.update = lambda: None
    reports = [trainer.step() for _ in range(4)]
    assert not any(r.published or r.skipped_reason for r in reports)
    assert speculator.drafter.version == 0 and trainer.num_noop_swaps == 4


def test_a_rollback_serves_the_old_weights_and_learning_goes_on_from_them():
    """Catches a rollback that a later canary undoes, and moments that lead straight back."""
    speculator = serving()
    trainer = trainer_of(speculator, steps_per_publish=2, steps_per_canary=2, blocks_per_slice=4)
    states = {}
    for _ in range(12):
        trainer.step()
        states[speculator.drafter.version] = state_of(speculator.drafter)
    assert [v.version for v in trainer.versions()] == [*range(7)] and trainer.versions()[-1].is_live
    trainer.observe([stretch(50)])
    assert trainer.step_if_due() is None  # a step is in progress
    restored = trainer.rollback(3)
    assert (restored.version, restored.source, restored.step, restored.is_live) == (7, "rollback", 6, True)
    assert restored.canary_score is not None
    assert_same(state_of(speculator.drafter), states[3])
    assert_same(list(trainer.drafter.state_dict().values()), list(speculator.drafter.state_dict().values()))
    assert not trainer._student.optimizer.state and not trainer.is_busy
    with pytest.raises(ValueError, match="other weights than the live version 7, got 3"):
        trainer.rollback(3)
    for group in trainer._student.optimizer.param_groups:
        group["lr"] = 30.0
    while trainer.num_rollbacks == 1:
        trainer.step()
    # What the canary brings back is not version 6, from which we fled.
    assert_same(list(trainer.drafter.state_dict().values()), states[3][:-1])


def test_the_weights_of_the_last_versions_and_of_the_best_are_kept():
    """Catches memory that grows with every publish, and a best version that age pushes out."""
    speculator = serving()
    trainer = trainer_of(speculator, steps_per_publish=1, steps_per_canary=1)
    trainer.step()
    best, best_state = trainer.versions()[-1].version, state_of(speculator.drafter)
    trainer.config = dataclasses.replace(trainer.config, steps_per_canary=1000)
    for _ in range(2 * KEPT_VERSIONS):
        trainer.step()
    versions = trainer.versions()
    newest = range(len(versions))[-KEPT_VERSIONS:]
    assert [v.version for v in versions if v.is_kept] == [best, *newest]
    with pytest.raises(ValueError, match=r"version must be one whose weights are kept, 1, 10, .*, 17; got 5"):
        trainer.rollback(5)
    trainer.rollback()
    assert_same(state_of(speculator.drafter), best_state)


def test_the_list_of_versions_survives_a_resume_with_the_live_and_the_best_weights():
    """Catches numbers used twice, and a resumed server that cannot be rolled back."""
    trainer = trainer_of(serving(), steps_per_publish=1, steps_per_canary=4)
    for _ in range(6):
        trainer.step()
    state = copy.deepcopy(trainer.state_dict())
    resumed = OnlineTrainer(serving(), trainer.config)
    resumed.load_state_dict(state)
    assert [dataclasses.replace(v, is_kept=True) for v in trainer.versions()] == [
        dataclasses.replace(v, is_kept=True) for v in resumed.versions()
    ]
    assert [v.version for v in resumed.versions() if v.is_kept] == [4, 6]
    assert resumed.rollback().version == trainer.rollback(4).version == 7
    assert_same(state_of(resumed._live), state_of(trainer._live))


def test_a_trimmed_head_leaves_older_weights_behind():
    """Catches a rollback to weights of another shape."""
    trainer = trainer_of(serving(draft_vocab_size=12), tokens_before_trim=162, steps_per_publish=1)
    trainer.step()
    trainer.observe([stretch(40)])
    trainer.step()
    assert [v.is_kept for v in trainer.versions()] == [False, False, True, True]
    assert trainer.rollback(2).version == 4


def test_a_list_of_versions_does_not_grow_for_ever():
    """Catches a server whose memory and checkpoints grow with its age."""
    state = {"weight": torch.zeros(1)}
    history = VersionHistory(Snapshot(state, step=0))
    for version in range(2000):
        history.add(version, Snapshot(state, step=version), "learner")
    assert len(history.records()) == LISTED_VERSIONS
    assert sum(record.is_kept for record in history.records()) == KEPT_VERSIONS
