"""What a sweep found: its rows from fastest to slowest, the default to pick, and how to show them.

Knows the figures of finished cells; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from dvi.model.starting_drafter import default_split_layer
from dvi.settings import DraftSettings
from dvi.whole_files import write_picture, write_whole

Row = dict[str, Any]

CELL_KEYS = ("split_layer", "rank", "draft_vocab_size", "steps", "train_s", "plain_ms", "draft_step_c")
CHANGING = ("date", "load")  # what may differ between cells measured on one machine
HEADINGS = (
    "split layer", "T", "rank", "vocabulary", "MAT", "acceptance by depth", "c", "v(T+1)", "speed by the law",
    "measured", "95 % interval", "measured / law",
)


def make_report(cells: list[dict[str, Any]], *, conditions: dict[str, Any]) -> dict[str, Any]:
    """One row per cell and draft length, by measured speed; the pick; and the present default, if it was in the grid.

    cells: as `run_sweep` stores them. conditions: "num_layers" decides the default split layer.
    """
    rows = [{key: cell[key] for key in CELL_KEYS} | length for cell in cells for length in cell["lengths"]]
    rows.sort(key=lambda row: row["measured"]["value"] if row["measured"] else 0.0, reverse=True)
    machines = [{key: value for key, value in cell["machine"].items() if key not in CHANGING} for cell in cells]
    picked = pick(rows)
    default = None
    if picked is not None:
        wanted = {
            "split_layer": default_split_layer(conditions["num_layers"]),
            "num_draft_tokens": DraftSettings().num_draft_tokens, "rank": picked["rank"],
            "draft_vocab_size": picked["draft_vocab_size"],
        }
        default = next((row for row in rows if wanted.items() <= row.items()), None)
    return {
        "conditions": conditions | {
            "machines": [m for i, m in enumerate(machines) if m not in machines[:i]],
            "dates": sorted({cell["machine"]["date"] for cell in cells}),
            "load": [bound(cell["machine"]["load"] for cell in cells) for bound in (min, max)],
        },
        "rows": rows, "picked": picked, "default": default,
    }  # fmt: skip


def pick(rows: list[Row]) -> Row | None:
    """The fastest as measured; of those no slower than its interval's low end, the fewest layers, then shortest draft.

    Within the noise less is better: a shallow layer is paid for at every drafted token, also where few are accepted.
    None where nothing could be measured.
    """
    measured = [row for row in rows if row["measured"] is not None]
    if not measured:
        return None
    best = max(measured, key=lambda row: row["measured"]["value"])
    alike = [row for row in measured if row["measured"]["value"] >= best["measured"]["low"]]
    return min(alike, key=lambda row: (row["split_layer"], row["num_draft_tokens"], -row["measured"]["value"]))


def write_report(report: dict[str, Any], folder: Path, *, console: Console) -> None:
    """Leaves report.json, report.md and sweep.png in the folder and prints the table."""
    write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_whole(folder / "report.md", to_markdown(report))
    plot_sweep(report, folder / "sweep.png")
    table = Table(title="drafters by measured speed")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 5 else "right")
    for texts in _table_rows(report):
        table.add_row(*texts)
    console.print(table)
    for line in (*verdict(report), f"report: {folder / 'report.md'}, picture: {folder / 'sweep.png'}"):
        console.print(line, soft_wrap=True)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page that stands alone: conditions, command, verdict, table, and what the columns are."""
    found = report["conditions"]
    lines = [
        "# Sweep of drafters", "",
        f"`{found['command']}`", "",
        f"{found['model']}, {found['dtype']}, {found['mode']} mode, {found['drafter']} drafter, {found['schedule']}, "
        f"lr {found['lr']}, seed {found['seed']}. Every drafter learnt offline from the same "
        f"{found['training_prompts']} answers of the model ({found['training_tokens']} tokens, seen once). Acceptance "
        f"on {found['held_out_prompts']} held-out answers ({found['held_out_tokens']} tokens); speed by decoding their "
        "prompts, speculative against plain in turning order, batch 1, greedy, prefill apart.", "",
        *(", ".join(f"{key} {value}" for key, value in machine.items()) for machine in found["machines"]),
        f"Measured {' to '.join(dict.fromkeys((found['dates'][0], found['dates'][-1])))}, load "
        f"{found['load'][0]} to {found['load'][1]}.", "",
        *verdict(report), "",
        "![measured speed](sweep.png)", "",
        "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(texts) + " |" for texts in _table_rows(report)), "",
        "T: drafted tokens. MAT: tokens per verify pass with the recovered or bonus token. c: seconds of a draft step; "
        "v: of the rest of a round; both over a plain step. The law: MAT / (T c + v). Measured: median over prompts of "
        "the ratio to plain decoding, with its bootstrap interval.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def verdict(report: dict[str, Any]) -> list[str]:
    """What to take, and how it compares with the defaults."""
    picked, default = report["picked"], report["default"]
    if picked is None:
        return ["default picked: n/a, no output agreed with plain decoding's and so nothing could be compared"]
    lines = [
        f"default picked: split layer {picked['split_layer']}, {picked['num_draft_tokens']} drafted tokens, rank "
        f"{picked['rank']}, vocabulary {_vocabulary(picked)}: {_speed(picked)} plain"
    ]
    layer, length = default_split_layer(report["conditions"]["num_layers"]), DraftSettings().num_draft_tokens
    present = f"the present default, split layer {layer} and {length} drafted tokens,"
    if default is None:
        lines.append(f"{present} is not in this grid")
    elif default == picked:
        lines.append(f"{present} is that one")
    elif default["measured"] is None:
        lines.append(f"{present} could not be compared with plain decoding")
    else:
        lines.append(f"{present} at the same rank and vocabulary: {_speed(default)} plain")
    num_mismatches = sum(row["num_mismatches"] for row in report["rows"])
    if num_mismatches:
        lines.append(f"{num_mismatches} outputs differed from plain decoding's and are left out of the ratios")
    return lines


def plot_sweep(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG: a heat map of split layer by draft length for each rank and vocabulary; the pick is framed."""
    rows = report["rows"]
    layers, lengths, ranks, sizes = (
        sorted({row[key] for row in rows}) for key in ("split_layer", "num_draft_tokens", "rank", "draft_vocab_size")
    )
    speeds = [row["measured"]["value"] for row in rows if row["measured"]]
    low, high = (min(speeds), max(speeds)) if speeds else (0.0, 1.0)
    width, height = 1.6 + 1.5 * len(lengths), 1.3 + 0.9 * len(layers)
    figure = Figure(
        figsize=(width * len(sizes) + 1.2, max(height * len(ranks) + 0.8, 3.2)), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ranks), len(sizes), squeeze=False)
    image = None
    for rank, line in zip(ranks, panels, strict=True):
        for size, axes in zip(sizes, line, strict=True):
            chosen = [row for row in rows if (row["rank"], row["draft_vocab_size"]) == (rank, size)]
            grid = [[float("nan")] * len(lengths) for _ in layers]
            for row in chosen:
                if row["measured"]:
                    grid[layers.index(row["split_layer"])][lengths.index(row["num_draft_tokens"])] = (
                        row["measured"]["value"]
                    )
            image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
            for row in chosen:
                _label(axes, row, x=lengths.index(row["num_draft_tokens"]), y=layers.index(row["split_layer"]),
                       is_dark=row["measured"] is not None and row["measured"]["value"] < (low + high) / 2,
                       is_picked=row == report["picked"])
            axes.set_title(f"rank {rank}, vocabulary {size or 'whole'}", fontsize=11)
            axes.set_xticks(range(len(lengths)), lengths)
            axes.set_yticks(range(len(layers)), layers)
    figure.supxlabel("drafted tokens T", fontsize=12)
    figure.supylabel("split layer", fontsize=12)
    figure.colorbar(image, ax=panels, label="measured speed over plain decoding")
    found = report["conditions"]
    figure.suptitle(
        f"{found['model']}, {found['drafter']} drafter: measured speed, [95 % interval], MAT; framed: picked",
        fontsize=11, wrap=True,
    )
    write_picture(path, figure)


def _label(axes: Axes, row: Row, *, x: int, y: int, is_dark: bool, is_picked: bool) -> None:
    found = row["measured"]
    speed = f"{found['value']:.2f}×\n[{found['low']:.2f}, {found['high']:.2f}]" if found else "n/a"
    axes.text(x, y, f"{speed}\nMAT {row['mean_accepted_tokens']:.2f}", ha="center", va="center", fontsize=9,
              color="white" if is_dark else "black")  # fmt: skip
    if is_picked:
        axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="tab:red", linewidth=3))


def _table_rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in report["rows"]:
        found = row["measured"]
        measured = ("n/a",) * 3
        if found is not None:
            interval = f"{found['low']:.2f} .. {found['high']:.2f}"
            measured = f"{found['value']:.2f}", interval, f"{row['measured_over_predicted']:.2f}"
        yield (
            str(row["split_layer"]), str(row["num_draft_tokens"]), str(row["rank"]), _vocabulary(row),
            f"{row['mean_accepted_tokens']:.2f}", " ".join(f"{a:.2f}" for a in row["acceptance_per_depth"]),
            f"{row['draft_step_c']:.2f}", f"{row['verify_v']:.2f}", f"{row['predicted']:.2f}", *measured,
        )


def _vocabulary(row: Row) -> str:
    return str(row["draft_vocab_size"] or "whole")


def _speed(row: Row) -> str:
    found = row["measured"]
    return f"{found['value']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]"
