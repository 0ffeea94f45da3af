"""What lossy rules gain and cost: speed and quality against the strict rule, as a table, a picture and JSON.

Knows the lines of results.jsonl; measures nothing and runs no model. Everything here says which arms are lossy.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from dvi.bench.margin_quality import shared_share
from dvi.bench.statistics import Interval, median_interval
from dvi.bench.tables import MISSING, ReportTable
from dvi.decode.verification import StrictRule
from dvi.whole_files import write_picture, write_whole

RESULTS_FILE, REPORT_JSON, REPORT_MARKDOWN, REPORT_PNG = "results.jsonl", "report.json", "report.md", "margin.png"
STRICT = StrictRule.name

Line = dict[str, Any]
Row = dict[str, Any]


def make_report(folder: Path, run: dict[str, Any], lines: list[Line], *, console: Console) -> dict[str, Any]:
    """Prints the tables and writes report.json, report.md and margin.png; returns the content of report.json.

    run: the conditions. lines: see `dvi.bench.margin`; of every arm the same questions and repetitions.
    """
    rows = summarise(lines)
    tables, title = report_tables(rows), _title(run)
    console.print(f"\n{title}")
    for table in tables:
        console.print(table.for_terminal())
    plot(rows, folder / REPORT_PNG, title=title)
    text = [f"# LOSSY verify rules: {title}", f"![speed and quality]({REPORT_PNG})"]
    text += [table.as_markdown() for table in tables]
    text.append(f"Command: `{run['command']}`. " + " ".join(f"{k}: {v}." for k, v in run["conditions"].items()))
    write_whole(folder / REPORT_MARKDOWN, "\n\n".join(text) + "\n")
    report = {
        "level": "lossy", "rules": rows, "conditions": run,
        "files": [RESULTS_FILE, REPORT_MARKDOWN, REPORT_PNG, REPORT_JSON],
    }  # fmt: skip
    write_whole(folder / REPORT_JSON, json.dumps(report, indent=1, allow_nan=False) + "\n")
    console.print(f"written to {folder}: {', '.join(report['files'])}")
    return report


def summarise(lines: list[Line]) -> list[Row]:
    """A row of figures for each rule, the strict one first:

    tokens_per_s          median over questions of new tokens over decoding seconds, a question by its median.
    relative              the median over questions, and its 95 % interval, of this speed over the strict rule's in the
                          same repetition, a question by its median; None for the strict rule.
    mean_accepted_tokens  tokens per verify pass, the recovered or bonus token included.
    waived_per_100        let pass by the rule alone, of a hundred tokens that rounds gave.
    mean_tokens           of an answer.
    identical             share of answers that are the strict rule's, token for token.
    shared                mean share of an answer before its first difference, see `shared_share`.
    perplexity            of all answers together, under the model itself.
    num_scored, num_right answers to questions with a number for a reference, and those with the right one.
    num_with_number, num_same_number  such answers of the strict rule that give a number, and those with the same here.
    """
    by_rule: dict[str, list[Line]] = {}
    for line in lines:
        by_rule.setdefault(line["verify_rule"], []).append(line)
    return [_row(rule, mine, by_rule[STRICT]) for rule, mine in by_rule.items()]


def _row(rule: str, mine: list[Line], strict: list[Line]) -> Row:
    pairs = list(zip(mine, strict, strict=True))
    speeds, ratios = {}, {}
    for line, other in pairs:
        speed, strict_speed = (len(one["token_ids"]) / one["decode_s"] for one in (line, other))
        speeds.setdefault(line["question_id"], []).append(speed)
        ratios.setdefault(line["question_id"], []).append(speed / strict_speed)
    num_tokens, num_rounds, num_accepted, num_waived = (
        sum(counts) for counts in zip(
            *((len(line["token_ids"]), line["rounds"], line["accepted"], line["waived"]) for line in mine), strict=True
        )
    )  # fmt: skip
    relative = None if rule == STRICT else median_interval([statistics.median(found) for found in ratios.values()])
    scored = [(line, other) for line, other in pairs if line["reference_number"] is not None]
    numbered = [(line, other) for line, other in scored if other["final_number"] is not None]
    return {
        "verify_rule": rule, "level": mine[0]["level"], "num_answers": len(mine),
        "tokens_per_s": statistics.median(statistics.median(found) for found in speeds.values()),
        "relative": relative and asdict(relative),
        "mean_accepted_tokens": 1 + num_accepted / num_rounds,
        "waived_per_100": 100 * num_waived / (num_accepted + num_rounds),
        "mean_tokens": num_tokens / len(mine),
        "identical": statistics.fmean(line["token_ids"] == other["token_ids"] for line, other in pairs),
        "shared": statistics.fmean(shared_share(line["token_ids"], other["token_ids"]) for line, other in pairs),
        "perplexity": math.exp(sum(line["nll"] for line in mine) / num_tokens),
        "num_scored": len(scored),
        "num_right": sum(line["final_number"] == line["reference_number"] for line, _ in scored),
        "num_with_number": len(numbered),
        "num_same_number": sum(line["final_number"] == other["final_number"] for line, other in numbered),
    }  # fmt: skip


def report_tables(rows: list[Row]) -> list[ReportTable]:
    """Speed, and what the answers are worth."""
    speeds, worths = [], []
    for row in rows:
        relative = row["relative"]
        speeds.append([
            _label(row, " "), f"{row['tokens_per_s']:.0f}",
            "1" if relative is None else f"{relative['value']:.2f}\n{relative['low']:.2f}-{relative['high']:.2f}",
            f"{row['mean_accepted_tokens']:.2f}", f"{row['waived_per_100']:.1f}", f"{row['mean_tokens']:.0f}",
        ])  # fmt: skip
        worths.append([
            _label(row, " "), f"{row['identical']:.2f}", f"{row['shared']:.2f}", f"{row['perplexity']:.2f}",
            _of(row["num_right"], row["num_scored"]), _of(row["num_same_number"], row["num_with_number"]),
        ])  # fmt: skip
    return [
        ReportTable(
            "LOSSY verify rules: speed", ["rule", "tokens/s", "/ strict", "MAT", "waived", "tokens"], speeds,
            "Decoding, prefill apart; medians over questions, 95 % interval. waived: of 100 tokens those that the rule "
            "alone let pass; tokens: mean of an answer.",
        ),
        ReportTable(
            "LOSSY verify rules: what the answers are worth",
            ["rule", "identical", "shared", "perplexity", "right", "agree"], worths,
            "identical: share of answers that are strict's; shared: mean share of an answer before its first "
            "difference; perplexity: of the answers, under the model itself; right: final numbers that are the "
            "reference's; agree: that are strict's.",
        ),
    ]


def plot(rows: list[Row], path: Path, *, title: str) -> None:
    """Writes a PNG: speed over the strict rule's above, below what the answers are worth; one place for each rule."""
    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    found = [Interval(**row["relative"]) if row["relative"] else Interval(1.0, 1.0, 1.0, 0) for row in rows]
    errors = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
    upper.errorbar(
        range(len(rows)), [i.value for i in found], yerr=errors, color="tab:blue", capsize=4, linestyle="none",
    )  # fmt: skip
    _draw(upper, rows, [i.value for i in found], "o", "tab:blue", "speed (median over questions, 95 % interval)")
    upper.axhline(1, color="black", linewidth=1, label="strict rule = 1")
    upper.set_ylabel("tokens per second / strict's", fontsize=11)
    _share_lines(lower, rows)
    right = lower.twinx()
    strict_perplexity = rows[0]["perplexity"]
    _draw(
        right, rows, [row["perplexity"] / strict_perplexity for row in rows], "D", "tab:red",
        f"perplexity / strict's {strict_perplexity:.2f} (right axis)",
    )  # fmt: skip
    right.set_ylabel("perplexity / strict's", fontsize=11, color="tab:red")
    right.tick_params(axis="y", colors="tab:red")
    right.margins(y=0.15)
    lower.set_xticks(range(len(rows)), [_label(row, "\n") for row in rows], fontsize=10)
    lower.set_xlabel("verify rule; margin with its theta, the lower the looser", fontsize=11)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend(loc="upper left", fontsize=9)
    handles, labels = (a + b for a, b in zip(lower.get_legend_handles_labels(), right.get_legend_handles_labels(),
                                             strict=True))  # fmt: skip
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(f"LOSSY verify rules: the answers are not the model's own\n{title}", fontsize=11)
    write_picture(path, figure)


def _share_lines(axes: Axes, rows: list[Row]) -> None:
    for label, marker, color, values in (
        ("answers identical to strict's", "o", "tab:blue", [row["identical"] for row in rows]),
        ("share of an answer before its first difference", "s", "tab:orange", [row["shared"] for row in rows]),
        ("final number is strict's", "^", "tab:green",
         [_share(row["num_same_number"], row["num_with_number"]) for row in rows]),
        ("final number is right", "v", "tab:purple", [_share(row["num_right"], row["num_scored"]) for row in rows]),
    ):  # fmt: skip
        if None not in values:
            _draw(axes, rows, values, marker, color, label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share", fontsize=11)


def _draw(axes: Axes, rows: list[Row], values: list[float], marker: str, color: str, label: str) -> None:
    """A marker for each rule; a line joins those that theta leads from one to the other."""
    joined = [place for place, row in enumerate(rows) if not row["verify_rule"].startswith("typical")]
    axes.plot(joined, [values[place] for place in joined], linestyle=":", color=color)
    axes.plot(range(len(rows)), values, linestyle="none", marker=marker, color=color, label=label)


def _title(run: dict[str, Any]) -> str:
    settings, machine = run["settings"], run["machine"]
    decoding = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    device = machine["gpu"] or f"{machine['cpu']}, threads: {machine['threads']}"
    return (
        f"{Path(settings['model']).name} {run['dtype']}, {decoding}, batch 1, T = {settings['num_draft_tokens']}, "
        f"{run['num_questions']} questions x {settings['repetitions']}, at most {settings['max_new_tokens']} new "
        f"tokens, {device}"
    )


def _label(row: Row, gap: str) -> str:
    return f"{row['verify_rule']}{gap}(lossy)" if row["level"] == "lossy" else row["verify_rule"]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else MISSING
