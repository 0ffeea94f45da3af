"""Training jobs of several ranks on a tiny real model: their settings, their processes, and what they served."""

from __future__ import annotations

import json
from pathlib import Path

from dvi.telemetry import METRICS_FILE, read_metrics
from tests.support.paths import STORIES
from trainers.learning.checkpoint import read_checkpoint, whole_steps
from trainers.ranks.shards import CHECKPOINTS, rank_folder

SETTINGS = (
    f"model.path={STORIES}", "model.split_layer=2", "output.tensorboard=false", "eval.limit=0", "draft.policy=fixed",
    "drafter.anchor_hidden=16", "drafter.lora_rank=4", "train.budget=1", "train.blocks_per_step=16",
    "train.replay_positions=2048", "output.checkpoint_every_s=0.5",
)  # fmt: skip


def job_settings(
    tmp_path: Path, *, num_requests: int, num_tokens: int, folder: str = "run", peer_timeout_s: float = 10
) -> list[str]:
    """Settings of a job with so many requests of so many tokens, in tmp_path/folder."""
    prompts = tmp_path / "prompts.jsonl"
    rows = ({"prompt": f"Once upon a time number {index}"} for index in range(num_requests))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        *SETTINGS, f"data.prompts={prompts}", f"output.folder={tmp_path / folder}",
        f"sampling.max_new_tokens={num_tokens}", f"train.peer_timeout_s={peer_timeout_s}",
    ]  # fmt: skip


def served(folder: Path, rank: int) -> list[int]:
    """The requests that a rank has written down as served, in that order."""
    path = rank_folder(folder, rank) / METRICS_FILE
    return [event["index"] for event in read_metrics(path) if event["event"] == "request"] if path.exists() else []


def saved(folder: Path, rank: int) -> list[dict]:
    """The states of a rank's checkpoints, oldest first. Every one must be whole."""
    checkpoints = rank_folder(folder, rank) / CHECKPOINTS
    steps = sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert whole_steps(checkpoints) == steps, f"damaged: {steps}"
    return [read_checkpoint(checkpoints, step) | {"step": step} for step in steps]
