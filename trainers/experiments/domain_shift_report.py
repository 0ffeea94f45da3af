"""What the cells of a drift run say: figures of every phase beside the goals, as JSON, Markdown and pictures.

Knows the cells' records, see `trainers.experiments.domain_shift`; runs nothing.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dvi.bench.statistics import NUM_RESAMPLES, Interval
from dvi.telemetry import running_mean
from dvi.whole_files import write_picture, write_whole
from trainers.experiments.streams import MIXED

Cell = Mapping[str, Any]
Check = Mapping[str, Any]

CONVERGED_SHARE = 0.9  # of the acceptance that its domain alone converges to: from there on a drafter has followed
REQUESTS_GOAL, KEPT_GOAL, SPEED_GOAL = 300, 0.9, 0.97
TRAFFIC_WINDOW = 25  # requests that a point of the drawn traffic is the mean of


@dataclass(frozen=True)
class PhaseFigures:
    """One phase of one cell. Acceptances are held-out ones, accepted / drafted.

    converged           at the end of a run of the same length on this domain alone.
    requests_to_follow  until CONVERGED_SHARE of that, as far as the checks resolve it; 0 when the phase begins with it,
                        None when it ends without.
    kept                of the previous phase's domain: acceptance at the end of this phase / at its start, with the
                        interval over held-out prompts; None for the first phase.
    lowest_speed        the slowest window as a ratio to plain decoding; None for a phase shorter than a window.
    """

    stream: str
    variant: str
    phase: int
    domain: str
    num_requests: int
    converged: float
    at_start: float
    at_end: float
    requests_to_follow: int | None
    kept: Interval | None
    lowest_speed: float | None
    num_drifts: int
    num_steps: int


Figures = list[list[list[PhaseFigures]]]  # by stream, variant and phase


def phase_figures(cell: Cell, converged: Mapping[str, Cell]) -> list[PhaseFigures]:
    """The figures of each phase. converged: the run on each domain alone."""
    figures, first_request = [], 0
    for number, phase in enumerate(cell["phases"]):
        domain, last_request = phase["domain"], first_request + phase["num_requests"]
        checks = [check for check in cell["checks"] if first_request <= check["requests"] <= last_request]
        target = acceptance(converged[domain], converged[domain]["checks"][-1], domain)
        followed = (c["requests"] for c in checks if acceptance(cell, c, domain) >= CONVERGED_SHARE * target)
        reached = next(followed, None)
        previous = cell["phases"][number - 1]["domain"] if number else domain
        speeds = [window["speed_ratio"] for window in cell["windows"] if window["phase"] == number]
        figures.append(PhaseFigures(
            stream=cell["stream"], variant=cell["variant"], phase=number + 1, domain=domain,
            num_requests=phase["num_requests"], converged=target, at_start=acceptance(cell, checks[0], domain),
            at_end=acceptance(cell, checks[-1], domain),
            requests_to_follow=None if reached is None else reached - first_request,
            kept=None if previous == domain else kept(checks[0], checks[-1], previous),
            lowest_speed=min(speeds, default=None), num_drifts=checks[-1]["drifts"] - checks[0]["drifts"],
            num_steps=checks[-1]["steps"] - checks[0]["steps"],
        ))  # fmt: skip
        first_request = last_request
    return figures


def acceptance(cell: Cell, check: Check, domain: str) -> float:
    """Accepted / drafted on a domain's held-out prompts; for MIXED on those of all domains."""
    return accepted_per_round(check, domain) / cell["num_draft_tokens"]


def accepted_per_round(check: Check, domain: str) -> float:
    """Accepted drafts of a round on a domain's held-out prompts."""
    rounds_N, accepted_N = _counts(check, domain)
    return float(accepted_N.sum() / rounds_N.sum())


def kept(before: Check, after: Check, domain: str) -> Interval | None:
    """Acceptance after / before, its interval over the held-out prompts; None where nothing was accepted before."""
    was, is_now = accepted_per_round(before, domain), accepted_per_round(after, domain)
    if was == 0:
        return None
    were_R, are_now_R = _resampled(before, domain), _resampled(after, domain)
    low, high = np.quantile(are_now_R[were_R > 0] / were_R[were_R > 0], [0.025, 0.975])
    return Interval(is_now / was, float(low), float(high), len(_counts(before, domain)[0]))


def _counts(check: Check, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounds and accepted drafts of each held-out prompt, [N] both."""
    domains = check["rounds"] if domain == MIXED else [domain]
    rounds_N, accepted_N = (np.concatenate([check[key][name] for name in domains]) for key in ("rounds", "accepted"))
    return rounds_N, accepted_N


def _resampled(check: Check, domain: str) -> np.ndarray:
    """Accepted drafts of a round, [R], in each resample of the held-out prompts: the same ones at every call."""
    rounds_N, accepted_N = _counts(check, domain)
    picks_RN = np.random.default_rng(0).integers(len(rounds_N), size=(NUM_RESAMPLES, len(rounds_N)))
    return accepted_N[picks_RN].sum(1) / rounds_N[picks_RN].sum(1)


# Goals


def goals(phases: list[PhaseFigures]) -> dict[str, bool | None]:
    """Of one cell, whether each goal was reached; None where its phases do not say."""
    follow = [phase.requests_to_follow for phase in phases]
    ratios = [phase.kept.value for phase in phases if phase.kept is not None]
    speeds = [phase.lowest_speed for phase in phases if phase.lowest_speed is not None]
    return {
        "follows": all(count is not None and count <= REQUESTS_GOAL for count in follow),
        "keeps": min(ratios) >= KEPT_GOAL if ratios else None,
        "never_slower": min(speeds) >= SPEED_GOAL if speeds else None,
    }


# Output


def write_report(
    streams: list[list[Cell]], *, converged: Mapping[str, Mapping[str, Cell]], folder: Path, console: Console
) -> dict[str, Any]:
    """Writes report.json, report.md and drift-STREAM.png, prints the table, and returns report.json's content.

    streams    the cells of each stream, one a variant.
    converged  by stream and domain, the run on that domain alone.
    """
    figures = [[phase_figures(cell, converged[cell["stream"]]) for cell in cells] for cells in streams]
    first = streams[0][0]
    report = {
        "argv": sys.argv, "machine": first["machine"], "settings": first["settings"],
        "phases": [asdict(phase) for cells in figures for phases in cells for phase in phases],
        "goals": [
            {"stream": phases[0].stream, "variant": phases[0].variant, **goals(phases)}
            for cells in figures for phases in cells
        ],
    }  # fmt: skip
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_whole(folder / "report.md", to_markdown(streams, figures, converged))
    for cells in streams:
        plot_stream(cells, converged[cells[0]["stream"]], folder / f"drift-{cells[0]['stream']}.png")
    console.print(_table(figures))
    for line in _verdicts(figures):
        console.print(line)
    return report


HEADINGS = (
    "stream", "variant", "phase", "alone", "at start", "at end", f"requests to {CONVERGED_SHARE:.0%}",
    "kept of the last", "lowest speed", "drifts", "steps",
)  # fmt: skip


def _row(phase: PhaseFigures) -> tuple[str, ...]:
    follow = f"not in {phase.num_requests}" if phase.requests_to_follow is None else str(phase.requests_to_follow)
    ratio = phase.kept and f"{phase.kept.value:.2f} ({phase.kept.low:.2f} to {phase.kept.high:.2f})"
    speed = "n/a" if phase.lowest_speed is None else f"{phase.lowest_speed:.2f}x"
    return (
        phase.stream, phase.variant, f"{phase.phase} {phase.domain}", f"{phase.converged:.3f}",
        f"{phase.at_start:.3f}", f"{phase.at_end:.3f}", follow, ratio or "-", speed, str(phase.num_drifts),
        str(phase.num_steps),
    )  # fmt: skip


def _table(figures: Figures) -> Table:
    table = Table(title="Held-out acceptance while the traffic changes")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right")
    for phases in (phases for cells in figures for phases in cells):
        for phase in phases:
            table.add_row(*_row(phase), end_section=phase is phases[-1])
    return table


def _verdicts(figures: Figures) -> Iterable[str]:
    """One line for each cell."""
    words = {True: "reached", False: "missed", None: "n/a"}
    for phases in (phases for cells in figures for phases in cells):
        found = goals(phases)
        yield (
            f"{phases[0].stream}, {phases[0].variant}: {CONVERGED_SHARE:.0%} within {REQUESTS_GOAL} requests "
            f"{words[found['follows']]}; {KEPT_GOAL} kept {words[found['keeps']]}; never below {SPEED_GOAL}x plain "
            f"{words[found['never_slower']]}"
        )


def to_markdown(streams: list[list[Cell]], figures: Figures, converged: Mapping[str, Mapping[str, Cell]]) -> str:
    """The report for people: conditions, table, goals, what the columns mean."""
    cell = streams[0][0]
    settings, machine = cell["settings"], cell["machine"]
    num_held_out = {
        domain: len(runs["checks"][0]["rounds"][domain])
        for cells in streams for runs in cells for domain in runs["checks"][0]["rounds"]
    }  # fmt: skip
    has_settled = any(check["is_settled"] for cells in streams for runs in cells for check in runs["checks"])
    num_cut = sum(runs["cut_prompts"] for cells in streams for runs in cells)
    conditions = [
        f"model {settings['model']['path']}, {settings['model']['dtype']}; drafter {settings['drafter']['kind']}, "
        f"from {settings['drafter']['adapter'] or 'scratch'}; seed {settings['train']['seed']}",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, load {machine['load']} at the end; torch "
        f"{machine['torch']}, transformers {machine['transformers']}; {machine['date']}",
        f"greedy, batch {settings['data']['batch_size']}, at most {settings['sampling']['max_new_tokens']} new tokens "
        f"a request; {cell['num_draft_tokens']} drafted tokens a round, but for full_auto, which chooses; prompts cut "
        f"for length: {num_cut}",
        f"learning: {settings['train']['schedule']}, a step every {settings['train']['rounds_per_step']} rounds, "
        "budget " + ", ".join(f"{runs['settings']['train']['budget']} ({runs['variant']})" for runs in streams[0]),
        "held-out prompts: " + ", ".join(f"{domain} {count}" for domain, count in num_held_out.items())
        + f"; looked at every {cell['requests_per_check']} requests, {cell['num_draft_tokens']} drafted tokens",
    ]  # fmt: skip
    rows = [_row(phase) for cells in figures for phases in cells for phase in phases]
    lines = [
        "# Drift between domains", "", f"    {shlex.join(['dvi', *sys.argv[1:]])}", "",
        *(f"* {condition}" for condition in conditions), "",
        *("| " + " | ".join(row) + " |" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows)), "",
        _LEGEND.format(window=cell["requests_per_window"]), "",
        *([] if has_settled else ["The learner never settled in these runs, so there was nothing to wake.", ""]),
        "Goals:", "", *(f"* {line}" for line in _verdicts(figures)), "",
    ]  # fmt: skip
    lines += [f"![{cells[0]['stream']}](drift-{cells[0]['stream']}.png)" for cells in streams]
    return "\n".join(lines) + "\n"


_LEGEND = f"""*alone*: acceptance (accepted / drafted) at the end of a run of the same length on this domain alone,
variant full; a stream of one domain is that run itself. *requests to {CONVERGED_SHARE:.0%}* of it: 0 where the phase
begins with it. *kept of the last*: acceptance on the previous phase's domain, at the end of this phase / at its start,
with the 95 % bootstrap interval over held-out prompts. *lowest speed*: of windows of {{window}} requests, training
included, as a ratio to plain decoding measured after each window; a fixed number of drafted tokens cannot be held back
where it does not pay, so this goal is for full_auto. One seed: differences between variants within the intervals say
nothing."""


def plot_stream(cells: list[Cell], converged: Mapping[str, Cell], path: Path) -> None:
    """Writes a PNG of one stream: a panel a variant, acceptance over requests, phases shaded and named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = list(cells[0]["checks"][0]["rounds"])
    # A bare Figure and not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(10, 1.5 + 3 * len(cells)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cells), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, cell in zip(panels, cells, strict=True):
        _draw_phases(axes, cell, converged)
        # A request without drafts says nothing of acceptance.
        drafted = [(count, one) for count, one in enumerate(cell["traffic"], start=1) if one["drafted"]]
        axes.plot(
            [count for count, _ in drafted],
            running_mean([one["accepted"] / one["drafted"] for _, one in drafted], TRAFFIC_WINDOW),
            color="0.55", linewidth=1, label=f"traffic, mean of {TRAFFIC_WINDOW} requests",
        )  # fmt: skip
        requests = [check["requests"] for check in cell["checks"]]
        for index, domain in enumerate(domains):
            values = [acceptance(cell, check, domain) for check in cell["checks"]]
            bands = [np.quantile(_resampled(c, domain), [0.025, 0.975]) for c in cell["checks"]]
            low, high = np.transpose(bands) / cell["num_draft_tokens"]
            axes.plot(requests, values, color=f"C{index}", linewidth=1.8, label=f"held-out {domain}")
            axes.fill_between(requests, low, high, color=f"C{index}", alpha=0.12, linewidth=0)
        axes.set_title(f"{cell['stream']}, {cell['variant']}", fontsize=11)
        axes.set_ylabel("acceptance\n(accepted / drafted)", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    # Panels differ in what they have: one legend of all, each name once.
    named: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside upper center", fontsize=9, ncols=4)
    panels[-1].set_xlabel("requests served (bands: 95 % over held-out prompts)", fontsize=11)
    write_picture(path, figure)


def _draw_phases(axes: Any, cell: Cell, converged: Mapping[str, Cell]) -> None:
    """Shades every other phase, names each, and marks what its domain alone converges to, drifts, and settled times."""
    first_request = 0
    for number, phase in enumerate(phase_figures(cell, converged)):
        last_request = first_request + phase.num_requests
        if number % 2 == 0:
            axes.axvspan(first_request, last_request, color="0.93", zorder=0)
        axes.text(
            (first_request + last_request) / 2, 0.97, phase.domain, transform=axes.get_xaxis_transform(), ha="center",
            va="top", fontsize=10,
        )  # fmt: skip
        axes.hlines(
            CONVERGED_SHARE * phase.converged, first_request, last_request, color="black", linestyle=":", linewidth=1.2,
            label=f"{CONVERGED_SHARE:.0%} of the domain alone" if number == 0 else None,
        )  # fmt: skip
        first_request = last_request
    checks = cell["checks"]
    settled = [check["requests"] for check in checks if check["is_settled"]]
    axes.plot(settled, [0.01] * len(settled), "k_", markersize=5, label="learner settled" if settled else None)
    drifts = [now["requests"] for before, now in itertools.pairwise(checks) if now["drifts"] > before["drifts"]]
    axes.plot(drifts, [0.03] * len(drifts), "rv", markersize=6, label="drift seen" if drifts else None)
