"""The paper's experiment from one command: learn online from a stream seen once, export, then Spec-Bench.

Knows the order of the two and what may be left out of a second start; the job trains, and the benchmark, which is
passed in, measures.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from dvi.config import load_config
from dvi.decode.precision import dtype_of_run, settle_dtype, weights_of_run
from dvi.settings import RESUMED_KEYS, PaperConfig, TrainConfig
from trainers.jobs.run_folder import DRAFTER, SUMMARY
from trainers.jobs.train import run_training


def run_paper(
    config: PaperConfig, *, run_bench: Callable[[PaperConfig, Path], dict[str, object]], console: Console
) -> dict[str, object]:
    """Trains into output.folder, unless that is done there, and runs the benchmark with the drafter it left.

    run_bench: the benchmark's report, from the settings and the drafter's folder; where it was interrupted it goes on
    by itself. The summary's "training" is that of `dvi train`, its "bench" that report, or None when training was
    interrupted (status "interrupted"): a second start then goes on.
    Raises ValueError when the folder holds a run of other settings, among several ranks, and what training and the
    benchmark raise.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        raise ValueError(
            f"dvi bench paper runs in one process, got {num_ranks} ranks; train with torchrun -m dvi train, then "
            "measure with dvi bench spec-bench --adapter"
        )
    folder = config.output.folder
    config = settle_dtype(config, earlier=dtype_of_run(folder), earlier_weights=weights_of_run(folder))
    training = _train(config.training, console=console)
    bench = None
    if training["status"] == "done":
        # A process's first run leaves its model in a reference cycle: it must not lie in memory beside the next one.
        gc.collect()
        bench = run_bench(config, Path(config.output.folder) / DRAFTER)
    return {"status": training["status"], "folder": config.output.folder, "training": training, "bench": bench}


def _train(config: TrainConfig, *, console: Console) -> dict[str, object]:
    """The summary of the training run in output.folder, which is begun, continued, or only read if it has ended."""
    folder = Path(config.output.folder)
    if (folder / "config.yaml").exists():
        _check_same_settings(config, folder)
        summary = _read_summary(folder)
        if summary.get("status") == "done":
            console.print(f"trained already, {summary['requests']} requests: {summary['drafter']}")
            return summary
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True))
    return run_training(config, console=console)


def _check_same_settings(config: TrainConfig, folder: Path) -> None:
    """Raises ValueError at the first setting that differs from those of the run in the folder."""
    now, then = (dataclasses.asdict(c) for c in (config, load_config(folder / "config.yaml")))
    for section in now.keys() - {"output"}:
        for key in now[section].keys() - RESUMED_KEYS:
            if now[section][key] != then[section][key]:
                raise ValueError(
                    f"{section}.{key} must be {then[section][key]!r} to go on with the run in {folder}, got "
                    f"{now[section][key]!r}; another output.folder starts afresh"
                )


def _read_summary(folder: Path) -> dict[str, object]:
    """What summary.json holds; nothing where there is none, or half of one from a killed run."""
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
