"""The pictures of a benchmark's report: speed by task, and acceptance over the questions served.

Knows figures by name; reads no files and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvi.bench.figures import OVERALL
from dvi.bench.statistics import Interval
from dvi.telemetry import running_mean
from dvi.whole_files import write_picture

TASK_LABELS = {
    "mt_bench": "MT-bench", "translation": "translation", "summarization": "summariz.", "qa": "question\nanswering",
    "math_reasoning": "math\nreasoning", "rag": "retrieval", OVERALL: "overall",
}  # fmt: skip


@dataclass(frozen=True)
class SpeedBars:
    """One arm's bars: an interval for each task that has one."""

    title: str
    intervals: dict[str, Interval]
    is_void: bool


@dataclass(frozen=True)
class AcceptanceCurve:
    """One arm's acceptance in one repetition: (questions served so far, accepted / drafted of the latest)."""

    title: str
    points: list[tuple[int, float]]
    is_learning: bool


def plot_speeds(bars: list[SpeedBars], path: str | Path, *, tasks: list[str], baseline: str, conditions: str) -> None:
    """Writes a PNG: bars by task, one colour per arm, with 95 % intervals, and a line at the baseline's speed."""
    figure, axes = _axes(width=13, height=5.5)
    width = 0.84 / max(len(bars), 1)
    for index, arm in enumerate(bars):
        places = [i for i, task in enumerate(tasks) if task in arm.intervals]
        found = [arm.intervals[tasks[i]] for i in places]
        errors = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
        axes.bar(
            [place + (index - (len(bars) - 1) / 2) * width for place in places], [i.value for i in found], width * 0.94,
            yerr=errors, color=colormaps["tab10"](index % 10), hatch="///" if arm.is_void else None,
            edgecolor="white", error_kw={"ecolor": "0.2", "elinewidth": 1.2, "capsize": 2.5},
            label=arm.title + (" (void: other tokens)" if arm.is_void else ""),
        )  # fmt: skip
    axes.axhline(1, color="black", linewidth=1.2, label=f"{baseline} = 1")
    if OVERALL in tasks:
        axes.axvline(tasks.index(OVERALL) - 0.5, color="0.6", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(tasks)), [TASK_LABELS[task] for task in tasks], fontsize=11)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"tokens per second / {baseline}'s\nmedian over questions, 95 % interval", fontsize=11)
    axes.set_title(conditions, fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    write_picture(path, figure)


def plot_acceptance_over_questions(
    curves: list[AcceptanceCurve], path: str | Path, *, tasks: list[str | None], conditions: str
) -> None:
    """Writes a PNG: each repetition's running mean of acceptance, learning arms as full lines, frozen ones dashed.

    tasks: of the questions in their order; where it changes a line is drawn, for other questions draft otherwise.
    """
    window = max(5, len(tasks) // 20)
    figure, axes = _axes(width=13, height=5.5)
    titles = list(dict.fromkeys(curve.title for curve in curves))
    labelled = set()
    for curve in curves:
        numbers, values = zip(*curve.points, strict=True)
        axes.plot(
            numbers, running_mean(list(values), window), color=colormaps["tab10"](titles.index(curve.title) % 10),
            linestyle="-" if curve.is_learning else "--", linewidth=1.8, alpha=0.8,
            label=None if curve.title in labelled else curve.title + ("" if curve.is_learning else " (frozen)"),
        )  # fmt: skip
        labelled.add(curve.title)
    starts = [i for i in range(len(tasks)) if i == 0 or tasks[i] != tasks[i - 1]]
    for start in starts:
        axes.axvline(start + 0.5, color="0.7", linewidth=1, linestyle=":")
        axes.annotate(
            TASK_LABELS.get(tasks[start], "?").replace("\n", " "), (start + 0.5, 0.99), rotation=90, fontsize=9,
            color="0.4", xytext=(3, 0), textcoords="offset points", va="top", xycoords=("data", "axes fraction"),
        )  # fmt: skip
    axes.set_xlim(0.5, len(tasks) + 0.5)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the tasks' names
    axes.set_xlabel("questions served, in their order", fontsize=12)
    axes.set_ylabel(f"acceptance (accepted / drafted)\nmean of {window} questions, a line a repetition", fontsize=11)
    axes.set_title(conditions, fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    write_picture(path, figure)


def _axes(*, width: float, height: float) -> tuple[Figure, Any]:
    # A bare Figure and not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
