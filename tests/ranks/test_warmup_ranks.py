"""Several ranks warm one drafter up: each text is learnt from once, and a resumed run ends as it would have."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import trainers.jobs.warmup as warmup_module
from dvi.config import load_config
from dvi.settings import WarmupConfig
from dvi.telemetry import read_metrics
from tests.support.job_interruptions import after_requests, crash, interrupt
from tests.support.paths import STORIES
from tests.support.ranks import run_ranks, try_ranks
from trainers.jobs.job import Job
from trainers.jobs.warmup import run_warmup

WORDS = ("the", "little", "dog", "and", "a", "big", "red", "bird", "saw", "Lily", "with", "Tom", "in", "the", "sun")
LENGTHS = (9, 30, 8, 12, 55, 10, 21, 14, 40, 9, 17, 11, 26)  # words of each text; all are long enough for a round


def write_texts(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> None:
    texts = [" ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(n)) for start, n in enumerate(lengths)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(rows, encoding="utf-8")


def settings_of(folder: Path, run: str = "run", **overrides: object) -> WarmupConfig:
    values = {
        "model.path": STORIES, "model.split_layer": 2, "data.dataset": folder / "texts.jsonl",
        "data.field": "text", "data.batch_size": 1, "output.folder": folder / run, "output.tensorboard": "false",
        "eval.limit": 0, "eval.max_new_tokens": 4, "drafter.anchor_hidden": 16, "drafter.lora_rank": 4,
        "drafter.draft_vocab_size": 0, "warmup.source": "texts", "warmup.positions_per_step": 8,
        "train.blocks_per_step": 24, "train.steps_per_canary": 4, "train.peer_timeout_s": 30,
    } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
    return load_config(None, [f"{name}={value}" for name, value in values.items()], schema=WarmupConfig)


def warm_up_with_job(config: WarmupConfig) -> tuple[dict, Job]:
    """A rank's summary, and the job that it is of."""
    jobs: list[Job] = []
    with pytest.MonkeyPatch.context() as patch:
        resume_job = warmup_module.resume_job
        patch.setattr(
            warmup_module, "resume_job", lambda job, **options: (jobs.append(job), resume_job(job, **options))[1]
        )
        return run_warmup(config, console=Console(quiet=True)), jobs[0]


def warm_up(config: WarmupConfig) -> dict:
    """A rank's summary, with the hash of the weights that it ended with."""
    summary, job = warm_up_with_job(config)
    tensors = job.speculator.drafter.state_dict().values()
    return summary | {"weights": hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()}


def break_off(config: WarmupConfig, breaks: Callable[[], None], rank: int, count: int) -> dict:
    """As `warm_up`, but on one rank something happens when it has stored its count-th text."""
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == rank:
            after_requests(patch, count, breaks)
        return warm_up(config)


def texts_of(run_folder: Path) -> list[int]:
    """What the ranks of the run learnt from, sorted."""
    files = [run_folder / "metrics.jsonl", *run_folder.glob("ranks/*/metrics.jsonl")]
    return sorted(e["index"] for file in files for e in read_metrics(file) if e["event"] == "request")


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_text_is_learnt_from_once_by_as_many_steps_as_one_rank_would_make(tmp_path, num_ranks):
    """Catches texts that two ranks take or none, steps that each rank owes for itself, and weights that part."""
    write_texts(tmp_path)
    ranks = run_ranks(warm_up, settings_of(tmp_path), num_ranks=num_ranks)
    alone = run_warmup(settings_of(tmp_path, "alone"), console=Console(quiet=True))
    first = ranks[0]
    assert (first["status"], first["texts"], first["reloads_alike"]) == ("done", len(LENGTHS), True)
    assert [rank["texts"] for rank in first["ranks"]] == [len(LENGTHS[r::num_ranks]) for r in range(num_ranks)]
    assert texts_of(tmp_path / "run") == list(range(len(LENGTHS)))
    assert first["tokens"] == alone["tokens"]
    assert alone["steps"] > 30 and abs(first["steps"] - alone["steps"]) <= 1  # thirds of a step are not exact
    for rank in ranks:
        assert (rank["steps"], rank["weights"]) == (first["steps"], first["weights"])


@pytest.mark.parametrize(
    ("lengths", "num_ranks"),
    [
        ((60,), 3),
        pytest.param((200, 8, 8, 8, 200), 2, marks=pytest.mark.slow),
        pytest.param((8, 8, 8, 60), 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_with_little_or_nothing_hold_up_nobody(tmp_path, lengths, num_ranks):
    """Catches a rank that waits for a text that another never has, and steps that wait for the one without any."""
    write_texts(tmp_path, lengths)
    ranks = run_ranks(warm_up, settings_of(tmp_path), num_ranks=num_ranks, timeout_s=60)
    assert {rank["status"] for rank in ranks} == {"done"} and texts_of(tmp_path / "run") == list(range(len(lengths)))
    assert len({rank["weights"] for rank in ranks}) == 1
    expected = ranks[0]["tokens"] / 8 * min(1, 24 / (8 * num_ranks))  # a rank has no fewer than 8 blocks of a step
    assert abs(ranks[0]["steps"] - expected) <= 2


@pytest.mark.parametrize(
    ("source", "breaks"),
    [
        ("texts", crash),
        pytest.param("texts", interrupt, marks=pytest.mark.slow),
        pytest.param("answers", crash, marks=pytest.mark.slow),
        pytest.param("answers", interrupt, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_resumed_by_as_many_ranks_ends_with_the_same_drafter(tmp_path, source, breaks):
    """Catches state that a rank's checkpoint forgets, steps whose place depends on a clock, rows of a shuffled stream
    that come in another order, and texts learnt twice or never."""
    write_texts(tmp_path, LENGTHS if source == "texts" else LENGTHS[:8])
    options = {"warmup__source": source, "data__epochs": 2, "warmup__max_new_tokens": 12}
    expected = run_ranks(warm_up, settings_of(tmp_path, "whole", **options))
    broken = settings_of(tmp_path, output__checkpoint_every_s=1e-9, **options)
    outcomes = try_ranks(break_off, broken, breaks, 1, 5)
    if breaks is interrupt:
        assert all(is_well and summary["status"] == "interrupted" for is_well, summary in outcomes)
        assert not (tmp_path / "run/drafter").exists()
    else:
        assert not any(is_well for is_well, _ in outcomes)
        assert "PeerLostError" in outcomes[0][1] and "output.resume=true" in outcomes[0][1]
    ranks = run_ranks(warm_up, settings_of(tmp_path, output__resume="true", **options))
    for name in ("texts", "tokens", "steps", "drafter_version"):
        assert ranks[0][name] == expected[0][name], name
    assert texts_of(tmp_path / "run") == texts_of(tmp_path / "whole") == list(range(expected[0]["texts"]))
    assert [rank["weights"] for rank in ranks] == [rank["weights"] for rank in expected]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_run_that_is_resumed_by_others_learns_from_each_text_once(tmp_path, before, after):
    """Catches texts lost or done again when they are dealt anew, and steps owed that are forgotten or doubled."""
    write_texts(tmp_path)
    outcomes = try_ranks(break_off, settings_of(tmp_path), interrupt, 1, 2, num_ranks=before)
    assert all(is_well and summary["status"] == "interrupted" for is_well, summary in outcomes)
    assert outcomes[0][1]["texts"] == 2 * before
    ranks = run_ranks(warm_up, settings_of(tmp_path, output__resume="true"), num_ranks=after)
    alone = run_warmup(settings_of(tmp_path, "alone"), console=Console(quiet=True))
    assert (ranks[0]["status"], ranks[0]["texts"]) == ("done", len(LENGTHS))
    assert texts_of(tmp_path / "run") == list(range(len(LENGTHS)))
    assert ranks[0]["tokens"] == alone["tokens"]
    assert abs(ranks[0]["steps"] - alone["steps"]) <= 2
    assert len({rank["weights"] for rank in ranks}) == 1
