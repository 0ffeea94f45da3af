"""The learner of a server and its state on disk: nothing lost, nothing kept that must not be, and no disk stops it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dvi.config import load_config
from dvi.model.adapter_store import read_manifest
from dvi.records import SamplingParams, Transitions
from dvi.settings import LearningSettings, ServeConfig
from dvi.telemetry import METRICS_FILE, MetricsWriter, read_metrics
from tests.learning.test_checkpoint import assert_equal
from tests.learning.test_online import serving, stretch
from tests.support.paths import STORIES
from trainers.jobs import serving_learner as serving_job
from trainers.jobs import traffic_counts
from trainers.jobs.run_folder import load_run
from trainers.jobs.serve import build_serving
from trainers.jobs.serving_learner import ServingLearner
from trainers.jobs.traffic_counts import TrafficCounts
from trainers.learning.checkpoint import CheckpointStore
from trainers.learning.online import OnlineTrainer

SETTINGS = LearningSettings(
    lr=0.01, blocks_per_step=4, rounds_per_step=1, budget=1.0, steps_per_publish=2, steps_per_canary=4,
    replay_positions=256, schedule="kl_rl", warmup_steps=5, ramp_steps=5,
)  # fmt: skip


@pytest.fixture
def learner_on() -> Iterator[Callable[..., ServingLearner]]:
    """Makes learners of random tensors, gone on from the folder where that holds something."""
    learners = []

    def make(folder: Path, *, checkpoint_every_s: float = math.inf, **options) -> ServingLearner:
        store = CheckpointStore(folder)
        learners.append(
            ServingLearner(OnlineTrainer(serving(), SETTINGS), store, checkpoint_every_s=checkpoint_every_s, **options)
        )
        saved = store.load_latest()
        if saved is not None:
            learners[-1].load_state_dict(saved[0])
        return learners[-1]

    yield make
    for learner in learners:
        learner._is_changed = False
        learner.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The job's own clock, which stands still but for `now_s += ...`."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(serving_job, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def teach(learner: ServingLearner, rounds: range, *, request_id: int = 0) -> None:
    for i in rounds:
        learner.observe([dataclasses.replace(stretch(i, num_accepted=i % 4), request_id=request_id)])
        learner.step_if_due()


def secret(tenant: str, request_id: int) -> Transitions:
    """A round whose hidden states are unlike any other's."""
    return dataclasses.replace(stretch(777), tenant=tenant, request_id=request_id)


SECRET = secret("", 0).hidden_WD.numpy().tobytes()


def num_files_with_secret(folder: Path) -> int:
    return sum(SECRET in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def copied(tree: object) -> object:
    """The tree as it is now, in plain dicts."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: copied(item) for key, item in tree.items()}
    return type(tree)(map(copied, tree)) if isinstance(tree, list | tuple) else tree


def saved_state(folder: Path) -> dict:
    with CheckpointStore(folder) as store:
        return store.load_latest()[0]


def saved_tensors(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


@contextmanager
def held_writer(learner: ServingLearner) -> Iterator[None]:
    """Inside, checkpoints begin to be written and do not end."""
    go_on, write = threading.Event(), learner._write

    def held(*args: object) -> None:
        go_on.wait(60)
        write(*args)

    learner._write = held
    try:
        yield
    finally:
        go_on.set()
        learner._write = write


# Going on


def test_a_restarted_learner_has_all_but_the_users_text(learner_on, tmp_path: Path) -> None:
    """Catches hidden states of users on disk by default, and a drafter, moment, phase or draw that is lost."""
    learner = learner_on(tmp_path)
    teach(learner, range(30))
    learner.observe([secret("alice", 5)])
    before = copied(learner.state_dict() | {"trainer": learner.trainer.state_dict()})
    learner.close()
    assert num_files_with_secret(tmp_path) == 0
    with closing(learner_on(tmp_path)) as restarted:
        assert len(learner.trainer.replay) > 0 == len(restarted.trainer.replay)
        state = restarted.state_dict()
        assert "replay" not in state["trainer"]
        assert_same_learning(copied(state | {"trainer": restarted.trainer.state_dict()}), before)
        teach(restarted, range(100, 130))
        assert restarted.trainer.num_steps > learner.trainer.num_steps > 0


def test_with_the_experience_saved_a_restarted_learner_goes_on_bit_for_bit(learner_on, tmp_path: Path) -> None:
    """Catches any state left out, and files of users' text that others can read."""
    straight = learner_on(tmp_path / "straight", save_replay=True)
    teach(straight, range(30))
    straight.checkpoint()
    straight.close()
    files = [path for path in (tmp_path / "straight").rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o600}
    resumed = learner_on(tmp_path / "straight", save_replay=True)
    for learner in (straight, resumed):
        teach(learner, range(100, 130), request_id=1)
    ours, theirs = (learner.trainer.replay.state_dict() for learner in (resumed, straight))
    assert_same_learning(resumed.state_dict(), straight.state_dict())
    for name in ours.keys() - {"open"}:  # request 0 ended with its process
        assert_equal(ours[name], theirs[name])
    resumed.close()


def assert_same_learning(found: dict, expected: dict) -> None:
    """Equal to the last bit, but for the experience and what a clock measured."""
    for state in (found, expected):
        del state["trainer"]["replay"]
        del state["trainer"]["counts"]["train_s"]
        for record in state["trainer"]["versions"]["records"]:
            del record["created_s"]
    assert_equal(found, expected)


def test_a_new_request_does_not_go_on_with_a_dead_ones_segment(learner_on, tmp_path: Path) -> None:
    """Request ids begin anew with the process: catches two users' texts joined into one stretch of experience."""
    with closing(learner_on(tmp_path, save_replay=True)) as learner:
        learner.observe([stretch(0)])
    with closing(learner_on(tmp_path, save_replay=True)) as restarted:
        restarted.observe([stretch(1)])  # as request 0 again, at the position where the old one stopped
        assert restarted.trainer.replay.state_dict()["lengths"].count_nonzero() == 2


def test_a_checkpoint_holds_one_moment_however_late_it_is_written(learner_on, tmp_path: Path) -> None:
    """Catches tensors that go on changing between the snapshot and the disk."""
    learner = learner_on(tmp_path, save_replay=True)
    teach(learner, range(20))
    with held_writer(learner):
        learner.checkpoint()
        expected = copied(learner.state_dict())
        teach(learner, range(20, 30))
        assert not learner.last_write.done()
    learner.last_write.result()
    with pytest.raises(AssertionError):
        assert_equal(learner.state_dict(), expected)
    learner._is_changed = False  # so that closing writes nothing more
    learner.close()
    assert_equal(saved_state(tmp_path), expected)


def test_close_saves_what_is_new_and_only_that(learner_on, tmp_path: Path) -> None:
    """Catches a shutdown that loses the last interval, and one that writes the same state again."""
    with closing(learner_on(tmp_path)) as learner:
        teach(learner, range(10))
    assert saved_state(tmp_path)["trainer"]["counts"]["num_steps"] == learner.trainer.num_steps > 0
    names = [path.name for path in tmp_path.iterdir()]
    learner_on(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == names


# When


def test_checkpoints_come_every_interval_while_something_changes(learner_on, tmp_path: Path, clock) -> None:
    """Catches an interval that is not kept, one that only a step can end, and a disk kept busy by an idle server."""
    learner = learner_on(tmp_path, checkpoint_every_s=60.0)
    learner.observe([stretch(0)])
    learner.step_if_due(is_idle=True)
    assert learner.last_write is None
    clock.now_s = 60.0
    assert learner.is_busy  # so that an idle engine calls
    learner.step_if_due(is_idle=True)
    first = learner.last_write
    first.result()
    assert learner.is_busy
    learner.step_if_due(is_idle=True)
    assert learner.num_checkpoints == learner.stats()["checkpoints"] == 1
    clock.now_s = 3600.0
    assert not learner.is_busy
    learner.step_if_due(is_idle=True)
    assert learner.last_write is first
    learner.close()


def test_a_slow_disk_holds_nobody_up_and_checkpoints_do_not_queue(learner_on, tmp_path: Path) -> None:
    """Catches a write on the engine's thread, and snapshots that pile up in memory behind a slow disk."""
    learner = learner_on(tmp_path, checkpoint_every_s=0.0)
    with held_writer(learner):
        teach(learner, range(20))
        assert len(learner._writes) == 1 and learner.num_checkpoints_skipped == 19
        assert learner.trainer.num_steps > 0
    learner.close()
    assert learner.num_checkpoints == 2
    assert saved_state(tmp_path)["traffic"]["total"]["num_rounds"] == 20


def test_who_gives_up_waiting_for_a_checkpoint_does_not_stop_it(learner_on, tmp_path: Path) -> None:
    """Catches a client that hangs up and takes the checkpoint, or the learner, with it."""
    learner = learner_on(tmp_path)
    with held_writer(learner):
        writes = [learner.checkpoint() for _ in range(2)]
        assert [write.cancel() for write in writes] == [False, False]
    assert [write.result().name for write in writes] == ["step-00000001", "step-00000002"]
    learner.step_if_due()
    assert learner.num_checkpoints == 2


def test_a_fault_of_ours_in_a_write_is_not_taken_for_the_disks(learner_on, tmp_path: Path) -> None:
    """Catches a bug that is retried in silence for ever."""
    learner = learner_on(tmp_path)
    learner.traffic.num_requests = {1}  # a checkpoint holds no sets
    learner.checkpoint()
    assert isinstance(learner.last_write.exception(), TypeError)
    with pytest.raises(TypeError, match="num_requests"):
        learner.step_if_due()


# Disks that refuse


def full_disk(folder: Path) -> Callable[[], None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses to write more
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_only_folder(folder: Path) -> Callable[[], None]:
    patch = pytest.MonkeyPatch()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):  # root may write all the same

        def refuse(path: object, *_: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        patch.setattr(os, "mkdir", refuse)

    def undo() -> None:
        patch.undo()
        folder.chmod(0o700)

    return undo


def vanished_folder(folder: Path) -> Callable[[], None]:
    away = folder.rename(folder.with_name("away"))
    folder.write_text("no folder")

    def undo() -> None:
        folder.unlink()
        away.rename(folder)

    return undo


def denied_sync(folder: Path) -> Callable[[], None]:
    patch = pytest.MonkeyPatch()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    patch.setattr(os, "fsync", fail)
    return patch.undo


@pytest.mark.parametrize("fault", [full_disk, read_only_folder, vanished_folder, denied_sync])
def test_a_disk_that_refuses_stops_no_learning_and_is_tried_again(
    learner_on, tmp_path: Path, clock, caplog, fault: Callable[[Path], Callable[[], None]]
) -> None:
    """Catches a full disk that ends learning or serving, an error that nobody sees, and one that stays for ever."""
    folder, events = tmp_path / "checkpoints", []
    learner = learner_on(folder, checkpoint_every_s=60.0)
    learner.on_event = lambda kind, text: events.append(kind)

    def live_an_interval() -> None:
        first = learner.trainer.num_steps
        clock.now_s += 60.0
        teach(learner, range(first, first + 10))
        learner.last_write.exception()
        learner.step_if_due()
        assert learner.trainer.num_steps > first

    live_an_interval()
    before = saved_tensors(folder)
    undo = fault(folder)
    try:
        for attempt in range(3):
            live_an_interval()
            assert learner.num_checkpoints_failed == learner.stats()["checkpoints_failed"] == attempt + 1
            assert learner.last_checkpoint_error and caplog.text.count("no checkpoint: ") == attempt + 1
    finally:
        undo()
    assert saved_tensors(folder) == before
    live_an_interval()
    assert events == ["checkpoint"] + 3 * ["checkpoint_failed"] + ["checkpoint"]
    assert learner.last_checkpoint_error is None and saved_tensors(folder).items() > before.items()
    learner.close()
    assert saved_state(folder)["trainer"]["counts"]["num_steps"] == learner.trainer.num_steps


def test_a_metrics_file_that_refuses_stops_nothing_and_is_reported_once(
    learner_on, tmp_path: Path, monkeypatch, caplog
) -> None:
    """Catches a full disk that ends learning through its log, or fills the log with it."""
    metrics = MetricsWriter(tmp_path / "metrics")
    monkeypatch.setattr(serving_job, "RECORD_EVERY_S", 0.0)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(learner_on(tmp_path / "state", metrics=metrics)) as learner:
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "write", refuse)
            teach(learner, range(20))
        steps = learner.trainer.num_steps
        assert steps > 5 and caplog.text.count("updates are not recorded") == 1
        teach(learner, range(20, 25))
    events = read_metrics(tmp_path / "metrics" / METRICS_FILE)
    assert [event["step"] for event in events] == list(range(steps + 1, learner.trainer.num_steps + 1))
    assert "losses" in events[0] and "text" not in str(events) and "prompt" not in str(events)


def test_a_month_of_updates_does_not_fill_the_disk(learner_on, tmp_path: Path, clock) -> None:
    """Catches a line for each of the steps of a server that never ends; skipped steps are all told."""
    learner = learner_on(tmp_path / "state", metrics=MetricsWriter(tmp_path / "metrics"))
    for i in range(40):
        clock.now_s += 0.25
        teach(learner, range(i, i + 1))
    steps = learner.trainer.num_steps
    report = dataclasses.replace(learner.trainer.last_report, step=-1, skipped_reason="loss not finite")
    learner._record(report)
    learner._record(report)
    learner.close()
    recorded = [event["step"] for event in read_metrics(tmp_path / "metrics" / METRICS_FILE)]
    assert steps > 20 and math.ceil(steps / 4) == len(recorded) - 2 and recorded[-2:] == [-1, -1]


# Forgetting


def test_what_is_forgotten_is_in_no_file_even_if_a_checkpoint_was_under_way(learner_on, tmp_path: Path) -> None:
    """Catches older checkpoints that keep a user's text, and one that was being written when the user left."""
    learner = learner_on(tmp_path, save_replay=True)
    teach(learner, range(10))
    for request_id in (9, 9):
        learner.observe([secret("alice", request_id)])
        learner.checkpoint().result()
    assert num_files_with_secret(tmp_path) == 2
    with held_writer(learner):
        learner.checkpoint()
        assert learner.forget("alice") > 0
    learner.last_write.result()
    assert num_files_with_secret(tmp_path) == 0
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    learner.close()
    assert num_files_with_secret(tmp_path) == 0
    with closing(learner_on(tmp_path, save_replay=True)) as restarted:
        assert len(restarted.trainer.replay) == len(learner.trainer.replay) > 0


def test_forgetting_on_a_full_disk_is_made_up_for(learner_on, tmp_path: Path) -> None:
    """Catches a purge that is tried once: the user would stay on disk until two more checkpoints have come."""
    learner = learner_on(tmp_path, save_replay=True)
    learner.observe([secret("alice", 9)])
    learner.checkpoint().result()
    undo = full_disk(tmp_path)
    try:
        learner.forget("alice")
        assert isinstance(learner.last_write.exception(), OSError)
    finally:
        undo()
    learner.step_if_due()
    assert learner.last_checkpoint_error and num_files_with_secret(tmp_path) == 1
    learner.checkpoint().result()
    assert num_files_with_secret(tmp_path) == 0
    learner.close()


def test_a_server_that_no_longer_saves_experience_removes_what_was_saved(learner_on, tmp_path: Path) -> None:
    """Catches a replay that is loaded, or lies about, after its owner chose privacy."""
    with closing(learner_on(tmp_path, save_replay=True)) as learner:
        learner.observe([secret("alice", 9)])
        learner.checkpoint().result()
        learner.observe([stretch(0)])
    assert num_files_with_secret(tmp_path) == 2
    restarted = learner_on(tmp_path, checkpoint_every_s=0.0)
    assert len(restarted.trainer.replay) == 0
    restarted.step_if_due(is_idle=True)
    restarted.last_write.result()
    assert num_files_with_secret(tmp_path) == 0
    restarted.close()


# Provenance


def test_the_counts_are_of_requests_tokens_and_the_first_and_newest_window(monkeypatch) -> None:
    """Catches prompts counted as answers, a request counted once per round, and windows that move or never close."""
    monkeypatch.setattr(traffic_counts, "WINDOW_DRAFTED", 20)
    counts = TrafficCounts()
    prompt = dataclasses.replace(stretch(0), is_prefill=True, num_drafted=0, num_accepted=0)
    for request_id in range(3):
        counts.count([dataclasses.replace(prompt, request_id=request_id)])
        for _ in range(5):
            # 4 drafted each; 1 accepted for request 0, then 2, then 3.
            round_ = dataclasses.replace(stretch(1, num_accepted=request_id + 1), request_id=request_id)
            counts.count([round_])
    total = counts.total
    assert (counts.num_requests, total.prompt_tokens, total.num_rounds) == (3, 12, 15)
    assert (total.num_drafted, total.num_accepted, total.committed_tokens) == (60, 30, 45)
    assert (counts.first.acceptance_rate, counts.newest.acceptance_rate) == (0.25, 0.75)
    copy = TrafficCounts()
    copy.load_state_dict(json.loads(json.dumps(counts.state_dict())))
    assert copy.state_dict() == counts.state_dict()


def test_the_counts_do_not_grow_with_the_requests(monkeypatch) -> None:
    """Catches a set of all ids ever seen."""
    monkeypatch.setattr(traffic_counts, "NUM_RECENT_REQUESTS", 8)
    counts = TrafficCounts()
    for request_id in range(100):
        for other in (request_id, max(request_id - 4, 0)):  # a request goes on beside four newer ones
            counts.count([dataclasses.replace(stretch(0), request_id=other)])
    assert counts.num_requests == 100 and len(counts._recent) == 8


# The whole job


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ServeConfig]:
    """Settings of a server on a small real model whose folder is tmp_path/state."""

    def make(**overrides: object) -> ServeConfig:
        values = {
            "model.path": str(STORIES), "model.split_layer": 2, "output.folder": str(tmp_path / "state"),
            "drafter.anchor_hidden": 16, "drafter.lora_rank": 4, "drafter.draft_vocab_size": 0, "train.budget": 1,
            "draft.policy": "fixed", "train.rounds_per_step": 1, "train.blocks_per_slice": 0,
            "train.blocks_per_step": 4, "train.steps_per_publish": 4, "train.steps_per_canary": 4,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return load_config(None, [f"{name}={value}" for name, value in values.items()], schema=ServeConfig)

    return make


def test_a_server_goes_on_where_it_stopped_and_what_it_learnt_can_be_exported(config, tmp_path, monkeypatch) -> None:
    """The whole circle: catches a state that is not found again, and a drafter without its story."""
    monkeypatch.setattr(traffic_counts, "WINDOW_DRAFTED", 30)
    speculator, learner = build_serving(config())
    params = SamplingParams(max_new_tokens=24)
    for _ in speculator.generate(["Once upon a time", "The sun was"], params, learner=learner):
        pass
    learner.close()
    story = learner.provenance()
    assert (tmp_path / "state/provenance.json").exists()
    assert story["requests"] == 2 and story["steps"] > 4 and story["versions"] == speculator.drafter.version > 0
    assert {"acceptance_before", "acceptance_after", "mean_accepted_tokens_after"} < story.keys()

    again, restarted = build_serving(config())
    assert again.drafter.version == speculator.drafter.version
    for ours, theirs in zip(again.drafter.state_dict().values(), speculator.drafter.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert restarted.provenance() == story
    restarted.close()

    loaded, metrics, settings = load_run(tmp_path / "state")
    assert metrics == story and settings["serve"]["port"] == 8000
    loaded.save_drafter(tmp_path / "export", metrics=metrics, config=settings)
    assert read_manifest(tmp_path / "export").metrics == story
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    assert all(f"| {name} | {value} |" in card for name, value in story.items())


def test_a_folder_of_another_drafter_or_of_a_training_run_is_refused(config, tmp_path: Path) -> None:
    """Catches weights loaded into another shape, and a server that overwrites what a run has learnt."""
    learner = build_serving(config())[1]
    learner.checkpoint()
    learner.close()
    with pytest.raises(ValueError, match=r"drafter\.lora_rank must be 4 to go on .* got 8; another output\.folder"):
        build_serving(config(drafter__lora_rank=8))
    with pytest.raises(ValueError, match=r"model\.path must be .* got 'elsewhere'"):
        build_serving(config(model__path="elsewhere"))
    with CheckpointStore(tmp_path / "run/checkpoints") as store:
        store.save({"trainer": None, "first_open": 0}, 1)
    with pytest.raises(ValueError, match="holds a run of dvi train; choose another folder"):
        build_serving(config(output__folder=str(tmp_path / "run")))
    build_serving(config())[1].close()  # a refusal keeps no lock


def test_a_server_of_dtype_auto_goes_on_in_the_dtype_it_began_with(config, tmp_path: Path, monkeypatch) -> None:
    """Catches a server that refuses its own folder, or what it learnt, when the machine is another today."""
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setattr("dvi.decode.precision.choose_dtype", lambda *_, dtype=dtype, **__: dtype)
        speculator, learner = build_serving(config())
        assert speculator.split.dtype == torch.bfloat16
        learner.checkpoint()
        learner.close()
    with pytest.raises(ValueError, match=r"model\.dtype must be 'bfloat16' to go on"):
        build_serving(config(model__dtype="float32"))


def test_a_second_server_on_the_same_folder_is_refused_before_it_loads_a_model(config) -> None:
    """Catches a minute's wait for the refusal, and two servers that prune each other's checkpoints."""
    _, learner = build_serving(config())
    with pytest.raises(ValueError, match="is locked by another run"):
        build_serving(config(model__path="no-such-model"))
    learner.close()
    build_serving(config())[1].close()


def test_without_learning_nothing_is_written(config, tmp_path: Path) -> None:
    """Catches a frozen server that locks the folder of one that learns."""
    speculator, learner = build_serving(config(train__enabled="false"))
    assert learner is None and speculator.drafter.version == 0 and not (tmp_path / "state").exists()
