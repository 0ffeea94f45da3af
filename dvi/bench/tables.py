"""The tables of a Spec-Bench report, for a terminal and as Markdown alike.

Knows the content of report.json; computes nothing. What is not there is shown as n/a.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dvi.bench.figures import OVERALL

SHORT = {  # column heads
    "mt_bench": "MT-bench", "translation": "transl.", "summarization": "summar.", "qa": "QA", "math_reasoning": "math",
    "rag": "RAG", OVERALL: OVERALL,
}  # fmt: skip
MISSING = "n/a"
VOID = "VOID"

NOTES = """\
**The harness's figures** follow Spec-Bench's `evaluation/speed.py`. A question's speed is its new tokens over its
seconds, prefill included; a task's is the mean of these rates, and its speed-up the ratio of the two means. "overall"
is over all questions, not over tasks. Their known biases:

- The method's tokens are counted by ids, with the end token and whatever else it was logged with. The baseline's are
  counted in its text, which has no end token, less one a turn for the BOS. A tokenizer that adds no BOS thus takes one
  more token a turn from the baseline. Both inflate the speed-up. The baseline's own row shows by how much: against
  itself, it would be 1.
- Questions are not paired: an arm that failed at slow questions looks faster.
- Mean accepted tokens (MAT) are a mean over verify passes, so long answers dominate.

**The paired figures** have none of that: per question, the ratio of tokens per second, token ids counted on both
sides, the median over repetitions; of these the median over questions, with a 95 % bootstrap interval over questions.
Questions that one of the two failed, or whose greedy tokens differ, are left out and counted. An arm with any such
difference is void: it did other work. The gap is the model's top-1 minus its top-2 logit where the texts part: near 0,
rounding could choose either. Questions decoded in one batch share its clock, and the interval is then too narrow.
An arm whose name ends in `_lossy` gives other text by design: nothing is compared or left out, and its ratio is one of
speeds over different answers.

**MAT** counts the recovered or bonus token, so plain decoding has 1.00. Without it, it is accepted drafts per round:
from counts of rounds where an arm has them, else one less than MAT. Acceptance at a depth is given that the depth was
reached."""


@dataclass(frozen=True)
class ReportTable:
    """A title, columns, rows of text, and a line on what is shown. is_text: all columns are words, none are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    is_text: bool = False

    def for_terminal(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            is_figure = index > 0 and not self.is_text
            table.add_column(column, justify="right" if is_figure else "left", no_wrap=index == 0, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))  # as it is: an error message may hold [brackets]
        return Group(Text(f"\n{self.title}", style="bold"), *([Text(self.note, style="dim")] * bool(self.note)), table)

    def as_markdown(self) -> str:
        side = "---" if self.is_text else "---:"
        lines = [self.columns, ["---", *[side] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)
        return "\n\n".join(part for part in (f"## {self.title}", self.note, body) if part)


def conditions_line(report: dict[str, Any]) -> str:
    """Model, decoding and machine in one line."""
    conditions = report["conditions"]
    settings, machine = conditions["settings"], conditions["machine"]
    decoding = "greedy" if report["is_greedy"] else f"temperature {settings['temperature']}"
    device = machine["gpu"] or f"{machine['cpu']}, threads: {machine['threads']}"
    return (
        f"{Path(settings['model']).name} {conditions['dtype']}, {decoding}, batch {settings['batch_size']}, "
        f"at most {settings['max_new_tokens']} new tokens, {device}"
    )


def report_tables(report: dict[str, Any]) -> list[ReportTable]:
    """All tables of a report, in their order; those without rows are left out."""
    ran = [arm for arm in report["arms"] if arm["na_reason"] is None]
    others = [arm for arm in ran if arm["name"] != report["baseline"]]
    tables = [
        _paired(report, others), _harness(report, ran), _harness_speeds(report, ran), _acceptance(ran),
        _validity(report, ran), _arms(report), _prompts(report), _unmodified(report), _published(report),
        _conditions(report),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _paired(report: dict[str, Any], arms: list[dict[str, Any]]) -> ReportTable:
    rows = []
    for arm in arms:
        overall = arm["paired"][OVERALL]
        rows.append([
            _name(arm), *(_interval(arm["paired"][task]["interval"]) for task in report["tasks"]),
            str(overall["interval"]["num_samples"] if overall["interval"] else 0),
            str(overall["num_failed"] + overall["num_differing"]),
        ])
    heads = [SHORT[task] for task in report["tasks"]]
    return ReportTable(
        f"Speed over {report['baseline']}, paired", ["arm", *heads, "n", "out"], rows,
        "Median over questions of the ratio of tokens per second, and its 95 % interval; n questions, out: left out.",
    )


def _harness(report: dict[str, Any], arms: list[dict[str, Any]]) -> ReportTable:
    rows = [
        [_name(arm), *(_mean(arm["harness"][task]["speedup"], "x") for task in report["tasks"]),
         _number(arm["mean_accepted_tokens"])]
        for arm in arms
    ]  # fmt: skip
    return ReportTable(
        f"Speed-up over {report['baseline']} as the harness computes it",
        ["arm", *(SHORT[task] for task in report["tasks"]), "MAT"], rows,
        "Ratio of mean rates, mean ± standard deviation over runs. Its known biases: see report.md, at the end.",
    )


def _harness_speeds(report: dict[str, Any], arms: list[dict[str, Any]]) -> ReportTable:
    rows = [
        [_name(arm), *(_mean(arm["harness"][task]["tokens_per_s"]) for task in report["tasks"])] for arm in arms
    ]
    baseline = next(arm for arm in arms if arm["name"] == report["baseline"])
    in_text = (_mean(baseline["harness"][task]["baseline_tokens_per_s"]) for task in report["tasks"])
    rows.append([f"{report['baseline']}, as text", *in_text])
    return ReportTable(
        "Tokens per second as the harness computes them", ["arm", *(SHORT[task] for task in report["tasks"])], rows,
        "Mean over questions, prefill included; mean ± standard deviation over runs. The harness counts the baseline's "
        "tokens as text.",
    )


def _acceptance(arms: list[dict[str, Any]]) -> ReportTable:
    num_depths = max((len(arm["drafted_per_depth"] or ()) for arm in arms), default=0)
    has_lossy = any(arm["is_lossy"] for arm in arms)
    rows = []
    for arm in arms:
        drafted, accepted = arm["drafted_per_depth"] or [], arm["accepted_per_depth"] or []
        depths = [_number(a / d if d else None) for a, d in zip(accepted, drafted, strict=True)]
        rows.append([
            _name(arm), _number(arm["mean_accepted_tokens"]), _number(arm["mean_accepted_drafts"]),
            _number(arm["acceptance"]), *([_number(arm["waived_share"])] if has_lossy else []), *depths,
            *[MISSING] * (num_depths - len(depths)),
        ])
    depth_columns = [f"depth {depth}" for depth in range(1, num_depths + 1)]
    return ReportTable(
        "Accepted tokens",
        ["arm", "MAT", "without bonus", "acceptance", *(["waived"] if has_lossy else []), *depth_columns], rows,
        "MAT: tokens per verify pass. Acceptance: accepted / drafted; at a depth, given that it was reached."
        + (" Waived: of the accepted, those that a lossy rule alone let pass." if has_lossy else ""),
    )


def _validity(report: dict[str, Any], arms: list[dict[str, Any]]) -> ReportTable:
    rows = []
    for arm in arms:
        first, error = arm["first_mismatch"], arm["first_error"]
        where = "-" if first is None else (
            f"run {first['repetition']}, question {first['question_id']}, turn {first['turn'] + 1}, "
            f"token {first['position'] + 1}"
        )
        gap = "-" if first is None else MISSING if first["gap"] is None else f"{first['gap']:.1e}"
        rows.append([
            _name(arm), str(arm["num_answered"]), str(arm["num_failed"]),
            _differing(arm, report["is_greedy"]), where, gap,
            "-" if error is None else f"question {error['question_id']}: {error['error']}",
        ])
    return ReportTable(
        f"Are the answers {report['baseline']}'s?",
        ["arm", "answered", "failed", "differ", "first difference", "gap", "first failure"], rows,
        "Answers of all repetitions. gap: top-1 minus top-2 logit at the first difference.",
    )


def _arms(report: dict[str, Any]) -> ReportTable:
    rows = []
    for arm in report["arms"]:
        facts = [f"{MISSING}: {arm['na_reason']}"] * (arm["na_reason"] is not None)
        facts += [f"{name} {value}" for name, value in arm["facts"].items()]
        rows.append([arm["name"], arm["title"], ", ".join(facts)])
    return ReportTable("Arms", ["arm", "what it is", "facts"], rows, is_text=True)


def _prompts(report: dict[str, Any]) -> ReportTable:
    rows = [
        [task, str(p["num_prompts"]), f"{p['mean']:.0f}", str(p["max"]),
         MISSING if p["num_beyond_training"] is None else str(p["num_beyond_training"]),
         str(p["num_cut"]), str(p["tokens_cut"])]
        for task, p in report["prompts"].items()
    ]  # fmt: skip
    length = report["training_length"]
    return ReportTable(
        "Prompts",
        ["task", "prompts", "mean tokens", "longest", "beyond training", "cut", "tokens cut"], rows,
        f"The model's context is {report['context']} tokens; its training texts had "
        f"{'a length that was not given' if length is None else f'{length} tokens'}. Cut prompts lost their beginning.",
    )


def _unmodified(report: dict[str, Any]) -> ReportTable:
    rows = [
        [name, task, _number(found["speedup"]), _number(found["our_speedup"]),
         MISSING if found["largest_difference"] is None else f"{found['largest_difference']:.1e}"]
        for name, tasks in (report["unmodified_harness"] or {}).items() for task, found in tasks.items()
    ]  # fmt: skip
    return ReportTable(
        "The unmodified speed.py on the same files", ["arm", "task", "its speed-up", "ours", "difference"], rows,
        "Difference: the largest relative one of speeds, speed-up and MAT in any run.",
    )


def _published(report: dict[str, Any]) -> ReportTable:
    published = report["published"]
    rows = [
        [row["method"], row["device"], f"{row['speedup']:.2f}x", f"{row['mean_accepted_tokens']:.2f}"]
        for row in published["rows"]
    ]
    return ReportTable(
        "Published leaderboard: another machine, fp16, Vicuna-7B: not comparable, for orientation",
        ["method", "device", "overall", "MAT"], rows, f"{published['conditions']}. Source: {published['source']}.",
    )


def _conditions(report: dict[str, Any]) -> ReportTable:
    conditions = report["conditions"]
    served = ", ".join(f"{count} of {report['num_questions']}" for count in report["num_served"])
    facts = {"command": conditions["command"], "questions answered, by run": served,
             "template": conditions["template"], "dtype": conditions["dtype"]}  # fmt: skip
    for group in ("settings", "machine", "conditions"):
        facts |= conditions[group]
    rows = [[name, MISSING if value is None else str(value)] for name, value in facts.items()]
    return ReportTable("Conditions", ["what", "value"], rows, is_text=True)


def _differing(arm: dict[str, Any], is_greedy: bool) -> str:
    if arm["is_lossy"]:
        return "lossy: may differ"
    return str(arm["num_differing"]) if is_greedy else "not compared"


def _name(arm: dict[str, Any]) -> str:
    return f"{arm['name']} {VOID}" if arm["is_void"] else arm["name"]


def _interval(interval: dict[str, float] | None) -> str:
    return MISSING if interval is None else f"{interval['value']:.2f}\n{interval['low']:.2f}-{interval['high']:.2f}"


def _mean(found: dict[str, float | None], unit: str = "") -> str:
    if found["mean"] is None:
        return MISSING
    mean, std = found["mean"], found["std"]
    decimals = 1 if mean >= 100 else 2
    return f"{mean:.{decimals}f}{unit}" + ("" if std is None else f"\n± {std:.{decimals}f}")


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", "<br>")
