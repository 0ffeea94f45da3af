"""An ablation's report: report.json, report.md with a table and the verdict in words, ablation.png.

Knows cells and how they are shown; every number is `ablation_figures`'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dvi.bench.statistics import mean_and_std
from dvi.settings import TrainConfig
from dvi.whole_files import write_picture, write_whole
from trainers.experiments.ablation_figures import (
    BASELINE,
    OFFLINE,
    Cell,
    Comparison,
    baseline_of,
    best_reward_arm,
    compare,
    summarise,
)

# Heading, key in a summary's figures, format.
COLUMNS = (
    ("held-out MAT", "held_out_mat", ".3f"),
    ("held-out acceptance", "held_out_acceptance", ".3f"),
    ("acceptance gain per 1,000 transitions", "acceptance_gain_per_1000_transitions", ".4f"),
    ("MAT gain per 1,000 transitions", "mat_gain_per_1000_transitions", ".4f"),
    ("mean traffic acceptance", "traffic_acceptance", ".3f"),
    ("speed against plain, training included", "speed_against_plain", ".2f"),
    ("of the last quarter", "speed_in_last_quarter", ".2f"),
    ("break-even tokens", None, ""),
    ("steps", "steps", ".0f"),
    ("transitions", "transitions", ".0f"),
    ("training s", "train_s", ".1f"),
)
DIAGNOSIS = (
    ("positions with a reward, %", "rewarded_share", ".1f"),
    ("of these on-policy, %", "on_policy_share", ".1f"),
    ("returns to the best", "rollbacks", ".1f"),
)
SHOWN_ON_TERMINALS = (0, 4, 5, 6, 7)  # of COLUMNS


def write_report(
    cells: list[Cell], config: TrainConfig, folder: Path, *, order: Iterable[str], console: Console
) -> dict[str, object]:
    """Writes the three files, shows the table and returns what report.json holds. order: of the arms, by kind."""
    rank = {kind: place for place, kind in enumerate(order)}
    names = sorted({cell.arm for cell in cells}, key=lambda arm: (rank[arm.partition(":")[0]], arm))
    arms = {name: sorted((c for c in cells if c.arm == name), key=lambda c: c.seed) for name in names}
    comparisons = {name: _against_baseline(arms, name) for name in names}
    summaries = [summarise(arms[name]) for name in names]
    report: dict[str, object] = {
        "verdict": _verdict(arms, comparisons),
        "arms": summaries,
        "comparisons": [dataclasses.asdict(found) for found in comparisons.values() if found is not None],
        "conditions": _conditions(config, cells),
    }
    write_whole(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    others = [str(found) for found in comparisons.values() if found is not None]
    write_whole(folder / "report.md", _markdown(report, summaries, others))
    plot_ablation(arms, folder / "ablation.png")
    table = Table(title="mean ± std over seeds")
    table.add_column("arm", no_wrap=True)
    for place in SHOWN_ON_TERMINALS:
        table.add_column(COLUMNS[place][0], justify="right")
    for summary in summaries:
        row = _row(summary, COLUMNS)
        table.add_row(row[0], *(row[place + 1] for place in SHOWN_ON_TERMINALS))
    console.print(table)
    console.print(report["verdict"], soft_wrap=True)
    console.print(f"report: {folder / 'report.md'}, picture: {folder / 'ablation.png'}", soft_wrap=True)
    return report


def _against_baseline(arms: dict[str, list[Cell]], arm: str) -> Comparison | None:
    baseline = baseline_of(arm, arms)
    return None if baseline is None else compare(arms, arm, baseline)


def _verdict(arms: dict[str, list[Cell]], comparisons: dict[str, Comparison | None]) -> str:
    """Whether the best arm with rewards beats KL alone, in words."""
    best = best_reward_arm(arms)
    if best is None:
        return "No arm with rewards was run."
    if comparisons[best] is None:
        return f"The best arm with rewards is {best}; {BASELINE} was not run with its seeds, so nothing can be said."
    return f"The best arm with rewards is {best}. {comparisons[best]}"


def _conditions(config: TrainConfig, cells: list[Cell]) -> dict[str, object]:
    model, drafter, blocks = config.model, config.drafter, next((c.blocks for c in cells if c.blocks), [])
    return {
        "model": model.path, "split_layer": model.split_layer, "dtype": model.dtype, "mode": model.mode,
        "drafter": drafter.kind, "draft_vocab_size": drafter.draft_vocab_size,
        "num_draft_tokens": config.draft.num_draft_tokens, "batch_size": config.data.batch_size,
        "requests": sum(len(block.requests) for block in blocks), "max_new_tokens": config.sampling.max_new_tokens,
        "cut_prompts": max(cell.num_cut_prompts for cell in cells), "held_out_requests": config.eval.limit,
        "held_out_max_new_tokens": config.eval.max_new_tokens,
        "plain_blocks": f"{sum(block.plain is not None for block in blocks)} of {len(blocks)}",
        "seeds": sorted({cell.seed for cell in cells}), "learning": dataclasses.asdict(config.train),
        "machines": _unique({k: v for k, v in cell.machine.items() if k != "load"} for cell in cells),
        "load": [min(loads := [cell.machine["load"] for cell in cells]), max(loads)],
        "commands": _unique(cell.command for cell in cells),
    }


def _unique(values: Iterable) -> list:
    found: list = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _row(summary: dict, columns: Iterable[tuple[str, str | None, str]]) -> list[str]:
    """The arm's name, then one text a column: mean ± std, n/a where nothing was measured."""
    texts = [summary["arm"]]
    for heading, key, form in columns:
        if key is None:
            texts.append(_break_even_text(summary["break_even"]))
            continue
        spread, factor = summary["figures"][key], 100 if heading.endswith("%") else 1
        if spread is None:
            texts.append("n/a")
        else:
            std = "" if spread["std"] is None else f" ± {factor * spread['std']:{form}}"
            texts.append(f"{factor * spread['mean']:{form}}{std}")
    return texts


def _break_even_text(per_seed: list[dict]) -> str:
    if not per_seed:
        return "n/a"
    tokens = [found["tokens"] for found in per_seed if found["kind"] != "never"]
    num_never, num_extrapolated = len(per_seed) - len(tokens), sum(f["kind"] == "extrapolated" for f in per_seed)
    if not tokens:
        return "never at this rate"
    mean, std = mean_and_std(tokens)
    text = f"{mean:.0f}" if std is None else f"{mean:.0f} ± {std:.0f}"
    notes = [f"{num_extrapolated} of {len(per_seed)} extrapolated"] if num_extrapolated else []
    notes += [f"never at this rate in {num_never} of {len(per_seed)}"] if num_never else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _markdown(report: dict, summaries: list[dict], comparisons: list[str]) -> str:
    conditions = dict(report["conditions"])
    commands, machines = conditions.pop("commands"), conditions.pop("machines")
    num_mismatches = sum(summary["mismatches"] for summary in summaries)
    return "\n".join([
        "# Does learning help?", "", f"**{report['verdict']}**", "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, conditions['seeds']))}. Every arm starts from the "
        "same untrained drafter of its seed and meets the same prompts in the same order; decoding is greedy, so the "
        "text learnt from is the same. Steps follow rounds: an arm that accepts less makes more rounds, and so more "
        "steps. The offline arms make as many steps as kl_only of their seed, over recordings of the same text.", "",
        *_markdown_table(summaries, COLUMNS), "",
        "Differences in held-out MAT, paired over seeds; one counts when it exceeds two standard errors, which with "
        "few seeds is weak evidence:", "",
        *(f"* {line}" for line in comparisons), "",
        "What the reward terms had to learn from, and how often the trainer went back to earlier weights:", "",
        *_markdown_table(summaries, DIAGNOSIS), "",
        "Held-out acceptance by depth, given that the depth was reached:", "",
        *(f"* {s['arm']}: {', '.join(f'{share:.3f}' for share in s['acceptance_per_depth'])}" for s in summaries), "",
        "![Acceptance over transitions, and held-out figures](ablation.png)", "",
        "## How it was measured", "",
        "*Speed* is tokens over the seconds of serving and training together, prefill included, as a ratio to plain "
        "decoding of the same prompts, block by block in the same minutes. *Break-even* is the token count from which "
        "on the whole run has taken no longer than plain decoding of as many tokens; where the run ended before, it "
        "is extrapolated at the speed of its last quarter. *MAT* counts the recovered or bonus token. Held-out figures "
        "are of the drafter as it served, rounds replayed over the model's own answers. An offline arm serves nothing: "
        f"what needs traffic is n/a. Answers that differed from plain decoding's: {num_mismatches}.", "",
        *(f"* {name}: {value}" for name, value in conditions.items()),
        *(f"* machine: {json.dumps(machine)}" for machine in machines), "",
        *(f"    {command}" for command in commands), "",
    ])  # fmt: skip


def _markdown_table(summaries: list[dict], columns: tuple[tuple[str, str | None, str], ...]) -> list[str]:
    rows = [["arm", *(heading for heading, _, _ in columns)], ["---", *("---:" for _ in columns)]]
    rows += [_row(summary, columns) for summary in summaries]
    return [f"| {' | '.join(row)} |" for row in rows]


def plot_ablation(arms: dict[str, list[Cell]], path: Path) -> None:
    """Acceptance on the traffic over transitions; on held-out text over steps; held-out MAT. Bands and bars are std."""
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["traffic", "held_out"], ["mat", "mat"]], height_ratios=[3, 2])
    colors = {arm: f"C{place % 10}" for place, arm in enumerate(arms)}
    for arm, cells in arms.items():
        style = {"color": colors[arm], "linestyle": "--" if cells[0].arm.partition(":")[0] in OFFLINE else "-"}
        if cells[0].blocks is not None:
            _draw_band(axes["traffic"], cells, _traffic_curve, style, label=arm)
        _draw_band(axes["held_out"], cells, _held_out_curve, style, label=arm)
    for name, title, below in (
        ("traffic", "on the traffic, block by block", "transitions seen (committed positions)"),
        ("held_out", "on held-out requests, drafter frozen", "optimizer steps"),
    ):
        axes[name].set(title=title, xlabel=below, ylabel="acceptance (accepted / drafted)")
        axes[name].set_ylim(bottom=0)
        axes[name].grid(alpha=0.3)
    axes["held_out"].legend(loc="lower right", fontsize=9, ncols=2)
    for place, (arm, cells) in enumerate(arms.items()):
        mats = [cell.after.mean_accepted_tokens for cell in cells]
        mean, std = mean_and_std(mats)
        axes["mat"].bar(place, mean, yerr=std, capsize=4, color=colors[arm], alpha=0.8)
        axes["mat"].plot([place] * len(mats), mats, ".", color="black", markersize=4)
        axes["mat"].annotate(f"{mean:.2f}", (place, 1.0), xytext=(0, 4), textcoords="offset points", ha="center")
    axes["mat"].set_xticks(range(len(arms)), [arm.replace(":", "\n").replace(",", "\n") for arm in arms], fontsize=9)
    axes["mat"].set(title="after all learning (dots: seeds)", ylabel="held-out MAT\n(tokens per verify pass)")
    axes["mat"].set_ylim(bottom=1)  # a verify pass always yields one token
    axes["mat"].grid(alpha=0.3, axis="y")
    figure.suptitle(f"mean ± std over {max(len(cells) for cells in arms.values())} seeds", fontsize=11)
    write_picture(path, figure)


def _draw_band(
    axes: Axes, cells: list[Cell], curve: Callable[[Cell], tuple[list[float], list[float]]], style: dict[str, str], *,
    label: str,
) -> None:
    """The mean curve of the cells, their points matched by number, within a standard deviation."""
    x_SP, y_SP = (np.array(values) for values in zip(*(curve(cell) for cell in cells), strict=True))
    mean_P = y_SP.mean(0)
    axes.plot(x_SP.mean(0), mean_P, label=label, linewidth=1.6, **style)
    if len(cells) > 1:
        std_P = y_SP.std(0, ddof=1)
        axes.fill_between(x_SP.mean(0), mean_P - std_P, mean_P + std_P, color=style["color"], alpha=0.15, linewidth=0)


def _traffic_curve(cell: Cell) -> tuple[list[float], list[float]]:
    """Transitions at the end of each block, and the block's acceptance."""
    return (
        [block.requests[-1].transitions for block in cell.blocks],
        [sum(r.accepted for r in block.requests) / sum(r.drafted for r in block.requests) for block in cell.blocks],
    )


def _held_out_curve(cell: Cell) -> tuple[list[float], list[float]]:
    return [mark.steps for mark in cell.held_out], [mark.acceptance for mark in cell.held_out]
