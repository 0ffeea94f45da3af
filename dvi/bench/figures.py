"""What a benchmark's answers say: the harness's own figures, and paired ones without its biases.

Pure functions over answer lines and the details beside them; knows no files, tables or pictures. The harness's
formulas are those of Spec-Bench's `evaluation/speed.py`, quirks included.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvi.bench.answers import Detail
from dvi.bench.questions import MT_BENCH, TASKS
from dvi.bench.statistics import Interval, median_interval
from dvi.records import RoundStats

Answer = Mapping[str, Any]

OVERALL = "overall"
HARNESS_TASKS = (*TASKS, OVERALL)
HARNESS_NAMES = ("tokens_per_s", "baseline_tokens_per_s", "speedup")


def is_of_task(category: str | None, task: str) -> bool:
    """Whether a question of this category counts for a task; every question counts for "overall"."""
    return task in (OVERALL, category) or (task == "mt_bench" and category in MT_BENCH)


# The harness's figures


@dataclass(frozen=True)
class HarnessFigures:
    """What the harness says of one task in one run; nan where the task has no questions.

    tokens_per_s           mean over questions of new tokens / seconds, all turns: a mean of rates, not total / total.
    baseline_tokens_per_s  the same of the baseline, its tokens counted in its text.
    speedup                tokens_per_s / baseline_tokens_per_s: a ratio of means, over questions that nobody pairs.
    accept_lengths         one entry per target forward of all questions. Their mean is the harness's MAT, in which a
                           question counts by its steps.
    """

    tokens_per_s: float
    baseline_tokens_per_s: float
    speedup: float
    accept_lengths: tuple[int, ...]

    @property
    def mean_accepted_tokens(self) -> float:
        return _mean(self.accept_lengths)


@dataclass(frozen=True)
class HarnessSummary:
    """Mean and standard deviation (ddof=1, None of one run) over runs; MAT over the entries of all runs together."""

    tokens_per_s: tuple[float, float | None]
    baseline_tokens_per_s: tuple[float, float | None]
    speedup: tuple[float, float | None]
    mean_accepted_tokens: float


def text_token_counter(tokenizer: Callable[[str], Any]) -> Callable[[str], int]:
    """Tokens of a baseline's text as the harness counts them: less one, for the BOS that not every tokenizer adds."""
    return functools.cache(lambda text: len(tokenizer(text).input_ids) - 1)


def harness_figures(
    answers: Iterable[Answer], baseline: Iterable[Answer], *, task: str, count_tokens: Callable[[str], int]
) -> HarnessFigures:
    """The figures of one task in one run. Only the first choice of an answer is read.

    count_tokens: see `text_token_counter`; the baseline's own `new_tokens` are not read.
    """
    rates, accept_lengths = [], []
    for choice in _first_choices(answers, task):
        rates.append(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
        accept_lengths += choice["accept_lengths"]
    baseline_rates = [
        sum(map(count_tokens, choice["turns"])) / sum(choice["wall_time"]) for choice in _first_choices(baseline, task)
    ]
    mean, baseline_mean = _mean(rates), _mean(baseline_rates)
    with np.errstate(divide="ignore", invalid="ignore"):  # a baseline of empty texts
        speedup = float(np.divide(mean, baseline_mean))
    return HarnessFigures(mean, baseline_mean, speedup, tuple(accept_lengths))


def harness_summary(runs: list[HarnessFigures]) -> HarnessSummary:
    """One task's figures over all runs."""
    over_runs = {}
    for name in HARNESS_NAMES:
        values = [getattr(run, name) for run in runs]
        over_runs[name] = (_mean(values), float(np.std(values, ddof=1)) if len(values) > 1 else None)
    return HarnessSummary(
        **over_runs, mean_accepted_tokens=_mean([length for run in runs for length in run.accept_lengths])
    )


def _first_choices(answers: Iterable[Answer], task: str) -> list[dict[str, Any]]:
    return [answer["choices"][0] for answer in answers if is_of_task(answer["category"], task)]


def _mean(values: Iterable[float]) -> float:
    """As numpy adds them, for equality with the harness; nan of none, without numpy's warning."""
    values = list(values)
    return float(np.mean(values)) if values else math.nan


# Ours


@dataclass(frozen=True)
class Served:
    """One arm's way through one question in one repetition. answer: its line, None where it failed.

    category: None where no arm ever answered the question; it then counts for no task but "overall".
    """

    detail: Detail
    answer: Answer | None
    category: str | None

    @property
    def tokens_per_s(self) -> float:
        """New tokens by their ids, of all turns, over the seconds of all turns."""
        return sum(map(len, self.detail.token_ids)) / sum(self.answer["choices"][0]["wall_time"])


ArmRun = dict[int, Served]  # one repetition of an arm: by question id, in the order in which it answered


@dataclass(frozen=True)
class Mismatch:
    """The first token of one question that differs from the baseline's.

    turn, position  0-based, the position among the turn's new tokens.
    gap             the model's top-1 minus its top-2 logit there; None where the run measured none.
    """

    repetition: int
    question_id: int
    turn: int
    position: int
    gap: float | None


@dataclass(frozen=True)
class PairedSpeed:
    """An arm's tokens per second over the baseline's, on the same questions by the same count of token ids.

    interval       the median over questions, a question counting by its median over repetitions; None of no question.
    num_failed     questions left out because one of the two failed, in any repetition.
    num_differing  questions left out because their tokens differ from the baseline's, in any repetition.
    """

    interval: Interval | None
    num_failed: int
    num_differing: int


def find_mismatches(arm: list[ArmRun], baseline: list[ArmRun]) -> list[Mismatch]:
    """Every answer whose tokens differ from the baseline's in the same repetition, in the order of answering."""
    found = []
    for repetition, served, other in _pairs(arm, baseline):
        if served.answer is None or other.answer is None:
            continue
        place = _first_difference(served.detail.token_ids, other.detail.token_ids)
        if place is not None:
            measured = served.detail.divergence
            gap = measured.gap if measured is not None and (measured.turn, measured.position) == place else None
            found.append(Mismatch(repetition, served.detail.question_id, *place, gap))
    return found


def paired_speed(arm: list[ArmRun], baseline: list[ArmRun], *, task: str, must_match: bool) -> PairedSpeed:
    """The ratios of one task's questions. must_match: greedy decoding, so questions with other tokens are left out."""
    differing = {mismatch.question_id for mismatch in find_mismatches(arm, baseline)} if must_match else set()
    ratios: dict[int, list[float]] = {}
    failed = set()
    for _, served, other in _pairs(arm, baseline):
        question_id = served.detail.question_id
        if not is_of_task(served.category, task):
            continue
        ratios.setdefault(question_id, [])
        if served.answer is None or other.answer is None:
            failed.add(question_id)
        else:
            ratios[question_id].append(served.tokens_per_s / other.tokens_per_s)
    medians = [statistics.median(ratios[i]) for i in ratios if i not in failed and i not in differing]
    return PairedSpeed(median_interval(medians), len(failed), len((differing & ratios.keys()) - failed))


def round_counts(arm: list[ArmRun]) -> RoundStats | None:
    """The arm's rounds over all repetitions; None of a decoder that counts none, and where every answer failed."""
    total, has_counts = RoundStats(), False
    for run in arm:
        for detail in (served.detail for served in run.values()):
            if detail.error is None and detail.num_rounds is not None:
                has_counts = True
                total.add(RoundStats(
                    num_rounds=detail.num_rounds, num_drafted=detail.num_drafted, num_accepted=detail.num_accepted,
                    num_waived=detail.num_waived or 0,  # runs from before there were lossy arms have no count
                    committed_tokens=detail.num_accepted + detail.num_rounds,
                    drafted_per_depth=detail.drafted_per_depth, accepted_per_depth=detail.accepted_per_depth,
                ))  # fmt: skip
    return total if has_counts else None


def mean_accepted_drafts(counts: RoundStats | None, mean_accepted_tokens: float) -> float:
    """MAT without the bonus token: accepted drafts per round, from raw counts where there are any.

    Else one less than the mean of the answer's entries; a block that the end of a text cut counts only what was kept.
    """
    return counts.num_accepted / counts.num_rounds if counts is not None else mean_accepted_tokens - 1


def acceptance_over_traffic(run: ArmRun) -> list[tuple[int, float]]:
    """(questions served so far, accepted / drafted of the latest) for each question of a repetition with drafts."""
    details = [served.detail for served in run.values()]
    return [(n, d.num_accepted / d.num_drafted) for n, d in enumerate(details, start=1) if d.num_drafted]


def _pairs(arm: list[ArmRun], baseline: list[ArmRun]) -> Iterable[tuple[int, Served, Served]]:
    """(repetition, the arm's, the baseline's) of every question that both were asked in it; counted from 1."""
    for repetition, (run, other) in enumerate(zip(arm, baseline, strict=True), start=1):
        for question_id, served in run.items():
            if question_id in other:
                yield repetition, served, other[question_id]


def _first_difference(turns: list[list[int]], others: list[list[int]]) -> tuple[int, int] | None:
    """(turn, position) of the first token that differs; the end of the shorter text where one begins the other."""
    for turn, (ids, other_ids) in enumerate(zip(turns, others, strict=True)):
        if ids != other_ids:
            shortest = min(len(ids), len(other_ids))
            return turn, next((i for i in range(shortest) if ids[i] != other_ids[i]), shortest)
    return None
