"""The tables of `dvi bench step`. Knows its figures; measures nothing."""

from __future__ import annotations

from typing import Any

from dvi.bench.round_parts import ARITHMETIC
from dvi.bench.tables import ReportTable

GB, MB = 1e9, 1e6


def report_tables(report: dict[str, Any]) -> list[ReportTable]:
    """Speeds; passes in plain steps, and memory; a round's parts."""
    return [_speeds(report), _passes(report), _memory(report), _parts(report)]


def _speeds(report: dict[str, Any]) -> ReportTable:
    settings, law, machine = report["settings"], report["law"], report["machine"]
    names = {
        "plain": f"plain, {report['dtype']}", "exact": "plain, exact",
        "scripted": f"speculative, T = {settings['num_draft_tokens']}, acceptance {settings['acceptance']:g}",
    }
    ratios = {}  # by the arm that is not plain
    for pair, value in report["speed_ratios"].items():
        over, under = pair.split(" / ")
        ratios[under if over == "plain" else over] = pair, value
    rows = [
        [
            names.get(name, f"transformers generate, {name.removeprefix('hf ')}"), f"{1 / token_s:.1f}",
            f"{1e3 * token_s:.2f}", "{} {:.2f}".format(*ratios[name]) if name in ratios else "",
        ]
        for name, token_s in report["token_s"].items()
    ]  # fmt: skip
    rows += [[names[name], "n/a", "", reason] for name, reason in report["na_reasons"].items()]
    predicted_s = law["predicted_token_s"]
    rows.append([
        "  by the speed law", f"{1 / predicted_s:.1f}", f"{1e3 * predicted_s:.2f}",
        f"measured / law {law['measured_over_predicted']:.2f}",
    ])  # fmt: skip
    return ReportTable(
        report["model"], ["decoding, without the prompt", "tokens/s", "ms a token", "ratio of speeds"], rows,
        f"{machine['cpu']}, threads: {machine['threads']}, batch 1, greedy, {settings['max_new_tokens']} tokens, "
        f"{settings['repetitions']} repetitions, medians. MAT by the script {law['mean_accepted_tokens']:.2f}.",
    )


def _passes(report: dict[str, Any]) -> ReportTable:
    pass_s = report["pass_s"]
    step_s = pass_s["v(1)"]
    rows = [
        [name, f"{1e3 * seconds:.2f}", f"{seconds / step_s:.3f}"] for name, seconds in pass_s.items() if name != "copy"
    ]
    return ReportTable(
        "Passes", ["", "ms", "in plain steps"], rows,
        f"v(n): all of a round that verifies n positions but its draft steps; {report['context']} positions cached.",
    )


def _memory(report: dict[str, Any]) -> ReportTable:
    copy_rate = 2 * report["copied_bytes"] / report["pass_s"]["copy"]
    read_rate = report["weight_bytes"] / report["token_s"]["plain"]
    rows = [
        ["weights read a plain step, MB", f"{report['weight_bytes'] / MB:.0f}"],
        ["read by plain decoding, GB/s", f"{read_rate / GB:.1f}"],
        ["copied by the machine, read and written, GB/s", f"{copy_rate / GB:.1f}"],
        ["the one over the other", f"{read_rate / copy_rate:.2f}"],
        ["load, s", f"{report['load_s']:.1f}"],
        ["most memory, loaded and decoding, MB", f"{report['peak_bytes'] / MB:.0f}"],
        ["of that before loading, MB", f"{report['imported_bytes'] / MB:.0f}"],
    ]
    return ReportTable("Memory", ["", report["dtype"]], rows)


def _parts(report: dict[str, Any]) -> ReportTable:
    """Parts of a round in ms and, what is no arithmetic, in percent of a plain step."""
    parts_s, step_s = report["parts_s"], report["token_s"]["plain"]
    names = list(parts_s["plain"])
    besides_s = {
        arm: sum(seconds for part, seconds in found.items() if part not in ARITHMETIC)
        for arm, found in parts_s.items()
    }

    def cells(seconds: float, *, in_steps: bool) -> list[str]:
        return [f"{1e3 * seconds:.3f}", f"{seconds / step_s:.1%}" if in_steps else ""]

    rows = [
        [part, *(cell for arm in parts_s for cell in cells(parts_s[arm][part], in_steps=part not in ARITHMETIC))]
        for part in names
    ]
    rows.append(["all but arithmetic", *(cell for arm in parts_s for cell in cells(besides_s[arm], in_steps=True))])
    drafts = report["settings"]["num_draft_tokens"]
    return ReportTable(
        "A round by part", ["", "plain, ms", "of a step", f"T = {drafts}, ms", "of a step"], rows,
        "Beside a learner that stores and makes no step, and the goodput rule. In percent of a plain step.",
    )
