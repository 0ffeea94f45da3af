"""The files of a Spec-Bench run: answers as the harness reads them, and beside them what it has no place for.

Knows lines and files; knows nothing of models. A line is on the disk when `append` returns; one that a kill left torn
is passed over by the readers.
"""

from __future__ import annotations

import json
import os
import secrets
import string
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dvi.bench.questions import Question
from dvi.whole_files import sync, write_whole

DETAILS_FILE = "details.jsonl"
# Letters and digits that are not mistaken for others: the alphabet and length of the harness's shortuuid.
ID_ALPHABET = "".join(c for c in string.digits + string.ascii_letters if c not in "01IOl")
ID_LENGTH = 22


@dataclass(frozen=True)
class AnsweredTurn:
    """One turn's answer. accept_lengths: tokens per target forward; wall_time_s holds the prefill too."""

    text: str
    num_tokens: int
    wall_time_s: float
    accept_lengths: list[int]


@dataclass(frozen=True)
class FirstDifference:
    """Where greedy tokens first left the reference arm's.

    turn, position  0-based, the position among the turn's new tokens. Either token is None where that text had ended.
    gap             the model's top-1 minus its top-2 logit there, after the text both share.
    """

    turn: int
    position: int
    plain_token: int | None
    other_token: int | None
    gap: float


@dataclass(frozen=True)
class Detail:
    """One arm's way through one question, one entry per turn in the lists of prompt_tokens, cut_tokens, token_ids.

    cut_tokens      tokens that the prompt lost at its beginning.
    token_ids       new tokens, the end token included.
    num_rounds ..   raw counts over all turns as in `RoundStats`; None for decoders that are not ours.
    error           class and message where the arm failed; then no answer is written, and the lists end at that turn.
    divergence      None where tokens equal the reference arm's, were not compared, or one of the two failed.
    """

    arm: str
    question_id: int
    prompt_tokens: list[int]
    cut_tokens: list[int]
    token_ids: list[list[int]]
    num_rounds: int | None = None
    num_drafted: int | None = None
    num_accepted: int | None = None
    num_waived: int | None = None
    drafted_per_depth: list[int] | None = None
    accepted_per_depth: list[int] | None = None
    error: str | None = None
    divergence: FirstDifference | None = None


_DETAIL = TypeAdapter(Detail)


def answer_line(question: Question, model_id: str, turns: list[AnsweredTurn]) -> dict[str, Any]:
    """One line of a model_answer file, as the harness's own eval.py writes it."""
    choice = {
        "index": 0,
        "turns": [turn.text for turn in turns],
        "decoding_steps": [len(turn.accept_lengths) for turn in turns],
        "new_tokens": [turn.num_tokens for turn in turns],
        "wall_time": [turn.wall_time_s for turn in turns],
        "accept_lengths": [length for turn in turns for length in turn.accept_lengths],
    }
    return {
        "question_id": question.question_id, "category": question.category,
        "answer_id": "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH)), "model_id": model_id,
        "choices": [choice], "tstamp": time.time(),
    }


def check_answer(line: dict[str, Any], *, max_new_tokens: int) -> None:
    """Raises ValueError naming question and field where a line breaks what the harness's figures rest on."""
    for choice in line["choices"]:
        where = f"question {line['question_id']}, choice {choice['index']}"
        num_turns = len(choice["turns"])
        for name in ("decoding_steps", "new_tokens", "wall_time"):
            if len(choice[name]) != num_turns:
                raise ValueError(f"{where}: {name} must have one entry a turn ({num_turns}), got {len(choice[name])}")
        for turn, (num_tokens, wall_time_s) in enumerate(zip(choice["new_tokens"], choice["wall_time"], strict=True)):
            if not 1 <= num_tokens <= max_new_tokens:
                raise ValueError(f"{where}: new_tokens of turn {turn} must be in 1..{max_new_tokens}, got {num_tokens}")
            if not wall_time_s > 0:
                raise ValueError(f"{where}: wall_time of turn {turn} must be > 0 s, got {wall_time_s}")
        lengths = choice["accept_lengths"]
        if sum(lengths) != sum(choice["new_tokens"]):
            raise ValueError(
                f"{where}: accept_lengths must sum to new_tokens ({sum(choice['new_tokens'])}), got {sum(lengths)}"
            )
        if len(lengths) != sum(choice["decoding_steps"]):
            raise ValueError(
                f"{where}: accept_lengths must have one entry a decoding step ({sum(choice['decoding_steps'])}), "
                f"got {len(lengths)}"
            )
        if not all(length >= 1 for length in lengths):
            raise ValueError(f"{where}: accept_lengths must be >= 1 each, got {min(lengths)}")


class AnswerFile:
    """model_answer/{model_id}.jsonl: one line per question, checked before it is written."""

    def __init__(self, path: str | Path, *, max_new_tokens: int) -> None:
        self.path, self._max_new_tokens = Path(path), max_new_tokens

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds checked lines; none when one of them fails."""
        for line in lines:
            check_answer(line, max_new_tokens=self._max_new_tokens)
        _append(self.path, map(json.dumps, lines))

    def read(self) -> list[dict[str, Any]]:
        """The last line of each question, sorted by question id."""
        return read_answers(self.path)

    def finish(self, question_ids: Collection[int] | None = None) -> None:
        """Leaves the file as the harness's reorg_answer_file does: sorted by id, the last line of each.

        question_ids: also drops all other questions.
        """
        lines = [line for line in self.read() if question_ids is None or line["question_id"] in question_ids]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))


class DetailFile:
    """details.jsonl of one repetition: one line per arm and question."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, details: list[Detail]) -> None:
        _append(self.path, (_DETAIL.dump_json(detail).decode() for detail in details))

    def read(self) -> list[Detail]:
        """The last line of each arm and question, in the order in which they were first written."""
        return read_details(self.path)

    def keep(self, question_ids: Collection[int]) -> None:
        """Drops all other questions."""
        kept = [detail for detail in self.read() if detail.question_id in question_ids]
        write_whole(self.path, "".join(_DETAIL.dump_json(detail).decode() + "\n" for detail in kept))


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Answer lines sorted by question id, the last of each id; none of a file that is not there."""
    by_id = {line["question_id"]: line for line in _read(Path(path))}
    return [by_id[question_id] for question_id in sorted(by_id)]


def read_details(path: str | Path) -> list[Detail]:
    """Details in the order of the questions' first lines, the last of each arm and question; none of no file."""
    by_key = {(line["arm"], line["question_id"]): line for line in _read(Path(path))}
    return [_DETAIL.validate_python(line) for line in by_key.values()]


def _append(path: Path, lines: Iterable[str]) -> None:
    """Adds lines and waits until they are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # a killed run's last line must not swallow our first
        file.write("".join(line + "\n" for line in lines).encode())
    sync(path)


def _read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
