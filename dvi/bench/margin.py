"""Lossy verify rules beside the strict one: the same questions, drafter and process, arms in turns.

Knows speculators, rules, questions and the folder of a run; `dvi.bench.margin_report` makes figures of it. The clock
runs while an arm decodes, prefill apart: answers differ in length, and a ratio must not follow how long a prompt was.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dvi.bench.arms import ArmOptions, OurArm, plans_of_ours
from dvi.bench.margin_quality import ANSWER_MARK, final_number, negative_log_likelihood
from dvi.bench.margin_report import RESULTS_FILE, Line, make_report
from dvi.bench.questions import Conversation, Question, load_questions, select
from dvi.bench.records import ArmAnswer, written
from dvi.decode.speculator import SelfSpeculator
from dvi.decode.verification import MarginRule, StrictRule, TypicalRule, VerifyRule
from dvi.hardware import describe_machine
from dvi.progress import Stage, doing, each
from dvi.settings import MarginSettings
from dvi.whole_files import write_whole

SCORED_TASK = "math_reasoning"  # GSM8K questions, whose references end in a number
CONDITIONS = {
    "timed": "decoding, prefill apart; seconds of an arm's rounds for one answer",
    "order": "repetition > question > arms, the arms' order turned for every other question",
    "seed": "100,000,000 repetition + id of the question, the same for every arm",
    "perplexity": "of the answers under the model at temperature 1, by its own plain forward over prompt and answer",
}


def check_margin(settings: MarginSettings) -> None:
    """Raises ValueError for settings that cannot make a run."""
    for name, least in (("limit", 0), ("repetitions", 1), ("num_threads", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be >= {least}, got {getattr(settings, name)}")
    thetas = settings.thetas
    if len(set(thetas)) < len(thetas) or not rules_of(settings)[1:]:
        raise ValueError(f"thetas must differ, and there must be one or typical, got {thetas}; try 0.95,0.9")
    _options(settings, StrictRule())  # checks the others


def rules_of(settings: MarginSettings) -> list[VerifyRule]:
    """The strict rule and then the lossy ones, the gentlest first."""
    thetas = sorted(settings.thetas, reverse=True)
    return [StrictRule(), *(MarginRule(theta) for theta in thetas), *([TypicalRule()] if settings.typical else [])]


def _options(settings: MarginSettings, rule: VerifyRule) -> ArmOptions:
    return ArmOptions(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        num_draft_tokens=settings.num_draft_tokens, rule=rule,
    )


def bench_margin(settings: MarginSettings, folder: Path, *, console: Console) -> dict[str, Any]:
    """`run_margin` with the speculator that the settings name. Raises ValueError where they cannot make a run."""
    check_margin(settings)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    speculator = SelfSpeculator.from_pretrained(settings.model, adapter=settings.adapter)
    return run_margin(speculator, settings, folder, console=console)


def run_margin(
    speculator: SelfSpeculator, settings: MarginSettings, folder: Path, *, console: Console
) -> dict[str, Any]:
    """Asks every arm every question, `repetitions` times, and returns the report's dict. Leaves in the folder:

    results.jsonl  one line for each repetition, question and arm, see `_line`
    report.json    figures, with report.md and margin.png: see `dvi.bench.margin_report`

    Raises ValueError for a folder that holds results already, and for questions that leave no room for an answer.
    """
    path = folder / RESULTS_FILE
    if path.exists():
        raise ValueError(f"the output must be a folder without {RESULTS_FILE}, got {folder}; try another")
    room = speculator.max_positions - settings.max_new_tokens - 1
    if room < 1:
        raise ValueError(
            f"max_new_tokens must leave room in the model's context of {speculator.max_positions}, got "
            f"{settings.max_new_tokens}; try {speculator.max_positions // 2}"
        )
    asked = [replace(q, turns=q.turns[:1]) for q in select(load_questions(settings.questions), settings.limit)]
    conversation = Conversation(speculator.tokenizer)
    prompts = [(question, conversation.encode(question.turns, [], room=room).token_ids) for question in asked]
    arms = {rule.name: _arm(speculator, _options(settings, rule)) for rule in rules_of(settings)}
    num_answers = settings.repetitions * len(asked) * len(arms)
    console.print(f"{num_answers:,} answers to come: {settings.repetitions} runs of {len(asked)} questions to "
                  f"{', '.join(arms)}; how long they take shows after the first", soft_wrap=True)  # fmt: skip
    with doing("lossy rules beside strict", total=num_answers, noun="answers") as stage:
        lines = [line for new_lines in _ask_all(arms, prompts, settings.repetitions, stage) for line in new_lines]
    known: dict[tuple[int, ...], float] = {}  # greedy arms repeat themselves, and often each other
    prompt_of = {question.question_id: ids for question, ids in prompts}
    for line in each(lines, "perplexity", noun="answers"):
        prompt_ids, token_ids = prompt_of[line["question_id"]], line["token_ids"]
        key = (*prompt_ids, -1, *token_ids)
        if key not in known:
            known[key] = negative_log_likelihood(speculator, prompt_ids, token_ids)
        line["nll"] = known[key]
        line["text"] = conversation.answer_text(token_ids)
        line["final_number"] = final_number(line["text"])
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return make_report(folder, _describe(speculator, settings, prompts), lines, console=console)


def _arm(speculator: SelfSpeculator, options: ArmOptions) -> OurArm:
    (plan,) = plans_of_ours(speculator, options, names=["speculative"])
    return plan.build()


def _ask_all(
    arms: dict[str, OurArm], prompts: list[tuple[Question, list[int]]], repetitions: int, stage: Stage
) -> Iterator[list[Line]]:
    """The lines of every repetition and question, without what is worked out later; the stage hears of each answer."""
    for arm in arms.values():
        arm.answer([prompts[0][1]], seed=0)  # to warm up
    for repetition in range(1, repetitions + 1):
        for index, (question, prompt_ids) in enumerate(prompts):
            seed, found = 10**8 * repetition + question.question_id, {}
            for name in list(arms) if (repetition + index) % 2 else list(arms)[::-1]:
                (found[name],) = arms[name].answer([prompt_ids], seed=seed)
                stage.advance()
            yield [
                {"verify_rule": name, "level": arms[name].speculator.level, "repetition": repetition}
                | _line(question, prompt_ids, found[name])
                for name in arms
            ]


def _line(question: Question, prompt_ids: list[int], answer: ArmAnswer) -> Line:
    """One answer in counts, seconds and token ids. `nll`, in nats, text and final number come later."""
    stats, reference = answer.stats, None
    if question.category == SCORED_TASK and question.reference and ANSWER_MARK in str(question.reference[0]):
        reference = final_number(question.reference[0])
    return {
        "question_id": question.question_id, "category": question.category, "prompt_tokens": len(prompt_ids),
        "decode_s": stats.decode_s, "rounds": stats.num_rounds, "drafted": stats.num_drafted,
        "accepted": stats.num_accepted, "waived": stats.num_waived, "token_ids": answer.token_ids,
        "reference_number": reference,
    }  # fmt: skip


def _describe(
    speculator: SelfSpeculator, settings: MarginSettings, prompts: list[tuple[Question, list[int]]]
) -> dict[str, Any]:
    return {
        "settings": written(settings), "dtype": str(speculator.split.dtype).removeprefix("torch."),
        "drafter_version": speculator.drafter.version, "num_questions": len(prompts),
        "machine": describe_machine(speculator.split.device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "conditions": CONDITIONS,
    }  # fmt: skip
