"""What a machine can do: the best plan under each latency bound, as a table and as a picture.

Knows plans and forecasts; searches through `dvi.planning.search` and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich import box
from rich.table import Table

from dvi.planning.plans import Forecast, LatencyBound, PlanSpace
from dvi.planning.search import Evaluator, NoFeasiblePlan, search
from dvi.records import ServingPlan
from dvi.whole_files import write_picture

# 10 %: finer steps than forecasts are exact to would only look so.
RUNG = 1.1
HEADS = {
    "split_layer": "split\nlayer", "num_draft_tokens": "draft\ntokens", "max_rows": "rows",
    "prefill_tokens_per_step": "prefill\ntokens", "rounds_per_prefill": "rounds/\nprefill",
    "tensor_parallel": "tensor\nparallel",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A plan and what it gives, with what it is to the reader: "tuned", "present" or, on the frontier, nothing."""

    plan: ServingPlan
    forecast: Forecast
    label: str = ""


@dataclass(frozen=True)
class Frontier:
    """choices: the best plan under ever looser bounds on the token latency; both their figures rise.

    first_token_s: the bound on first tokens, which all of them meet. simulated: every forecast made or known before.
    """

    choices: list[Choice]
    first_token_s: float
    simulated: dict[ServingPlan, Forecast]


def find_frontier(
    space: PlanSpace, bound: LatencyBound, evaluator: Evaluator, *, known: Mapping[ServingPlan, Forecast]
) -> Frontier:
    """The best plans for every bound on the token latency, with the one on first tokens as it is.

    Starts without a bound on the token latency, then asks again and again for a tenth less than the last plan gave,
    until no plan gives that. The best plan under `bound` itself is among them, also where it lies between two steps or
    within a tenth of the last. known: forecasts of earlier searches with the same evaluator, which are not made again.
    Raises NoFeasiblePlan when no plan meets the bound.
    """
    own = search(space, bound, evaluator, known=known)
    found = [search(space, replace(bound, token_s=math.inf), evaluator, known=own.simulated)]
    try:
        while (latency_s := found[-1].forecast.token_p99_s) > 0:  # 0 where all answers have one token
            rung = replace(bound, token_s=latency_s / RUNG)
            found.append(search(space, rung, evaluator, known=found[-1].simulated))
        simulated = found[-1].simulated
    except NoFeasiblePlan as error:
        simulated = error.nearest.simulated
    best = {result.best: Choice(result.best, result.forecast) for result in (own, *found)}
    choices = sorted(best.values(), key=lambda choice: (choice.forecast.token_p99_s, choice.forecast.tokens_per_s))
    return Frontier(choices, bound.first_token_s, simulated)


def plans_table(choices: Sequence[Choice], *, title: str) -> Table:
    """A row for each plan: tokens per second, quantiles of both latencies, and those of its fields that vary."""
    names = [field.name for field in fields(ServingPlan)]
    varying = [name for name in names if len({getattr(choice.plan, name) for choice in choices}) > 1]
    alike = [f"{name} {getattr(choices[0].plan, name)}" for name in names if name not in varying]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0,
        caption=f"All of them: {', '.join(alike)}. ms: of a token, and to the first.", caption_justify="left",
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    latencies = ("token\nms p50", "token\nms p99", "first\nms p50", "first\nms p99")
    for head in (*(HEADS[name] for name in varying), "tokens/s", *latencies):
        table.add_column(head, justify="right")
    for choice in choices:
        gives = choice.forecast
        seconds = (gives.token_p50_s, gives.token_p99_s, gives.first_token_p50_s, gives.first_token_p99_s)
        table.add_row(
            choice.label, *(str(getattr(choice.plan, name)) for name in varying), f"{gives.tokens_per_s:,.0f}",
            *(f"{1e3 * s:.1f}" if s < 0.1 else f"{1e3 * s:,.0f}" for s in seconds),
        )  # fmt: skip
    return table


def plot_frontier(
    frontier: Frontier, marked: Sequence[Choice], token_s: float, path: str | Path, *, conditions: str
) -> None:
    """Writes a PNG: throughput over p99 token latency, as steps; grey are all plans simulated, blue the choices.

    A step is as high as what a bound anywhere along it admits, of what was simulated: from one choice to the next, a
    tenth of latency, better plans may be left. marked: the chosen plan, and one to hold it against. token_s: a bound.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    def places(forecasts: Sequence[Forecast]) -> tuple[list[float], list[float]]:
        return [1e3 * f.token_p99_s for f in forecasts], [f.tokens_per_s for f in forecasts]

    # A bare Figure and not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    in_time = [f for f in frontier.simulated.values() if f.first_token_p99_s <= frontier.first_token_s]
    too_late = [f for f in frontier.simulated.values() if f.first_token_p99_s > frontier.first_token_s]
    axes.plot(*places(in_time), ".", color="0.7", markersize=5, label=f"simulated plan ({len(in_time)})")
    if too_late:
        label = f"first token after {1e3 * frontier.first_token_s:.4g} ms ({len(too_late)})"
        axes.plot(*places(too_late), "x", color="0.8", markersize=5, label=label)
    steps: list[Forecast] = []
    for forecast in sorted(in_time, key=lambda f: (f.token_p99_s, -f.tokens_per_s)):
        if not steps or forecast.tokens_per_s > steps[-1].tokens_per_s:
            steps.append(forecast)
    label = "frontier: the best under each bound"
    axes.step(*places(steps), where="post", linewidth=1.8, color="tab:blue", label=label)
    axes.plot(*places([choice.forecast for choice in frontier.choices]), "o", markersize=4, color="tab:blue")
    for choice, colour, marker in zip(marked, ("tab:red", "tab:orange"), ("*", "D"), strict=False):
        axes.plot(
            *places([choice.forecast]), marker, color=colour, markersize=14 if marker == "*" else 8, zorder=3,
            markeredgecolor="black", markeredgewidth=0.6, linestyle="none", label=choice.label,
        )  # fmt: skip
    if token_s < math.inf:
        label = f"bound: {1e3 * token_s:.4g} ms"
        axes.axvline(1e3 * token_s, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set_xscale("log")
    right = axes.get_xlim()[1]  # to here the last step goes on
    axes.hlines(steps[-1].tokens_per_s, 1e3 * steps[-1].token_p99_s, right, linewidth=1.8, color="tab:blue")
    axes.set_xlim(right=right)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("token latency, 99th percentile over requests (ms, log scale)", fontsize=12)
    axes.set_ylabel("tokens per second, all requests together", fontsize=12)
    axes.set_title(conditions, fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    write_picture(path, figure)
