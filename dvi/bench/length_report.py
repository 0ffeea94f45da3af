"""What a comparison of length policies shows: speed against fixed drafts, and verifications that were for nothing.

Knows the lines of results.jsonl; measures nothing and runs no model. It can be made of an unfinished run.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from dvi.bench.statistics import median_interval
from dvi.bench.tables import MISSING, VOID, ReportTable
from dvi.records import RoundStats
from dvi.whole_files import write_picture, write_whole

PLAIN_DECODING, FIXED = "plain", "fixed"  # what tokens are compared with, and what speeds are compared with
REPORT_JSON, REPORT_PNG = "report.json", "lengths.png"

Line = dict[str, Any]
Row = dict[str, Any]


def make_report(
    folder: Path, run: dict[str, Any], lines: list[Line], *, console: Console
) -> dict[str, Any]:
    """Prints the tables and writes report.json and lengths.png into the folder; returns the content of report.json.

    run: what run.json holds. lines: one for each policy, batch size and repetition, see `dvi.bench.length_policies`.
    """
    report = {"conditions": run, "rows": summarise(lines)}
    for table in report_tables(report):
        console.print(table.for_terminal())
    plot_lengths(report["rows"], folder / REPORT_PNG, conditions=conditions_line(run))
    report["files"] = [REPORT_PNG, REPORT_JSON]
    write_whole(folder / REPORT_JSON, json.dumps(report, indent=1, allow_nan=False) + "\n")
    console.print(f"written to {folder}: {', '.join(report['files'])}")
    return report


def summarise(lines: list[Line]) -> list[Row]:
    """A row of figures for each batch size and policy, in the order of the lines:

    tokens_per_s        median over repetitions of a slice's new tokens over its seconds in rounds.
    relative            the median and its 95 % interval of this speed over that of the fixed length's slice of the same
                        repetition; None for the fixed length itself.
    num_drafted ..      sums over repetitions.
    mean_accepted_tokens  tokens per verify pass and row, the recovered or bonus token included.
    num_wasted          drafted tokens that were verified and not accepted; wasted_share: of all verified positions,
                        which are the drafted ones and one more for each row of a round.
    verified_per_token  verified positions over tokens committed.
    num_compared, num_differing, num_unexplained  answers compared with plain decoding's; other tokens than those;
                        such as rounding does not explain. is_void: where there are any of these, or the fixed length
                        has some: the speeds are then of other work.
    companion           `dvi.draft.agreement.AgreementFigures` after the last repetition; None of policies without one.
    """
    kept: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        kept.setdefault((line["batch_size"], line["policy"]), []).append(line)
    return [_row(batch_size, policy, mine, kept[batch_size, FIXED]) for (batch_size, policy), mine in kept.items()]


def _row(batch_size: int, policy: str, mine: list[Line], fixed: list[Line]) -> Row:
    total, speeds, fixed_speeds = RoundStats(), [], []
    for line, other in zip(mine, fixed, strict=True):
        stats = RoundStats(**line["stats"])
        total.add(stats)
        speeds.append(stats.decode_tokens_per_s)
        fixed_speeds.append(RoundStats(**other["stats"]).decode_tokens_per_s)
    num_wasted, num_verified = total.num_drafted - total.num_accepted, total.num_drafted + total.num_rounds
    ratios = [] if policy == FIXED else [speed / other for speed, other in zip(speeds, fixed_speeds, strict=True)]
    relative = median_interval(ratios)
    return {
        "batch_size": batch_size, "policy": policy, "num_repetitions": len(mine),
        "tokens_per_s": statistics.median(speeds), "relative": None if relative is None else asdict(relative),
        "num_rounds": total.num_rounds, "num_drafted": total.num_drafted, "num_accepted": total.num_accepted,
        "mean_accepted_tokens": total.mean_accepted_tokens, "num_wasted": num_wasted,
        "wasted_share": num_wasted / num_verified, "verified_per_token": num_verified / total.new_tokens,
        "num_compared": sum(line["num_compared"] for line in mine),
        "num_differing": sum(len(line["divergences"]) for line in mine),
        "num_unexplained": _num_unexplained(mine), "is_void": _num_unexplained(mine) + _num_unexplained(fixed) > 0,
        "companion": mine[-1]["companion"],
    }  # fmt: skip


def _num_unexplained(lines: list[Line]) -> int:
    return sum(not divergence["is_explained"] for line in lines for divergence in line["divergences"])


def conditions_line(run: dict[str, Any]) -> str:
    """Model, decoding and machine in one line."""
    settings, machine = run["settings"], run["machine"]
    decoding = "greedy" if run["is_greedy"] else f"temperature {settings['temperature']}"
    device = machine["gpu"] or f"{machine['cpu']}, threads: {machine['threads']}"
    return (
        f"{Path(settings['model']).name} {run['dtype']}, {decoding}, T = {settings['num_draft_tokens']}, at most "
        f"{settings['max_new_tokens']} new tokens, {device}"
    )


def report_tables(report: dict[str, Any]) -> list[ReportTable]:
    """Speeds and verifications of every policy, and the calibration of companions where there are any."""
    rows = []
    for row in report["rows"]:
        relative = row["relative"]
        rows.append([
            f"{row['batch_size']} {row['policy']}" + f" {VOID}" * row["is_void"], f"{row['tokens_per_s']:.0f}",
            "1" if relative is None else f"{relative['value']:.2f}\n{relative['low']:.2f}-{relative['high']:.2f}",
            f"{row['mean_accepted_tokens']:.2f}", f"{row['num_wasted']} {row['wasted_share']:.0%}",
            f"{row['verified_per_token']:.2f}",
            f"{row['num_differing']}/{row['num_compared']}" if row["num_compared"] else MISSING,
        ])  # fmt: skip
    speeds = ReportTable(
        f"Length policies: {conditions_line(report['conditions'])}",
        ["batch, policy", "tok/s", "/ fixed", "MAT", "wasted", "ver./tok", "differ"], rows,
        "tok/s: in rounds, prefill left out; medians, a ratio's with its 95 % interval. wasted: drafts that were "
        "verified and not accepted, and their share of verified positions; ver./tok: verified positions a token. "
        "differ: answers with other tokens than plain decoding's; void where rounding does not explain them.",
    )  # fmt: skip
    companions = ReportTable(
        "What the companions know of a drafted token's fate",
        ["batch, policy", "n", "acc.", "bits", "S tells", "S, A tell", "ECE S", "S, A"],
        [_calibration_cells(row) for row in report["rows"] if row["companion"] is not None],
        "Of the newest n samples. bits: the entropy of being accepted; what S alone, and S and A, tell of it, in bits "
        "and as a share. ECE: expected calibration error, of predictions made beforehand.",
    )
    return [table for table in (speeds, companions) if table.rows]


def _calibration_cells(row: Row) -> list[str]:
    found = row["companion"]
    entropy = found["entropy_bits"]
    gains = [
        f"{bits:.3f} {bits / entropy:.0%}" if entropy else f"{bits:.3f}"
        for bits in (found["gain_of_agreement_bits"], found["gain_of_both_bits"])
    ]
    return [
        f"{row['batch_size']} {row['policy']}", str(found["num_samples"]), f"{found['acceptance']:.0%}",
        f"{entropy:.3f}", *gains, f"{found['ece_of_agreement']:.3f}", f"{found['ece_of_both']:.3f}",
    ]


def plot_lengths(rows: list[Row], path: Path, *, conditions: str) -> None:
    """Writes a PNG: speed over the fixed length's by batch size, and the share of verifications that were wasted."""
    figure = Figure(figsize=(13, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    speed, waste = figure.subplots(1, 2)
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    handles = {}
    for index, policy in enumerate(policies):
        mine = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["batch_size"])
        look = {"color": colormaps["tab10"](index % 10), "marker": "o", "linewidth": 1.6}
        # Side by side, or the intervals of several policies would stand on one line.
        places = [row["batch_size"] * 1.03 ** (index - (len(policies) - 1) / 2) for row in mine]
        if policy == FIXED:
            handles[policy] = speed.axhline(1, **look | {"marker": None})
        else:
            found = [row["relative"] for row in mine]
            errors = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
            values = [f["value"] for f in found]
            handles[policy] = speed.errorbar(places, values, yerr=errors, capsize=2.5, elinewidth=1, **look)
            void = [(x, y) for x, y, row in zip(places, values, mine, strict=True) if row["is_void"]]
            speed.scatter(*zip(*void, strict=True) if void else ([], []), marker="x", s=120, color="black", zorder=3)
        if policy != PLAIN_DECODING:  # it verifies no drafts
            waste.plot(places, [100 * row["wasted_share"] for row in mine], **look)
    sizes = sorted({row["batch_size"] for row in rows})
    _label(speed, sizes, "tokens per second / fixed length's\nmedian over slices, 95 % interval")
    _label(waste, sizes, "wasted verifications, % of verified positions")
    figure.legend(handles.values(), policies, loc="outside lower center", ncols=6, fontsize=10, frameon=False)
    if any(row["is_void"] for row in rows):
        conditions += "\n×: void, some answers have other tokens than plain decoding's"
    figure.suptitle(conditions, fontsize=11, wrap=True)
    write_picture(path, figure)


def _label(axes: Axes, sizes: list[int], what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set_xlabel("batch size, rows", fontsize=11)
    axes.set_ylabel(what, fontsize=11)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
