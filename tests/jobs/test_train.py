"""The main job on a small real model: what it leaves behind, and that stopping it loses nothing."""

import dataclasses
import itertools
import json
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dvi.config import load_config, setting_of_run, to_yaml
from dvi.decode.precision import dtype_of_run
from dvi.model.adapter_store import read_manifest
from dvi.records import SamplingParams
from dvi.signals import handled
from dvi.telemetry import read_metrics
from tests.support.job_interruptions import Crash, after_requests, crash, interrupt, terminate
from tests.support.paths import STORIES
from trainers.jobs.evaluation import HeldOutRequests, drafts_alike
from trainers.jobs.run_folder import load_run
from trainers.jobs.traffic_cursor import TrafficCursor, read_traffic
from trainers.jobs.train import run_training

ROWS = [
    {"prompt": text}
    for text in ("Once upon a time", "Lily and Tom went", "One day a bird", "The sun was", "A big bear", "Ben had a")
] + [{"prompt": "The little dog", "split": "eval"}]


@pytest.fixture
def settings(tmp_path):
    """Makes settings of a run in tmp_path that learns much from little, reproducibly."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(folder="run", **overrides):
        values = {
            "model.path": str(STORIES), "model.split_layer": 2, "data.prompts": str(prompts),
            "output.folder": str(tmp_path / folder),
            "output.tensorboard": "false", "sampling.max_new_tokens": 16, "eval.max_new_tokens": 12, "eval.limit": 1,
            "draft.policy": "fixed", "drafter.anchor_hidden": 16, "drafter.lora_rank": 4, "train.budget": 1,
            "train.rounds_per_step": 4, "train.blocks_per_step": 4, "train.steps_per_canary": 4,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return load_config(None, [f"{name}={value}" for name, value in values.items()])

    return make


def run(config):
    return run_training(config, console=Console(quiet=True))


def test_a_run_leaves_everything_it_promises_and_a_drafter_that_learnt(settings, tmp_path):
    """Catches an output that is forgotten, a count that is off, and a job that serves without learning."""
    summary = run(settings(output__tensorboard="true"))
    folder = tmp_path / "run"
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "acceptance.png", "drafter", "checkpoints"):
        assert (folder / name).exists(), name
    assert any((folder / "tensorboard").iterdir())
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary
    requests = [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == "request"]
    assert sorted(event["index"] for event in requests) == list(range(6))
    assert summary["status"] == "done" and summary["requests"] == 6 and summary["cut_prompts"] == 0
    assert summary["tokens"] == requests[-1]["tokens_seen"] == sum(event["new_tokens"] for event in requests) == 96
    assert summary["reloads_alike"] and summary["before"]["drafter_version"] == 0
    assert summary["steps"] > 0 and summary["after"]["drafter_version"] == summary["drafter_version"] > 0
    assert summary["before"]["num_mismatches"] == summary["after"]["num_mismatches"] == 0
    manifest = read_manifest(folder / "drafter")
    assert manifest.drafter_version == summary["drafter_version"] and manifest.metrics == summary["after"]


def test_a_crashed_run_that_is_resumed_ends_with_the_drafter_it_would_have_had(settings, tmp_path, monkeypatch):
    """Catches any state a checkpoint forgets, requests served twice or never, and metrics counted twice."""
    expected = run(settings("whole"))
    with monkeypatch.context() as patch:
        after_requests(patch, 4, crash)
        with pytest.raises(Crash):
            run(settings("crashed", output__checkpoint_every_s=1e-9))
    summary = run(settings("crashed", output__resume="true"))
    for name in ("requests", "tokens", "steps", "drafter_version", "before"):
        if name == "before":  # its seconds are a clock's
            assert summary[name]["acceptance"] == expected[name]["acceptance"]
        else:
            assert summary[name] == expected[name], name
    events = [
        [e["index"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if e["event"] == "request"]
        for name in ("whole", "crashed")
    ]
    assert events[0] == events[1]
    for name in ("adapter_model.safetensors", "drafter_extra.safetensors"):
        whole, crashed = (load_file(tmp_path / run_name / "drafter" / name) for run_name in ("whole", "crashed"))
        assert whole.keys() == crashed.keys()
        assert all(torch.equal(whole[key], crashed[key]) for key in whole)


def test_a_signal_ends_the_run_between_rounds_with_a_checkpoint_that_can_be_exported(settings, tmp_path, monkeypatch):
    """Catches work lost to Ctrl-C, a half-finished request that counts as done, and signal handlers left behind."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        after_requests(patch, 2, terminate)
        summary = run(settings(data__batch_size=2))
    assert (summary["status"], summary["signal"], summary["requests"]) == ("interrupted", signal.SIGTERM, 2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (tmp_path / "run/drafter").exists()
    speculator, _, _ = load_run(tmp_path / "run")
    assert speculator.drafter.version == summary["drafter_version"] > 0
    resumed = run(settings(data__batch_size=2, output__resume="true"))
    indices = [e["index"] for e in read_metrics(tmp_path / "run/metrics.jsonl") if e["event"] == "request"]
    assert resumed["requests"] == 6 and sorted(indices) == list(range(6))
    assert resumed["steps"] > summary["steps"]


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_signal_ends_a_measurement_at_once_and_the_run_goes_on_from_there(settings, tmp_path, monkeypatch, which):
    """Catches a SIGTERM that waits for all held-out prompts, and a run that must begin again for it."""
    measure, count = HeldOutRequests.measure, itertools.count(1)

    def measured_until_the_signal(*args, **options):
        if next(count) == ("before", "after").index(which) + 1:
            terminate()
            raise AssertionError("it went on")
        return measure(*args, **options)

    with monkeypatch.context() as patch, handled():
        patch.setattr(HeldOutRequests, "measure", measured_until_the_signal)
        summary = run(settings(eval__limit=1))
    num_done = {"before": 0, "after": 6}[which]
    assert (summary["status"], summary["signal"], summary["requests"]) == ("interrupted", signal.SIGTERM, num_done)
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"
    assert (summary["before"] is None) == (which == "before") and not (tmp_path / "run/drafter").exists()
    resumed = run(settings(eval__limit=1, output__resume="true"))
    assert resumed["status"] == "done" and resumed["requests"] == 6 and resumed["after"] is not None
    indices = [e["index"] for e in read_metrics(tmp_path / "run/metrics.jsonl") if e["event"] == "request"]
    assert sorted(indices) == list(range(6))


def test_a_folder_that_holds_a_run_is_not_overwritten_or_resumed_as_another(settings, monkeypatch):
    """Catches hours of training replaced by a second start, and a checkpoint loaded into other settings."""
    after_requests(monkeypatch, 1, interrupt)
    run(settings())
    with pytest.raises(ValueError, match=r"already holds a run; output\.resume=true continues it"):
        run(settings())
    with pytest.raises(ValueError, match=r"drafter\.lora_rank must be 4 to resume"):
        run(settings(drafter__lora_rank=8, output__resume="true"))


def test_a_run_of_mode_auto_says_which_it_was_and_may_go_on_in_another(settings, tmp_path, monkeypatch):
    """Catches a run from before modes were settled, or of another machine, that cannot be gone on with."""
    after_requests(monkeypatch, 2, interrupt)
    assert run(settings())["level"] == "fast"
    assert setting_of_run(tmp_path / "run", "model", "mode") == "fast"
    config = load_config(tmp_path / "run/config.yaml")
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, mode="exact"))
    (tmp_path / "run/config.yaml").write_text(to_yaml(exact))
    assert run(settings(output__resume="true"))["status"] == "done"
    assert setting_of_run(tmp_path / "run", "model", "mode") == "fast"


def test_a_run_of_dtype_auto_says_which_it_took_and_is_resumed_in_it(settings, tmp_path, monkeypatch):
    """Catches a resumed run in another dtype, whose drafter no longer fits, because the machine is another today."""
    monkeypatch.setattr("dvi.decode.precision.choose_dtype", lambda *_, **__: "bfloat16")
    after_requests(monkeypatch, 2, interrupt)
    run(settings())
    assert dtype_of_run(tmp_path / "run") == "bfloat16"
    monkeypatch.setattr("dvi.decode.precision.choose_dtype", lambda *_, **__: "float32")
    resumed = run(settings(output__resume="true"))
    assert resumed["status"] == "done" and read_manifest(tmp_path / "run/drafter").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"model\.dtype must be 'bfloat16' to resume"):
        run(settings(output__resume="true", model__dtype="float32"))


def test_long_prompts_lose_their_beginning_and_are_counted(settings, tmp_path):
    """Catches a request that kills the run, one dropped in silence, and one that keeps its beginning."""
    prompts = tmp_path / "long.jsonl"
    rows = [{"prompt": "word " * 600 + "Lily"}, {"prompt": "Lily"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings(
        data__prompts=str(prompts), data__shuffle_seed="null", sampling__max_new_tokens=20, eval__limit=0
    )
    summary = run(config)
    requests = [e for e in read_metrics(tmp_path / "run/metrics.jsonl") if e["event"] == "request"]
    assert summary["cut_prompts"] == 1 and summary["requests"] == 2
    assert [request["prompt_tokens"] < 512 - 20 for request in requests] == [True, True]
    assert [request["new_tokens"] for request in requests] == [20, 20]
    assert summary["before"] is None and summary["after"] is None and summary["reloads_alike"]


def test_an_answer_longer_than_the_context_is_refused(settings):
    """Catches a slice that keeps no prompt at all, or all of it."""
    with pytest.raises(ValueError, match=r"max_new_tokens, of answers and of eval, must be at most 510"):
        run(settings(sampling__max_new_tokens=511))


def test_a_run_without_learning_leaves_the_drafter_as_it_was(settings):
    """Catches train.enabled=false that trains."""
    summary = run(settings(train__enabled="false", eval__limit=0, data__limit=2))
    assert summary["drafter_version"] == 0 and "steps" not in summary and summary["reloads_alike"]


def test_another_drafter_is_told_from_the_reloaded_one(settings, tmp_path):
    """Catches a reload check that compares tokens alone, which are the verifier's whatever the drafter."""
    run(settings(data__limit=3))
    speculator, _, _ = load_run(tmp_path / "run")
    other, _, _ = load_run(tmp_path / "run")
    with torch.no_grad():
        other.drafter.draft_head.lora_B.add_(1e-3)
    other.drafter.publish(other.drafter, 1)
    prompt, params = speculator.encode("Once upon a time"), SamplingParams(max_new_tokens=24)
    assert drafts_alike(speculator, speculator.drafter, prompt, params, num_draft_tokens=4)
    assert not drafts_alike(speculator, other.drafter, prompt, params, num_draft_tokens=4)
    same, _, _ = load_run(tmp_path / "run")
    same.drafter.publish(other.drafter, 1)  # what serves, not what is stored
    same.drafter.load_state_dict(speculator.drafter.state_dict())
    assert not drafts_alike(speculator, same.drafter, prompt, params, num_draft_tokens=4)


def test_requests_that_overtake_others_are_not_served_again():
    """Catches a cursor kept as one number, which repeats or loses what a batch finished out of order."""
    cursor = TrafficCursor()
    for index in (2, 0, 4):
        cursor.finish(index)
    assert (cursor.first_open, cursor.done_ahead, cursor.num_done) == (1, {2, 4}, 3)
    assert [index for index, _ in cursor.open_requests("abcdef")] == [1, 3, 5]
    cursor.finish(1)
    assert (cursor.first_open, cursor.done_ahead) == (3, {4})


def test_a_datasets_first_rows_are_held_out_and_the_rest_can_be_read_twice(settings, tmp_path):
    """Catches evaluation on what was trained on, and a stream that is empty the second time."""
    config = settings(data__prompts="[]", data__dataset=str(tmp_path / "prompts.jsonl"), eval__limit=2, data__limit=3,
                      data__shuffle_seed="null")  # fmt: skip
    traffic, held_out = read_traffic(config)
    assert [messages[0]["content"] for messages in held_out] == ["Once upon a time", "Lily and Tom went"]
    contents = [[messages[0]["content"] for messages in traffic] for _ in range(2)]
    assert contents[0] == contents[1] == ["One day a bird", "The sun was", "A big bear"]
