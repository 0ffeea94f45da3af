"""The main job on several ranks of which one only learns, or which are one model together."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dvi.config import load_config
from dvi.settings import TrainConfig
from dvi.telemetry import read_metrics
from tests.support.job_interruptions import after_requests, terminate
from tests.support.paths import STORIES
from tests.support.ranks import run_ranks, try_ranks
from tests.support.tiny_models import tiny_model
from trainers.jobs.run_folder import load_run
from trainers.jobs.train import run_training
from trainers.ranks.shards import CHECKPOINTS, rank_folder

TEXTS = ("Once upon a time", "Lily and Tom went", "One day a bird", "The sun was", "A big bear", "Ben had a")
NUM_REQUESTS = 2 * len(TEXTS)


@pytest.fixture
def settings(tmp_path):
    """Makes settings of a run in tmp_path that learns much from little."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text} for text in TEXTS] + [{"prompt": "The little dog", "split": "eval"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(folder: str = "run", **overrides: object) -> TrainConfig:
        values = {
            "model.path": str(STORIES), "model.split_layer": 2, "data.prompts": str(prompts), "data.epochs": 2,
            "output.folder": str(tmp_path / folder), "output.tensorboard": "false", "sampling.max_new_tokens": 24,
            "eval.max_new_tokens": 12, "eval.limit": 1, "draft.policy": "fixed", "drafter.anchor_hidden": 16,
            "drafter.lora_rank": 4, "train.budget": 1, "train.rounds_per_step": 4, "train.blocks_per_step": 4,
            "train.steps_per_canary": 4, "train.peer_timeout_s": 30,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return load_config(None, [f"{name}={value}" for name, value in values.items()])

    return make


def dedicated(**overrides: object) -> dict[str, object]:
    return {"train__learner": "dedicated"} | overrides


def work(config: TrainConfig, stopped: dict[int, int] | None = None) -> dict:
    """The summary of this rank's run. stopped: by rank, after how many requests it gets a SIGTERM."""
    count = (stopped or {}).get(int(os.environ["RANK"]))
    with pytest.MonkeyPatch.context() as patch:
        if count is not None:
            after_requests(patch, count, terminate)
        return run_training(config, console=Console(quiet=True))


def all_served(folder: Path, num_ranks: int) -> list[int]:
    return sorted(itertools.chain(*served(folder, num_ranks)))


def served(folder: Path, num_ranks: int) -> list[list[int]]:
    """Indices of the requests done, by rank."""
    return [
        [event["index"] for event in read_metrics(rank_folder(folder, rank) / "metrics.jsonl")
         if event["event"] == "request"] for rank in range(num_ranks)
    ]  # fmt: skip


# A dedicated learner


def test_one_rank_learns_what_the_others_serve(settings, tmp_path):
    """Catches requests served twice or never, counts of one rank for all, a drafter that does not come back."""
    summaries = run_ranks(work, settings(**dedicated()), num_ranks=3)
    first, folder = summaries[0], tmp_path / "run"
    by_rank = served(folder, 3)
    assert by_rank[0] == [] and all(index % 2 == rank - 1 for rank in (1, 2) for index in by_rank[rank])
    assert all_served(folder, 3) == list(range(NUM_REQUESTS))
    assert first["status"] == "done" and first["requests"] == NUM_REQUESTS and first["reloads_alike"]
    assert first["tokens"] == NUM_REQUESTS * 24 == sum(part["tokens"] for part in first["ranks"])
    assert first["sent_positions"] > 0 and first["sent_bytes"] > 0
    assert first["steps"] > 0 and first["after"]["drafter_version"] == first["drafter_version"] > 0
    assert [summary["drafter_version"] for summary in summaries] == 3 * [first["drafter_version"]]
    assert "steps" not in summaries[1]
    for rank in range(3):
        assert any((rank_folder(folder, rank) / CHECKPOINTS).glob("step-*"))


def test_a_signal_to_a_serving_rank_ends_all_and_the_run_goes_on(settings, tmp_path):
    """Catches ranks left behind by a signal, and a place in the traffic or a count that is lost."""
    folder = tmp_path / "run"
    summaries = run_ranks(work, settings(**dedicated()), {1: 2}, num_ranks=3)
    assert [summary["status"] for summary in summaries] == 3 * ["interrupted"]
    assert summaries[0]["requests"] == sum(map(len, served(folder, 3))) < NUM_REQUESTS
    assert load_run(folder)[0].drafter.version == summaries[0]["drafter_version"]
    last = run_ranks(work, settings(**dedicated(output__resume="true")), num_ranks=3)[0]
    assert (last["status"], last["requests"], last["tokens"]) == ("done", NUM_REQUESTS, NUM_REQUESTS * 24)
    assert all_served(folder, 3) == list(range(NUM_REQUESTS))
    assert last["steps"] > summaries[0]["steps"]


@pytest.mark.slow
def test_a_run_goes_on_with_a_dedicated_learner_or_without_on_any_number_of_ranks(settings, tmp_path):
    """Catches a part without a replay that a rank which learns cannot take, and numbers of checkpoints that fall."""
    options, num_requests = {"data__epochs": 4, "output__checkpoint_every_s": 1e-3}, 4 * len(TEXTS)
    resumed = options | {"output__resume": "true"}
    steps, requests = [], []
    for config, num_ranks in (
        (settings(**dedicated(**options)), 3), (settings(**resumed), 3), (settings(**dedicated(**resumed)), 2),
        (settings(**resumed), 1),
    ):  # fmt: skip
        stopped = {num_ranks - 1: 2}
        summary = run_ranks(work, config, stopped, num_ranks=num_ranks)[0]
        assert summary["status"] == "interrupted"
        steps.append(summary["steps"])
        requests.append(summary["requests"])
    assert steps == sorted(steps) and requests == sorted(set(requests))
    last = run_ranks(work, settings(**dedicated(**resumed)), num_ranks=3)[0]
    assert (last["status"], last["requests"], last["tokens"]) == ("done", num_requests, num_requests * 24)


@pytest.mark.slow
def test_the_learner_takes_all_replays_of_ranks_that_learnt_together(settings, tmp_path):
    """Catches replays dealt out to ranks that have no use for them."""
    (learnt, _) = run_ranks(work, settings(), {0: 5}, num_ranks=2)
    assert learnt["status"] == "interrupted"
    sizes = run_ranks(replay_sizes, settings(output__resume="true", **dedicated()), num_ranks=2)
    together = run_ranks(replay_sizes, settings(output__resume="true"), num_ranks=2)
    assert sizes == [sum(together), None] and min(together) > 0


def replay_sizes(config: TrainConfig) -> int | None:
    """Positions that a resumed rank has to learn from; None where it has no trainer."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.jobs.job.Job.run", lambda job: sizes.append(job.trainer and len(job.trainer.replay)))
        run_training(config, console=Console(quiet=True))
    return sizes[0]


def test_a_learner_that_dies_ends_the_job_with_an_error_that_names_it(settings):
    """Catches a serving rank that goes on for ever without anybody who learns, or ends as if all were well."""
    outcomes = try_ranks(die_as_learner, settings(**dedicated()), num_ranks=2, timeout_s=60)
    assert outcomes[0] == (False, "died")
    assert not outcomes[1][0] and "PeerLostError: rank 1 lost rank 0" in outcomes[1][1]


def die_as_learner(config: TrainConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.ranks.dedicated.DedicatedLearner.run", lambda *_: os._exit(1))
        run_training(config, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "dedicated' needs 2 ranks or more.*got 1; start it with torchrun"),
        ({"train__enabled": "false"}, "dedicated' needs 2 ranks or more"),
    ],
)
def test_a_dedicated_learner_without_anybody_to_serve_is_refused(settings, overrides, message):
    """Catches a run that learns from nothing."""
    with pytest.raises(ValueError, match=message):
        run_training(settings(**dedicated(**overrides)), console=Console(quiet=True))


def test_deepspeed_beside_a_rank_that_learns_alone_is_refused(settings):
    """Catches an engine that waits in its collectives for ranks which have no learner."""
    outcomes = try_ranks(work, settings(**dedicated(train__strategy="zero1")), timeout_s=60)
    assert all(not is_well and "DeepSpeed must be left out" in reason for is_well, reason in outcomes)


def test_an_outbox_too_small_for_a_message_is_refused(settings):
    with pytest.raises(ValueError, match="outbox_positions"):
        settings(**dedicated(train__outbox_positions=63))


# One model over two processes


@pytest.fixture
def tensor_settings(settings, tmp_path):
    """Settings for a small random model whose layers two processes can share."""
    folder = tmp_path / "llama"
    tiny_model("llama", num_layers=3, vocab_size=512).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)

    def make(run: str, **overrides: object) -> TrainConfig:
        values = {"model__path": str(folder), "model__split_layer": 1, "model__dtype": "float64",
                  "model__placement": "tensor", "output__checkpoint_every_s": 1e-9, "data__epochs": 1,
                  "sampling__max_new_tokens": 16, "train__rounds_per_step": 2}  # fmt: skip
        return settings(run, **values | overrides)

    return make


def drafter_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(folder / "drafter" / name) for name in ("adapter_model.safetensors",
                                                              "drafter_extra.safetensors")]  # fmt: skip
    return files[0] | files[1]


def test_two_processes_with_a_part_of_the_model_each_do_what_one_does(tensor_settings, tmp_path):
    """Catches traffic or gradients shared out among processes that are one rank, and files written by both."""
    (alone,) = run_ranks(work, tensor_settings("alone", model__placement="single", data__limit=4), num_ranks=1)
    first, second = run_ranks(work, tensor_settings("both", data__limit=4))
    for name in ("status", "requests", "tokens", "steps", "drafter_version"):
        assert first[name] == second[name] == alone[name], name
    assert alone["steps"] > 10 and first["reloads_alike"] and second["reloads_alike"]
    assert first["after"]["acceptance"] == second["after"]["acceptance"] == alone["after"]["acceptance"]
    assert served(tmp_path / "both", 1) == served(tmp_path / "alone", 1)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    assert not Path(second["drafter"]).exists() and second["checkpoint"] == "None"
    both, one = drafter_of(tmp_path / "both"), drafter_of(tmp_path / "alone")
    assert both.keys() == one.keys()
    # The parts' sums are rounded otherwise, and Adam's first steps are the gradient's sign: where that is nearly zero,
    # rounding decides which way a weight goes. So a norm, of which single weights are little.
    for name in one:
        assert (both[name] - one[name]).norm() <= 0.02 * one[name].norm(), name


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_and_one_or_two_go_on(tensor_settings, tmp_path):
    """Catches a process that stops alone, and the other that waits in the model for it; and a checkpoint whose replay
    only the first process finds again."""
    folder = tmp_path / "run"
    first, second = run_ranks(work, tensor_settings("run"), {1: 2})
    assert first["status"] == second["status"] == "interrupted" and first["requests"] == 2
    again, _ = run_ranks(work, tensor_settings("run", output__resume="true"), {0: 2})
    assert again["status"] == "interrupted" and again["requests"] == 4
    (alone,) = run_ranks(work, tensor_settings("run", output__resume="true", model__placement="single"), num_ranks=1)
    assert (alone["status"], alone["requests"], alone["tokens"]) == ("done", len(TEXTS), len(TEXTS) * 16)
    assert alone["steps"] > again["steps"] > first["steps"]
    assert all_served(folder, 1) == list(range(len(TEXTS)))
