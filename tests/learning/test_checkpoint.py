"""Exact checkpoints: bit-equal round trips, crashes at every step of a save, damaged files, locks."""

from __future__ import annotations

import errno
import math
import os
import random
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support.paths import ROOT
from trainers.learning import checkpoint
from trainers.learning.checkpoint import SUMS_FILE, TENSORS_FILE, TREE_FILE, CheckpointStore

# What a save may do to the disk, each a step at which a process can die.
SYSCALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod")


def state_of(seed: int) -> dict[str, object]:
    return {"weights": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)), "seed": seed}


def assert_equal(actual: object, expected: object) -> None:
    """Same types all the way down, same bits in every tensor and float."""
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert safetensors.torch.save({"x": actual}) == safetensors.torch.save({"x": expected.contiguous()})
        return
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert [type(key) for key in actual] == [type(key) for key in expected]
        expected, actual = list(expected.values()), list(actual.values())
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, float):
        assert actual.hex() == expected.hex()
    else:
        assert actual == expected


def load(folder: Path) -> tuple[dict[str, object], int] | None:
    with CheckpointStore(folder) as store:
        return store.load_latest()


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Would catch tuples turned into lists, int keys into strings, rounded floats, shared or transposed tensors."""
    base = torch.arange(12.0).view(3, 4)
    state = {
        "tensors": [base, base[1:], base.t(), torch.tensor(2.5), torch.zeros(0, 3), torch.tensor([True, False])],
        "dtypes": [torch.ones(3, dtype=d) for d in (torch.int64, torch.uint8, torch.bfloat16, torch.float64)],
        "odd": torch.tensor([math.nan, math.inf, -0.0]),
        "floats": [0.1, -0.0, 1e308, 5e-324, math.pi, math.nan, math.inf, -math.inf, 1.0],
        "numbers": (1, True, False, -7, 2**80, None),
        "text": 'snow ☃, a quote ", a lone surrogate \ud800',
        "keys": {0: "int", "0": "str", (1, "a"): "tuple", None: "none", 2.5: "float"},
        "empty": [(), [], {}, ""],
        "nested": {"tuple": {"tensor": [({"dict": (1,)},)]}},
        "python_rng": random.Random(3).getstate(),
        "torch_rng": torch.Generator().manual_seed(5).get_state(),
    }
    with CheckpointStore(tmp_path) as store:
        store.save(state, 7)
    loaded, step = load(tmp_path)
    assert step == 7
    assert_equal(loaded, state)


def test_training_resumed_from_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Would catch any loss in AdamW's moments and step counts or in the generator that draws the data."""

    def make(seed: int) -> tuple[torch.nn.Linear, torch.optim.AdamW, torch.Generator]:
        torch.manual_seed(seed)
        model = torch.nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(seed)

    def train(model: torch.nn.Linear, optimizer: torch.optim.AdamW, generator: torch.Generator) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 5, generator=generator)).square().mean().backward()
            optimizer.step()

    model, optimizer, generator = make(0)
    train(model, optimizer, generator)
    with CheckpointStore(tmp_path) as store:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        store.save(state, 5)
    train(model, optimizer, generator)

    resumed_model, resumed_optimizer, resumed_generator = make(99)
    state, _ = load(tmp_path)
    resumed_model.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    resumed_generator.set_state(state["generator"])
    train(resumed_model, resumed_optimizer, resumed_generator)
    assert_equal(dict(resumed_model.state_dict()), dict(model.state_dict()))
    assert_equal(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_a_value_that_would_need_a_pickle_is_refused_by_its_path(tmp_path: Path) -> None:
    """Would catch a silent fall-back to pickle, or a value quietly turned into another type."""
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(TypeError, match=r"state\['learner'\]\[1\] must be .* got set"):
            store.save({"learner": [0, {1, 2}]}, 1)
        assert store.load_latest() is None


class Killed(BaseException):
    """The process is dead: no handler may catch it, and nothing it does afterwards reaches the disk."""


class DyingProcess:
    """Within the block, only the first `survives` changes to the disk happen: the next one, half done, kills."""

    def __init__(self, survives: float) -> None:
        self.survives = survives
        self.num_calls = 0

    def __enter__(self) -> DyingProcess:
        self._patch = pytest.MonkeyPatch()
        for name in SYSCALLS:
            self._patch.setattr(os, name, self._guarded(getattr(os, name)))
        write, save_file = Path.write_bytes, safetensors.torch.save_file
        for name in ("write_text", "write_bytes"):
            guarded = self._guarded(getattr(Path, name), torn=lambda path, *_, **__: write(path, b"torn"))
            self._patch.setattr(Path, name, guarded)
        guarded = self._guarded(save_file, torn=lambda _, path: write(path, b"torn"))
        self._patch.setattr(safetensors.torch, "save_file", guarded)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    @property
    def is_dead(self) -> bool:
        return self.num_calls > self.survives

    def _guarded(self, function, torn=lambda *args, **kwargs: None):
        def guarded(*args, **kwargs):
            self.num_calls += 1
            if not self.is_dead:
                return function(*args, **kwargs)
            if self.num_calls == self.survives + 1:
                torn(*args, **kwargs)
            raise Killed

        return guarded


@pytest.mark.parametrize("history", ["the first", "a later step", "the same step again"])
def test_a_kill_at_any_point_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, history: str) -> None:
    """Would catch a manifest before its files, a removal before its replacement, a rename before its sync."""
    old = None if history == "the first" else (state_of(1), 5)
    new = (state_of(2), 5 if history == "the same step again" else 6)
    outcomes = []
    for survives in range(1000):
        folder = tmp_path / str(survives)
        with CheckpointStore(folder, keep=1) as store:
            if old is not None:
                store.save(*old)
            with DyingProcess(survives) as process, suppress(Killed):
                store.save(*new)
        loaded = load(folder)  # also proves that no leftover gets in the way, and warns of nothing
        outcomes.append("new" if loaded is not None and loaded[0]["seed"] == 2 else "old")
        assert_equal(loaded, new if outcomes[-1] == "new" else old)
        with CheckpointStore(folder, keep=1) as store:
            store.save(state_of(3), 7)
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "step-00000007"]
        if not process.is_dead:
            break
    assert outcomes == sorted(outcomes, reverse=True)  # old up to one point, new from there on
    assert outcomes.count("old") >= 8 and outcomes.count("new") >= 2


def test_every_file_is_synced_before_its_folder_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a missing fsync, which a power cut turns into a checkpoint of zeros under a final name."""
    events = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recording_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    with CheckpointStore(tmp_path) as store:
        events.clear()
        store.save(state_of(1), 1)
    staging = ".step-00000001.staging"
    assert set(events[:-3]) == {TENSORS_FILE, TREE_FILE, SUMS_FILE}
    assert events[-3:] == [staging, "rename", tmp_path.name]


def test_two_hundred_torn_or_flipped_files_are_all_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    """Would catch any byte of a checkpoint that no hash covers."""
    rng = random.Random(0)
    with CheckpointStore(tmp_path) as store:
        store.save(state_of(1), 1)
        newest = store.save(state_of(2), 2)
        for case in range(200):
            path = newest / (TENSORS_FILE, TREE_FILE, SUMS_FILE)[case % 3]
            whole = path.read_bytes()
            at = rng.randrange(len(whole))
            if rng.random() < 0.5:
                path.write_bytes(whole[:at])
            else:
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
            named = path.name if path.name != SUMS_FILE else f"({TENSORS_FILE}|{TREE_FILE}) does not match {SUMS_FILE}"
            with pytest.warns(UserWarning, match=f"step-00000002 is damaged: {named}"):
                assert_equal(store.load_latest(), (state_of(1), 1))
            path.write_bytes(whole)
        assert_equal(store.load_latest(), (state_of(2), 2))


@pytest.mark.parametrize("name", [TENSORS_FILE, TREE_FILE, SUMS_FILE])
def test_a_missing_file_is_named_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    """Would catch a loader that trusts the newest folder's name."""
    with CheckpointStore(tmp_path) as store:
        store.save(state_of(1), 1)
        (store.save(state_of(2), 2) / name).unlink()
        with pytest.warns(UserWarning, match=name):
            assert_equal(store.load_latest(), (state_of(1), 1))


def test_a_run_resumed_before_damage_saves_over_it(tmp_path: Path) -> None:
    """Would catch a damaged newer checkpoint that hides, or crowds out, every one saved after the fall-back."""
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(state_of(1), 1)
    damaged = tmp_path / "step-00000009"
    damaged.mkdir()
    with CheckpointStore(tmp_path, keep=1) as store:
        with pytest.warns(UserWarning, match="step-00000009"):
            store.load_latest()
        store.save(state_of(2), 2)
        assert_equal(store.load_latest(), (state_of(2), 2))
        assert not damaged.exists()


def test_a_step_before_the_last_saved_one_is_refused(tmp_path: Path) -> None:
    """Would catch a fresh run in an old folder, whose checkpoints would never be the latest."""
    with CheckpointStore(tmp_path) as store:
        store.save(state_of(1), 100)
        with pytest.raises(ValueError, match=r"step must be >= 100, .* got 3; resume"):
            store.save(state_of(2), 3)


def test_a_checkpoint_of_another_format_is_refused_rather_than_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch an older program that resumes from, and then prunes towards, what a newer one left behind."""
    with CheckpointStore(tmp_path) as store:
        store.save(state_of(1), 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT_VERSION", 2)
            store.save(state_of(2), 2)
        with pytest.raises(ValueError, match="has format 2, this version reads 1; resume with the version"):
            store.load_latest()


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    """Would catch a disk that fills up, or a prune that takes the newest."""
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2, 10, 100_000_000):
            store.save(state_of(step), step)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-00000010", "step-100000000"}
    assert load(tmp_path)[1] == 100_000_000


def test_the_next_step_is_newer_than_any_that_is_whole(tmp_path: Path) -> None:
    """Would catch a server that counts from zero again after a restart, or past a checkpoint it could not read."""
    with CheckpointStore(tmp_path) as store:
        assert store.next_step == 1
        store.save(state_of(1), store.next_step)
        (store.save(state_of(2), store.next_step) / TREE_FILE).unlink()
    with CheckpointStore(tmp_path) as store:
        with pytest.warns(UserWarning, match="step-00000002 is damaged"):
            store.load_latest()
        assert store.next_step == 2
        store.save(state_of(3), store.next_step)
        assert_equal(store.load_latest(), (state_of(3), 2))


@pytest.mark.parametrize("is_private", [False, True])
def test_a_private_checkpoint_is_its_owners_alone_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_private: bool
) -> None:
    """Would catch users' text that others can read, be it only while it is written, and a share that cannot be read."""
    umask, modes = os.umask(0o022), []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        modes.append(os.fstat(descriptor).st_mode & 0o777)
        fsync(descriptor)

    try:
        with CheckpointStore(tmp_path) as store, monkeypatch.context() as patch:
            patch.setattr(os, "fsync", recording_fsync)
            path = store.save(state_of(1), 1, is_private=is_private)
    finally:
        os.umask(umask)
    folder_mode, file_mode = (0o700, 0o600) if is_private else (0o755, 0o644)
    assert path.stat().st_mode & 0o777 == folder_mode
    assert [file.stat().st_mode & 0o777 for file in path.iterdir()] == 3 * [file_mode]
    assert modes[:4] == [file_mode] * 3 + [folder_mode]


def test_keep_only_leaves_nothing_of_any_other_checkpoint(tmp_path: Path) -> None:
    """Would catch what must be forgotten surviving in an older checkpoint or in the litter of a failed save."""
    with CheckpointStore(tmp_path, keep=3) as store:
        for step in (1, 2, 3):
            store.save(state_of(step), step)
        (tmp_path / ".step-00000009.staging").mkdir()
        (tmp_path / ".step-00000002.previous").mkdir()
        store.keep_only(3)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000003"]
        assert_equal(store.load_latest(), (state_of(3), 3))


def test_keep_only_says_when_a_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a purge that fails in silence, as pruning may."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "refused")

    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            store.save(state_of(step), step)
        monkeypatch.setattr(os, "rmdir", refuse)
        with pytest.raises(OSError, match="refused"):
            store.keep_only(2)


def test_a_full_disk_raises_oserror_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Would catch the tensor library's own exception escaping, or litter and damage after a failed write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path) as store:
        store.save(state_of(1), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the kernel refuses to write more
        try:
            with pytest.raises(OSError, match=TENSORS_FILE):
                store.save({"big": torch.zeros(10_000)}, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000001"]
        assert_equal(store.load_latest(), (state_of(1), 1))


@pytest.mark.parametrize("call", SYSCALLS)
def test_a_refused_system_call_raises_oserror_and_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A read-only folder, a full disk, a failing one: would catch a save that fails halfway and harms what is there."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EACCES, "refused")

    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(state_of(1), 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            try:
                store.save(state_of(2), 2)
                saved = 2
            except OSError:
                saved = 1
        assert saved == (2 if call in ("replace", "unlink", "rmdir") else 1)  # not used, or only to prune
        assert_equal(store.load_latest(), (state_of(saved), saved))


def test_a_second_process_on_a_locked_folder_is_refused_at_once(tmp_path: Path) -> None:
    """Would catch two runs that prune each other's checkpoints, and a lock that outlives its owner."""
    program = (
        "import sys; from trainers.learning.checkpoint import CheckpointStore; "
        f"store = CheckpointStore({str(tmp_path)!r}); print('locked', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="is locked by another run; stop that run or choose another folder"):
            CheckpointStore(tmp_path)
        first.kill()
    CheckpointStore(tmp_path).close()  # a killed owner lets go


def test_two_stores_of_one_process_cannot_share_a_folder(tmp_path: Path) -> None:
    """Would catch a lock held per process, under which two learners of one server would overwrite each other."""
    with CheckpointStore(tmp_path), pytest.raises(ValueError, match="locked"):
        CheckpointStore(tmp_path)


def test_keep_below_one_is_refused(tmp_path: Path) -> None:
    """Would catch a store that removes the checkpoint it has just written."""
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_that_was_removed_or_replaced_is_made_again_and_locked(tmp_path, caplog, is_replaced):
    """Catches a server that can save nothing until its restart because somebody tidied up."""
    folder = tmp_path / "run" / "checkpoints"
    with CheckpointStore(folder) as store:
        store.save(state_of(1), 1)
        (tmp_path / "run").rename(tmp_path / "moved")
        if is_replaced:
            folder.mkdir(parents=True)
        assert store.renew() and not store.renew()
        store.save(state_of(2), store.next_step)
        store.save(state_of(3), store.next_step)
        assert sum("was removed or replaced" in record.message for record in caplog.records) == 1
        with pytest.raises(ValueError, match="locked by another run"):
            CheckpointStore(folder)
    with CheckpointStore(folder) as store:
        assert_equal(store.load_latest()[0], state_of(3))


def test_a_folder_that_another_run_has_taken_is_a_refusing_disk(tmp_path):
    """Catches two runs that write to one folder, and a learner that dies of it."""
    folder = tmp_path / "checkpoints"
    with CheckpointStore(folder) as store:
        folder.rename(tmp_path / "moved")
        with CheckpointStore(folder), pytest.raises(OSError, match="locked by another run"):
            store.save(state_of(1), 1)
