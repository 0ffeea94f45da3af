"""A Spec-Bench run: every arm on every question, interleaved, repeated, in files that a second start goes on with.

Knows arms, questions and the files it leaves; decodes nothing and computes no figure. The harness that it follows:
hemingkx/Spec-Bench, evaluation/eval.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dvi.bench.answers import DETAILS_FILE, AnswerFile, DetailFile, answer_line
from dvi.bench.questions import TASKS, Conversation, Question, select, task_of
from dvi.bench.records import Arm, ArmPlan
from dvi.bench.timed_arm import ArmTimer, Outcome, first_difference
from dvi.decode.speculator import SelfSpeculator
from dvi.hardware import describe_machine
from dvi.progress import Stage, doing
from dvi.settings import SpecBenchSettings
from dvi.whole_files import write_whole

RUN_FILE = "run.json"
CONDITIONS = {
    "timed": "one call of an arm, prefill inside; tokenizing and detokenizing outside",
    "wall_time": "of a batch: its wall-clock time over its number of prompts, so that tokens / sum is throughput",
    "order": "repetition > question > arms, the arms' order turned for every other question",
    "seed": "100,000,000 repetition + 1,000,000 turn + id of the batch's first question, the same for every arm",
    "tokens": "through the first end token, at most max_new_tokens, by one counter for all arms",
}


@dataclass(frozen=True)
class ArmSummary:
    """Counts over all repetitions; tokens and seconds are of what was answered. num_diverged: greedy tokens differ."""

    num_answered: int
    num_failed: int
    num_diverged: int
    num_tokens: int
    wall_time_s: float


@dataclass(frozen=True)
class RunSummary:
    """A finished run. Arms that are n/a are not in `arms`."""

    folder: Path
    num_repetitions: int
    num_questions: int
    arms: dict[str, ArmSummary]


def run_spec_bench(
    plans: list[ArmPlan], questions: list[Question], conversation: Conversation, *, speculator: SelfSpeculator,
    folder: str | Path, settings: SpecBenchSettings, console: Console,
) -> RunSummary:
    """Asks every arm every question, `repetitions` times, and leaves in `folder`:

    run.json                               settings, machine, arms, prompt lengths
    run_{r}/model_answer/{model_id}.jsonl  answers of one arm, in the harness's format; r counts from 1
    run_{r}/details.jsonl                  one line per arm and question, see `Detail`

    The first arm that can run is the reference: greedy tokens of the others, but for lossy arms, are compared with its.
    An arm that raises has failed at that question, which is recorded and not tried again. A second start in the folder
    goes on after the last question that all arms had finished; with a learning arm, whose state is gone, at the
    repetition's beginning.

    speculator: the model that all arms share, for its end tokens, context and device, and for logit gaps.
    Raises ValueError for plans that cannot make a run, and for a folder that holds a run of other settings.
    """
    run = _Run(plans, select(questions, settings.limit), conversation, speculator, Path(folder), settings)
    run.open()
    num_answers = settings.repetitions * run.num_answers
    console.print(
        f"{num_answers:,} answers to come: {settings.repetitions} runs of {len(run.questions)} questions to "
        f"{', '.join(plan.name for plan in run.running)}, each warmed up {settings.warmups} times; how long they take "
        "shows after the first", soft_wrap=True,
    )  # fmt: skip
    with doing("spec-bench", total=num_answers, noun="answers") as stage:
        for repetition in range(1, settings.repetitions + 1):
            run.repeat(repetition, console, stage)
            run.write_prompt_lengths()
    return run.summary()


class _Run:
    """What is asked, of whom, and where it is written."""

    def __init__(
        self, plans: list[ArmPlan], questions: list[Question], conversation: Conversation, speculator: SelfSpeculator,
        folder: Path, settings: SpecBenchSettings,
    ) -> None:
        names = [plan.name for plan in plans]
        for name in names:
            if not re.fullmatch("[a-z0-9_]+", name) or names.count(name) > 1:
                raise ValueError(f"arm names must be unique and of [a-z0-9_], got {name!r} among {', '.join(names)}")
        self.plans = [_for_batches(plan, settings.batch_size) for plan in plans]
        self.running = [plan for plan in self.plans if plan.na_reason is None]
        if not self.running:
            reasons = "; ".join(f"{plan.name}: {plan.na_reason}" for plan in self.plans)
            raise ValueError(f"a run needs an arm that can run here, got {reasons or 'no arm'}")
        self.questions, self.template, self.split = questions, conversation.template, speculator.split
        self.folder, self.settings = folder, settings
        self.timer = ArmTimer(speculator, conversation, max_new_tokens=settings.max_new_tokens)
        self.dtype = str(speculator.split.dtype).removeprefix("torch.")

    def open(self) -> None:
        """Writes run.json, or checks that the one there describes the same run."""
        path, description = self.folder / RUN_FILE, self._description()
        if not path.exists():
            _write_json(path, description)
            return
        old, new = (_identity(found) for found in (_read_json(path), json.loads(json.dumps(description))))
        for key in new:
            if old.get(key) != new[key]:
                raise ValueError(
                    f"{self.folder} holds a run with {key} {old.get(key)!r}, asked for {new[key]!r}; give the same "
                    "to go on with it, or another folder"
                )

    @property
    def num_answers(self) -> int:
        """Of a repetition, those that warm up included."""
        num_warming = self.settings.warmups * min(self.settings.batch_size, len(self.questions))
        return len(self.running) * (len(self.questions) + num_warming)

    def repeat(self, repetition: int, console: Console, stage: Stage) -> None:
        """Asks what is unfinished, and tells the stage of every answer and of each arm's tokens per second."""
        size = self.settings.batch_size
        chunks = [self.questions[i : i + size] for i in range(0, len(self.questions), size)]
        answers, details = self._files(repetition)
        finished_ids = self._finished_ids(details, chunks)
        if not finished_ids >= {q.question_id for q in self.questions} and self._must_restart(details):
            console.print(f"run {repetition} was interrupted and an arm of it learns: it begins again")
            finished_ids = set()
        details.keep(finished_ids)
        for file in answers.values():
            file.finish(finished_ids)
        rest = [(i, chunk) for i, chunk in enumerate(chunks) if chunk[0].question_id not in finished_ids]
        if not rest:
            stage.skip(self.num_answers)
            return
        stage.skip(len(self.running) * len(finished_ids))
        stage.name(f"run {repetition}, warming up")
        arms = {plan.name: self._warm(plan, chunks[0], repetition, stage) for plan in self.running}
        stage.name(f"run {repetition}")
        num_tokens, wall_time_s, asked = Counter(), Counter(), {}
        for index, chunk in rest:
            order = list(arms) if (repetition + index) % 2 else list(arms)[::-1]
            for name in order:
                asked[name] = self._ask(arms[name], chunk, repetition)
                stage.advance(len(chunk))
            self._write(asked, answers, details)
            for name in arms:
                for outcome in asked[name]:
                    if outcome.error is not None:
                        where = f"question {outcome.question.question_id}, {name} failed"
                        console.print(f"{where}: {outcome.error}", markup=False)
                    num_tokens[name] += sum(turn.num_tokens for turn in outcome.turns)
                    wall_time_s[name] += sum(turn.wall_time_s for turn in outcome.turns)
            speeds = (f"{name} {num_tokens[name] / wall_time_s[name]:.0f}" for name in arms if wall_time_s[name])
            stage.advance(0, figures=f"tokens/s: {', '.join(speeds)}")
        for file in answers.values():
            file.finish()

    def write_prompt_lengths(self) -> None:
        """Adds to run.json how long the reference's prompts were in the first repetition, and what was cut."""
        _, details = self._files(1)
        tasks = {question.question_id: task_of(question.category) for question in self.questions}
        lengths: dict[str, list[int]] = {task: [] for task in TASKS}
        cuts = []
        for detail in details.read():
            if detail.arm == self.running[0].name:
                lengths[tasks[detail.question_id]] += detail.prompt_tokens
                cuts += detail.cut_tokens
        prompts = {
            "per_task": {task: {"mean": statistics.fmean(n), "max": max(n)} for task, n in lengths.items() if n},
            "num_prompts": len(cuts), "num_cut": sum(cut > 0 for cut in cuts), "tokens_cut": sum(cuts),
        }
        _write_json(self.folder / RUN_FILE, _read_json(self.folder / RUN_FILE) | {"prompts": prompts})

    def summary(self) -> RunSummary:
        choices: dict[str, list] = {plan.name: [] for plan in self.running}
        details = []
        for repetition in range(1, self.settings.repetitions + 1):
            answers, detail_file = self._files(repetition)
            details += detail_file.read()
            for name, file in answers.items():
                choices[name] += [line["choices"][0] for line in file.read()]
        arms = {
            name: ArmSummary(
                num_answered=len(found),
                num_failed=sum(detail.error is not None for detail in details if detail.arm == name),
                num_diverged=sum(detail.divergence is not None for detail in details if detail.arm == name),
                num_tokens=sum(sum(choice["new_tokens"]) for choice in found),
                wall_time_s=sum(sum(choice["wall_time"]) for choice in found),
            )
            for name, found in choices.items()
        }
        return RunSummary(self.folder, self.settings.repetitions, len(self.questions), arms)

    def _description(self) -> dict[str, Any]:
        """The content of run.json before anything is measured."""
        asked = json.dumps([[q.question_id, q.category, q.turns] for q in self.questions])
        is_compared = self.settings.is_greedy
        return {
            "settings": _asked(self.settings), "template": self.template, "dtype": self.dtype,
            "context": self.timer.context, "room": self.timer.room, "reference": self.running[0].name,
            "arms": [
                {"name": plan.name, "title": plan.title, "model_id": self._model_id(plan.name),
                 "na_reason": plan.na_reason, "is_learning": plan.is_learning, "is_lossy": plan.is_lossy,
                 "facts": plan.facts}
                for plan in self.plans
            ],
            "questions": {
                "num": len(self.questions), "sha256": hashlib.sha256(asked.encode()).hexdigest(),
                "per_task": dict(Counter(task_of(question.category) for question in self.questions)),
            },
            "machine": describe_machine(self.split.device),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "conditions": CONDITIONS | {
                "comparison": "token ids of every arm with the reference's" if is_compared else "none under sampling"
            },
            "prompts": None,
        }  # fmt: skip

    def _model_id(self, arm: str) -> str:
        return f"{Path(self.settings.model).name}-dvi-{arm}-{self.dtype}-temp-{self.settings.temperature}"

    def _files(self, repetition: int) -> tuple[dict[str, AnswerFile], DetailFile]:
        folder = self.folder / f"run_{repetition}"
        answers = {}
        for plan in self.running:
            path = folder / "model_answer" / f"{self._model_id(plan.name)}.jsonl"
            answers[plan.name] = AnswerFile(path, max_new_tokens=self.settings.max_new_tokens)
        return answers, DetailFile(folder / DETAILS_FILE)

    def _finished_ids(self, details: DetailFile, chunks: list[list[Question]]) -> set[int]:
        """Questions of the batches of which every arm's every line is there."""
        num_lines = Counter(detail.question_id for detail in details.read())
        batches = ({question.question_id for question in chunk} for chunk in chunks)
        finished = (ids for ids in batches if all(num_lines[i] == len(self.running) for i in ids))
        return set().union(*finished)

    def _must_restart(self, details: DetailFile) -> bool:
        return any(plan.is_learning for plan in self.running) and bool(details.read())

    def _warm(self, plan: ArmPlan, chunk: list[Question], repetition: int, stage: Stage) -> Arm:
        """An arm that has run before, but learnt from nothing."""
        arm = plan.build()
        for _ in range(self.settings.warmups):
            self._ask(arm, chunk, repetition)
            stage.advance(len(chunk))
        return plan.build() if plan.is_learning and self.settings.warmups else arm

    def _ask(self, arm: Arm, chunk: list[Question], repetition: int) -> list[Outcome]:
        return self.timer.ask(arm, chunk, seed=10**8 * repetition + chunk[0].question_id)

    def _write(
        self, asked: dict[str, list[Outcome]], answers: dict[str, AnswerFile], details: DetailFile
    ) -> None:
        """Answers first: a question whose details are all there is finished."""
        for name, file in answers.items():
            file.append([
                answer_line(outcome.question, self._model_id(name), outcome.turns)
                for outcome in asked[name] if outcome.error is None
            ])  # fmt: skip
        lines = []
        for plan in self.running:
            is_compared = self.settings.is_greedy and not plan.is_lossy
            for plain, outcome in zip(asked[self.running[0].name], asked[plan.name], strict=True):
                difference = first_difference(self.split, plain, outcome) if is_compared else None
                lines.append(outcome.detail(plan.name, divergence=difference))
        details.append(lines)


def _for_batches(plan: ArmPlan, batch_size: int) -> ArmPlan:
    if plan.na_reason is None and plan.batch_one and batch_size > 1:
        return replace(plan, build=None, na_reason=f"decodes one prompt at a time, batch_size is {batch_size}")
    return plan


def _asked(settings: SpecBenchSettings) -> dict[str, Any]:
    """The settings that run.json keeps, by the names that they have there."""
    return {
        "model": settings.model, "adapter": settings.adapter and str(settings.adapter),
        "num_draft_tokens": settings.num_draft_tokens, "policy": settings.policy, "limit_per_task": settings.limit,
        "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature,
        "batch_size": settings.batch_size, "repetitions": settings.repetitions, "warmups": settings.warmups,
    }


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for results to stand in one folder; titles and the hour may differ."""
    machine = {name: value for name, value in description["machine"].items() if name not in ("date", "load")}
    arms = {f"arm {arm['name']}": [arm["facts"], arm["na_reason"]] for arm in description["arms"]}
    return description["settings"] | machine | arms | {
        "template": description["template"], "dtype": description["dtype"],
        "questions": description["questions"]["sha256"], "arms": [arm["name"] for arm in description["arms"]],
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")
