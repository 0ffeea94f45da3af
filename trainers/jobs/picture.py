"""The picture of a run: what it drafted and how fast it served while it learnt, between two measurements.

Knows a run's events by name, two measurements and matplotlib; computes ratios of counts, and means for the eye.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dvi.telemetry import running_mean
from dvi.whole_files import write_picture
from trainers.jobs.evaluation import Measurement

MARGIN = 0.14  # of the traffic's width: the shaded fields of the measurements before it and after it
DRAFTS, SPEED, WITH_LEARNING = "tab:blue", "tab:green", "tab:gray"


def plot_run(
    events: Iterable[Mapping[str, Any]], path: str | Path, *, title: str = "", before: Measurement | None = None,
    after: Measurement | None = None,
) -> None:
    """Writes a PNG over the tokens generated so far: mean accepted tokens above, speed against plain decoding below.

    Above, dots are requests of the traffic that drafted, pale lines their mean; the strong line is the drafter of each
    moment on the held-out requests ("held_out" events). Below, the traffic's speed with the time for learning taken
    off and with it, over plain decoding in the same batch. The shaded fields hold what was measured before and after.
    Raises ValueError when there is no request to draw.
    """
    events = list(events)
    requests = [event for event in events if event["event"] == "request"]
    if not requests:
        raise ValueError('a picture needs at least 1 event "request", got 0; decode some traffic first')

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A bare Figure and not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize=13)
    _draw_drafts(upper, requests, [event for event in events if event["event"] == "held_out"])
    _draw_speed(lower, requests)
    width = requests[-1]["tokens_seen"]
    for measurement, edge, side, word in ((before, 0, -1, "before"), (after, width, 1, "after")):
        if measurement is not None:
            _draw_measurement(upper, measurement.mean_accepted_tokens, edge, side * MARGIN * width, word, "{:.2f}")
            _draw_measurement(lower, measurement.speed_up, edge, side * MARGIN * width, word, "{:.2f}x")
    upper.set_ylim(1, max(upper.get_ylim()[1], 1.5))  # a verify pass always yields one token
    lower.set_ylim(0, max(lower.get_ylim()[1], 1.25))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(loc="lower right", fontsize=9)
    lower.set_xlabel("tokens generated while learning", fontsize=11)
    write_picture(Path(path), figure)


def _draw_drafts(axes: Any, requests: list[Mapping[str, Any]], held_out: list[Mapping[str, Any]]) -> None:
    axes.set_ylabel("mean accepted tokens\n(per verify pass)", fontsize=11)
    drafting = [r for r in requests if r["drafted"]]
    if drafting:
        tokens = [r["tokens_seen"] for r in drafting]
        values = [r["mean_accepted_tokens"] for r in drafting]
        axes.plot(tokens, values, ".", color=DRAFTS, alpha=0.2)
        axes.plot(tokens, running_mean(values, _window(drafting)), color=DRAFTS, alpha=0.5, label="traffic")
    if held_out:
        axes.plot(
            [e["tokens_seen"] for e in held_out], [e["mean_accepted_tokens"] for e in held_out], "o-", color="tab:red",
            markersize=3, label=f"held-out requests, {held_out[-1]['num_draft_tokens']} drafts a round",
        )


def _draw_speed(axes: Any, requests: list[Mapping[str, Any]]) -> None:
    axes.set_ylabel("speed against\nplain decoding", fontsize=11)
    axes.axhline(1, color="black", linewidth=1)
    for with_learning, color, label in (
        (False, SPEED, "decoding alone"), (True, WITH_LEARNING, "with the time spent learning"),
    ):
        tokens, ratios = speed_ratios(requests, with_learning=with_learning, window=_window(requests))
        if ratios:
            axes.plot(tokens, ratios, color=color, label=label)


def speed_ratios(
    requests: list[Mapping[str, Any]], *, with_learning: bool, window: int
) -> tuple[list[int], list[float]]:
    """(tokens seen, speed over plain decoding) of the last `window` requests, at each from the window-th on.

    Decoding time is serving's without prefills, and without learning unless it is wanted; plain decoding's speed is the
    newest probe's at that moment, and where there was none the first one's.
    """
    plain = [r.get("plain_tokens_per_s") for r in requests]  # a warm-up serves nobody and has none
    known = next((speed for speed in plain if speed), None)
    tokens, ratios = [], []
    if known is None:
        return tokens, ratios
    for index in range(window, len(requests)):
        first, last = requests[index - window], requests[index]
        known = plain[index] or known
        seconds = last["serving_s"] - first["serving_s"]
        seconds -= sum(r["prefill_s"] for r in requests[index - window + 1 : index + 1])
        if not with_learning:
            seconds -= last["train_s"] - first["train_s"]
        if seconds > 0:
            tokens.append(last["tokens_seen"])
            ratios.append((last["tokens_seen"] - first["tokens_seen"]) / seconds / known)
    return tokens, ratios


def _window(requests: list) -> int:
    return max(5, len(requests) // 8)


def _draw_measurement(axes: Any, value: float, edge: float, width: float, word: str, form: str) -> None:
    axes.axvspan(*sorted((edge, edge + width)), color="gold", alpha=0.15, linewidth=0)
    axes.plot([edge, edge + width], [value, value], color="tab:red", linewidth=3)
    axes.annotate(
        f"{word}: {form.format(value)}", (edge + width / 2, value), xytext=(0, 6), textcoords="offset points",
        ha="center", fontsize=10, fontweight="bold",
    )
