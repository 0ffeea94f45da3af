"""Spec-Bench's questions, and the prompts that are made of them turn by turn.

Knows text, templates and a tokenizer; knows nothing of models. Spec-Bench: Xia et al. 2024, arXiv 2401.07851.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from dvi.model.chat_templates import VICUNA_STOP, VICUNA_SYSTEM
from dvi.prompt_files import rows_of
from dvi.traffic import why_no_text

BUNDLED_QUESTIONS = Path(__file__).with_name("data") / "spec_bench" / "question.jsonl"

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")  # in the harness's order
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

TEMPLATES = ("vicuna", "chat")


@dataclass(frozen=True)
class Question:
    """One line of question.jsonl.

    turns      what the user says, one text a turn.
    reference  right answers, as the file has them; nothing here looks at them.
    """

    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if not self.turns or not all(self.turns):
            raise ValueError(f"question {self.question_id}: turns must be at least one text, none empty")
        for index, turn in enumerate(self.turns):
            if (reason := why_no_text(turn)) is not None:
                raise ValueError(f"question {self.question_id}: turns[{index}] {reason}")
        task_of(self.category)


_QUESTION = TypeAdapter(Question)


def load_questions(path: str | Path | None = None) -> list[Question]:
    """The questions of a file in its order; default the bundled 480.

    Raises FileNotFoundError, and ValueError naming file and line for a line that is no question or repeats an id.
    """
    path = Path(path or BUNDLED_QUESTIONS)
    questions: dict[int, Question] = {}
    for where, row in rows_of(path):
        try:
            question = _QUESTION.validate_python(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None
        if question.question_id in questions:
            raise ValueError(f"{where}: question_id {question.question_id} is there twice")
        questions[question.question_id] = question
    if not questions:
        raise ValueError(f"{path} must hold at least one question, got none")
    return list(questions.values())


def task_of(category: str) -> str:
    """The task under which the harness counts a category: MT-bench has eight, the others one each."""
    if category in MT_BENCH:
        return "mt_bench"
    if category not in TASKS[1:]:
        raise ValueError(f"category must be one of {', '.join(MT_BENCH + TASKS[1:])}, got {category!r}")
    return category


def select(questions: list[Question], limit_per_task: int) -> list[Question]:
    """At most this many questions of each task, spread evenly over it, in their order; 0 takes all.

    Spread, because MT-bench is sorted by category: its first ten are all "writing".
    """
    if limit_per_task < 0:
        raise ValueError(f"limit_per_task must be >= 0 (0 takes every question), got {limit_per_task}")
    sizes = Counter(task_of(question.category) for question in questions)
    seen: Counter[str] = Counter()
    chosen = []
    for question in questions:
        task = task_of(question.category)
        size, index = sizes[task], seen[task]
        seen[task] += 1
        limit = min(limit_per_task, size) or size
        # The multiples of size / limit, rounded down: a question is one if a multiple lies in [index, index + 1).
        if -(-index * limit // size) < -(-(index + 1) * limit // size):
            chosen.append(question)
    return chosen


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and how many more it had at its beginning before it was cut."""

    token_ids: list[int]
    num_cut: int


class Conversation:
    """Prompts of a question's turns, with the answers so far as their history, and the text an answer becomes.

    template    "vicuna": vicuna_v1.1 of FastChat, as the harness prompts every model; "chat": the model's own chat
                template; "auto": chat where the tokenizer has one.
    stop_str    text that ends an answer, beside the model's own end tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> None:
        """Raises ValueError for an unknown template, and for "chat" without one in the tokenizer."""
        if template == "auto":
            template = "vicuna" if tokenizer.chat_template is None else "chat"
        if template not in TEMPLATES:
            raise ValueError(f"template must be one of auto, {', '.join(TEMPLATES)}, got {template!r}")
        if template == "chat" and tokenizer.chat_template is None:
            raise ValueError("template must be 'vicuna' for this tokenizer, got 'chat': it has no chat template")
        self.tokenizer, self.template = tokenizer, template
        self.stop_str = VICUNA_STOP if template == "vicuna" else None

    def encode(self, turns: tuple[str, ...], answers: list[str], *, room: int) -> Prompt:
        """The prompt that asks for an answer to the last of `turns`, cut from the left to at most `room` tokens.

        answers: the texts given to the turns before it, one less than turns.
        """
        assert len(turns) == len(answers) + 1, f"{len(turns)} turns need {len(turns) - 1} answers, got {len(answers)}"
        if self.template == "vicuna":
            ids = self.tokenizer([vicuna_prompt(turns, answers)])["input_ids"][0]
        else:
            messages = [{"role": "user", "content": turns[0]}]
            for answer, turn in zip(answers, turns[1:], strict=True):
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(ids[-room:], max(len(ids) - room, 0))

    def answer_text(self, token_ids: list[int]) -> str:
        """The text of an answer as the harness makes it: what is written, and what the next turn is asked after."""
        return answer_text(self.tokenizer, token_ids, self.stop_str)


def vicuna_prompt(turns: tuple[str, ...], answers: list[str]) -> str:
    """vicuna_v1.1 as FastChat writes it; an answer of no text has no end mark there either."""
    prompt = VICUNA_SYSTEM + " "
    for turn, answer in zip(turns, answers, strict=False):
        prompt += f"USER: {turn} ASSISTANT:" + (f" {answer}{VICUNA_STOP}" if answer else "")
    return prompt + f"USER: {turns[-1]} ASSISTANT:"


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stop_str: str | None) -> str:
    """Decoded, cut at stop_str unless the text begins with it, without special tokens and surrounding blanks."""
    text = tokenizer.decode(token_ids, spaces_between_special_tokens=False)
    if stop_str and text.find(stop_str) > 0:
        text = text[: text.find(stop_str)]
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return text.strip()
