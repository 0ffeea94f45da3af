"""The figures of Spec-Bench's own evaluation/speed.py, unmodified, out of a checkout that the user has.

Knows files; computes nothing. Only its function `speed` is called: its command line ignores its arguments.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dvi.bench.figures import HARNESS_NAMES, HARNESS_TASKS, HarnessFigures

SPEED_FILE = Path("evaluation") / "speed.py"
SOURCE = "https://github.com/hemingkx/Spec-Bench"


def load_speed(spec_bench_dir: str | Path) -> Callable[..., tuple[Any, ...]]:
    """The function `speed` of a checkout. Raises ValueError for a folder that is none."""
    path = Path(spec_bench_dir) / SPEED_FILE
    if not path.is_file():
        raise ValueError(f"{spec_bench_dir} is no Spec-Bench checkout: it has no {SPEED_FILE}; try git clone {SOURCE}")
    # By its file and under a name of its own: no other `evaluation` is taken for it, and sys.path stays as it is.
    spec = importlib.util.spec_from_file_location("spec_bench_speed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "speed"):
        raise ValueError(f"{path} has no function `speed`; take it unmodified from {SOURCE}")
    return module.speed


def unmodified_figures(
    speed: Callable[..., tuple[Any, ...]], *, answers: Path, baseline: Path, tokenizer_path: str
) -> dict[str, HarnessFigures]:
    """What the harness says of each task in one run. tokenizer_path: the folder or hub id that it loads."""
    figures = {}
    for task in HARNESS_TASKS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of a task without questions: nan says it
            rate, baseline_rate, ratio, lengths = speed(
                str(answers), str(baseline), tokenizer_path, task=task, report=False
            )
        figures[task] = HarnessFigures(float(rate), float(baseline_rate), float(ratio), tuple(lengths))
    return figures


def largest_difference(ours: HarnessFigures, theirs: HarnessFigures) -> float:
    """The largest relative difference of any of the figures; nan where either lacks the task."""
    mine, other = (
        np.array([*(getattr(figures, name) for name in HARNESS_NAMES), figures.mean_accepted_tokens])
        for figures in (ours, theirs)
    )
    return float(np.max(np.abs(mine / other - 1)))
