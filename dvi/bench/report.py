"""The report of a Spec-Bench run: figures from its files, as tables, Markdown, JSON and pictures.

Knows the run's folder; measures nothing and runs no model. It can be made of an unfinished run and made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dvi.bench.answers import DETAILS_FILE, read_answers, read_details
from dvi.bench.charts import AcceptanceCurve, SpeedBars, plot_acceptance_over_questions, plot_speeds
from dvi.bench.figures import (
    HARNESS_TASKS,
    OVERALL,
    Answer,
    ArmRun,
    HarnessFigures,
    Served,
    acceptance_over_traffic,
    find_mismatches,
    harness_figures,
    harness_summary,
    is_of_task,
    mean_accepted_drafts,
    paired_speed,
    round_counts,
    text_token_counter,
)
from dvi.bench.harness import largest_difference, load_speed, unmodified_figures
from dvi.bench.spec_bench import RUN_FILE
from dvi.bench.statistics import Interval
from dvi.bench.tables import NOTES, conditions_line, report_tables
from dvi.whole_files import write_whole

LEADERBOARD = Path(__file__).with_name("data") / "leaderboard.json"
REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"
SPEEDUPS_PNG, ACCEPTANCE_PNG = "speedups.png", "acceptance.png"


@dataclass(frozen=True)
class ArmResults:
    """One arm that ran: what run.json says of it, and per repetition its answer lines, their file and both joined."""

    facts: dict[str, Any]
    answers: list[list[Answer]]
    paths: list[Path]
    runs: list[ArmRun]


def make_report(
    folder: str | Path, *, tokenizer: PreTrainedTokenizerBase, spec_bench_dir: str | Path | None = None,
    training_length: int | None = None, baseline: str = "plain", console: Console,
) -> dict[str, Any]:
    """Prints the report of the run in `folder` and writes it there as report.md, report.json and PNGs.

    tokenizer        the model's: the harness counts a baseline's tokens in its text, and loads it by name_or_path.
    spec_bench_dir   a Spec-Bench checkout, whose own speed.py is then run over the same files.
    training_length  tokens of the texts the model was trained on; prompts that exceed it are counted.
    baseline         the arm that others are compared with.
    Returns the content of report.json: the figures, for which JSON has null where there is none.
    Raises ValueError for a folder without a run or without an answer, a baseline that did not run, and a
    spec_bench_dir that is no checkout.
    """
    folder = Path(folder)
    speed = None if spec_bench_dir is None else load_speed(spec_bench_dir)
    run, results = read_results(folder)
    report = summarise(run, results, baseline=baseline, tokenizer=tokenizer, training_length=training_length)
    if speed is not None:
        report["unmodified_harness"] = compare_with_harness(results, speed, baseline=baseline, tokenizer=tokenizer)
    report["files"] = _draw(folder, report, results)
    tables = report_tables(report)
    for table in tables:
        console.print(table.for_terminal())
    text = [f"# Spec-Bench: {conditions_line(report)}"]
    text += [f"![{name}]({name})" for name in report["files"]]
    text += [table.as_markdown() for table in tables] + ["## How to read this", NOTES]
    write_whole(folder / REPORT_MARKDOWN, "\n\n".join(text) + "\n")
    report["files"] += [REPORT_MARKDOWN, REPORT_JSON]
    write_whole(folder / REPORT_JSON, json.dumps(report, indent=1, allow_nan=False) + "\n")
    console.print(f"written to {folder}: {', '.join(report['files'])}")
    return report


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, ArmResults]]:
    """run.json and what each arm that can run has answered, in repetitions that have begun.

    Raises ValueError for a folder without a run, and for one without a single answer.
    """
    path = folder / RUN_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no run: it has no {RUN_FILE}; make one by dvi bench spec-bench --output")
    run = json.loads(path.read_text(encoding="utf-8"))
    repetitions = [folder / f"run_{r}" for r in range(1, run["settings"]["repetitions"] + 1)]
    repetitions = [repetition for repetition in repetitions if (repetition / DETAILS_FILE).exists()]
    details = [read_details(repetition / DETAILS_FILE) for repetition in repetitions]
    found = {}
    for arm in run["arms"]:
        if arm["na_reason"] is None:
            paths = [repetition / "model_answer" / f"{arm['model_id']}.jsonl" for repetition in repetitions]
            found[arm["name"]] = (arm, paths, [read_answers(path) for path in paths])
    lines = [line for _, _, answers in found.values() for lines in answers for line in lines]
    if not lines:
        raise ValueError(f"{folder} holds no answer yet; go on with its run by the command in {path}")
    categories = {line["question_id"]: line["category"] for line in lines}
    results = {}
    for name, (arm, paths, answers) in found.items():
        runs = []
        for found_lines, found_details in zip(answers, details, strict=True):
            by_id = {line["question_id"]: line for line in found_lines}
            mine = [detail for detail in found_details if detail.arm == name]
            runs.append({
                d.question_id: Served(d, None if d.error else by_id[d.question_id], categories.get(d.question_id))
                for d in mine
            })
        results[name] = ArmResults(arm, answers, paths, runs)
    return run, results


def summarise(
    run: dict[str, Any], results: dict[str, ArmResults], *, baseline: str, tokenizer: PreTrainedTokenizerBase,
    training_length: int | None = None,
) -> dict[str, Any]:
    """All figures of the report, nested by arm and task; see `make_report`."""
    if baseline not in results:
        raise ValueError(f"baseline must be an arm that ran, one of {', '.join(results)}; got {baseline!r}")
    count_tokens = text_token_counter(tokenizer)
    base = results[baseline]
    tasks = _tasks(base)
    is_greedy = run["settings"]["temperature"] == 0
    arms = []
    for facts in run["arms"]:
        arm = {key: facts[key] for key in ("name", "title", "na_reason", "is_learning", "facts")}
        arm["is_lossy"] = facts.get("is_lossy", False)  # runs from before there were lossy arms do not say
        if facts["name"] in results:
            is_compared = is_greedy and not arm["is_lossy"]
            arm |= _summarise_arm(results[facts["name"]], base, tasks, count_tokens, is_compared=is_compared)
        arms.append(arm)
    return {
        "baseline": baseline, "is_greedy": is_greedy, "tasks": tasks, "num_questions": run["questions"]["num"],
        "num_served": [len(one) for one in base.runs], "arms": arms,
        "prompts": _prompt_lengths(base.runs[0], tasks, training_length),
        "training_length": training_length, "context": run["context"],
        "conditions": {key: run[key] for key in ("settings", "template", "dtype", "machine", "command", "conditions")},
        "unmodified_harness": None, "published": json.loads(LEADERBOARD.read_text(encoding="utf-8")),
    }  # fmt: skip


def _summarise_arm(
    arm: ArmResults, base: ArmResults, tasks: list[str], count_tokens: Callable[[str], int], *, is_compared: bool
) -> dict[str, Any]:
    mismatches = find_mismatches(arm.runs, base.runs) if is_compared else []
    errors = [s.detail for one in arm.runs for s in one.values() if s.detail.error is not None]
    harness, paired = {}, {}
    for task in tasks:
        summary = harness_summary(_harness_runs(arm, base, task, count_tokens))
        harness[task] = {
            name: {"mean": _finite(value[0]), "std": _finite(value[1])} if isinstance(value, tuple) else _finite(value)
            for name, value in asdict(summary).items()
        }
        paired[task] = asdict(paired_speed(arm.runs, base.runs, task=task, must_match=is_compared))
    counts = round_counts(arm.runs)
    mat = harness[OVERALL]["mean_accepted_tokens"]
    return {
        "num_answered": sum(map(len, arm.answers)), "num_failed": len(errors),
        "first_error": {"question_id": errors[0].question_id, "error": errors[0].error} if errors else None,
        "is_void": bool(mismatches), "num_differing": len(mismatches),
        "first_mismatch": asdict(mismatches[0]) if mismatches else None,
        "mean_accepted_tokens": mat,
        "mean_accepted_drafts": None if mat is None else _finite(mean_accepted_drafts(counts, mat)),
        "acceptance": counts.acceptance_rate if counts is not None and counts.num_drafted else None,
        "num_waived": None if counts is None else counts.num_waived,
        "waived_share": counts.num_waived / counts.num_accepted if counts is not None and counts.num_accepted else None,
        "drafted_per_depth": None if counts is None else counts.drafted_per_depth,
        "accepted_per_depth": None if counts is None else counts.accepted_per_depth,
        "harness": harness, "paired": paired,
    }  # fmt: skip


def _tasks(arm: ArmResults) -> list[str]:
    """The harness's tasks of which the arm was asked a question."""
    categories = {served.category for run in arm.runs for served in run.values()}
    return [task for task in HARNESS_TASKS if any(is_of_task(category, task) for category in categories)]


def _harness_runs(
    arm: ArmResults, base: ArmResults, task: str, count_tokens: Callable[[str], int]
) -> list[HarnessFigures]:
    return [
        harness_figures(answers, others, task=task, count_tokens=count_tokens)
        for answers, others in zip(arm.answers, base.answers, strict=True)
    ]


def _prompt_lengths(run: ArmRun, tasks: list[str], training_length: int | None) -> dict[str, dict[str, Any]]:
    """Of the baseline's prompts in the first repetition, in tokens as the model saw them; by task."""
    prompts = {}
    for task in tasks:
        details = [s.detail for s in run.values() if is_of_task(s.category, task)]
        lengths = [length for detail in details for length in detail.prompt_tokens]
        cuts = [cut for detail in details for cut in detail.cut_tokens]
        if lengths:
            prompts[task] = {
                "num_prompts": len(lengths), "mean": fmean(lengths), "max": max(lengths),
                "num_cut": sum(cut > 0 for cut in cuts), "tokens_cut": sum(cuts),
                "num_beyond_training": (
                    None if training_length is None else sum(length > training_length for length in lengths)
                ),
            }  # fmt: skip
    return prompts


def compare_with_harness(
    results: dict[str, ArmResults], speed: Callable[..., tuple[Any, ...]], *, baseline: str,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, dict[str, Any]]:
    """By arm and task: the speed-up that the unmodified speed.py gives, mean over runs, and how far ours lie off.

    speed: see `load_speed`; it reads the answer files itself.
    """
    base, count_tokens = results[baseline], text_token_counter(tokenizer)
    compared = {}
    for name, arm in results.items():
        theirs = [
            unmodified_figures(speed, answers=path, baseline=other, tokenizer_path=tokenizer.name_or_path)
            for path, other in zip(arm.paths, base.paths, strict=True)
        ]
        compared[name] = {}
        for task in _tasks(base):
            ours = _harness_runs(arm, base, task, count_tokens)
            found = [figures[task] for figures in theirs]
            compared[name][task] = {
                "speedup": _finite(harness_summary(found).speedup[0]),
                "our_speedup": _finite(harness_summary(ours).speedup[0]),
                "largest_difference": _finite(max(map(largest_difference, ours, found))),
            }
    return compared


def _draw(folder: Path, report: dict[str, Any], results: dict[str, ArmResults]) -> list[str]:
    """Writes the pictures that there is something for; returns their names."""
    bars = [
        SpeedBars(arm["title"], intervals, arm["is_void"])
        for arm in report["arms"] if arm["name"] in results and arm["name"] != report["baseline"]
        if (intervals := {
            task: Interval(**paired["interval"]) for task, paired in arm["paired"].items() if paired["interval"]
        })
    ]  # fmt: skip
    files, line = [], conditions_line(report)
    title = results[report["baseline"]].facts["title"]
    if bars:
        plot_speeds(bars, folder / SPEEDUPS_PNG, tasks=report["tasks"], baseline=title, conditions=line)
        files.append(SPEEDUPS_PNG)
    curves = [
        AcceptanceCurve(arm.facts["title"], points, arm.facts["is_learning"])
        for arm in results.values() for one in arm.runs if (points := acceptance_over_traffic(one))
    ]  # fmt: skip
    if any(curve.is_learning for curve in curves):
        longest = max(results[report["baseline"]].runs, key=len)
        tasks = [next(t for t in HARNESS_TASKS if is_of_task(s.category, t)) for s in longest.values()]
        plot_acceptance_over_questions(curves, folder / ACCEPTANCE_PNG, tasks=tasks, conditions=line)
        files.append(ACCEPTANCE_PNG)
    return files


def _finite(value: float | None) -> float | None:
    """JSON has no word for nan."""
    return value if value is not None and math.isfinite(value) else None
