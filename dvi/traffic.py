"""Prompts for a run: from JSON lines, or from anything that `datasets` can read.

Knows rows and chat messages; knows nothing of tokenizers or models. A bad row stops the reading: traffic that is
dropped in silence would change what a run learns.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dvi.bundled import here_or_bundled

_LOG = logging.getLogger(__name__)

Messages = list[dict[str, str]]
Parsed = TypeVar("Parsed")

DEFAULT_SPLIT = "traffic"
SHUFFLE_BUFFER = 1000  # rows of a streamed dataset that are shuffled at a time
_PROMPT_KEYS = ("turns", "prompt", "messages", "conversations")
# Who speaks in rows as ShareGPT has them, {"from": ..., "value": ...}; its data name several assistants.
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"
)
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class NothingAskedError(ValueError):
    """A conversation in which nobody asks anything, or nobody answers where an answer is wanted."""


class NoPromptsError(ValueError):
    """The files are sound, but no row of them was asked for."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with the answer that the data give to it. Without messages the answer is a text that stands alone."""

    messages: Messages
    answer: str


def read_prompts(
    paths: Iterable[str | Path],
    *,
    parse: Callable[..., Parsed] | None = None,
    split: str | None = None,
    domains: Iterable[str] = (),
    limit: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
) -> list[Parsed]:
    """The chosen rows of JSONL files, by default as chat messages, each epoch in an order of its own.

    A row holds what `parse` takes, optionally with "split" and "domain".

    parse         `as_messages`, the default, or `as_answered`.
    split         keep only its rows; None keeps all. A row that names none is traffic.
    domains       keep only these; empty keeps all.
    limit         rows of one epoch, the first ones of each file in equal parts as far as they go; 0 takes all.
    shuffle_seed  None keeps the order of the files.
    Raises ValueError naming file and line for a bad row, NoPromptsError when no row is left, and FileNotFoundError.
    """
    parse = parse or as_messages
    domains, seen_splits, seen_domains = set(domains), set(), set()
    paths = [here_or_bundled(path) for path in paths]
    files: list[list[Parsed]] = []
    for path in paths:
        files.append([])
        for where, row in _rows(path):
            prompt = parse(row, where=where)
            row_split, domain = row.get("split", DEFAULT_SPLIT), row.get("domain")
            seen_splits.add(row_split)
            seen_domains.add(domain)
            if split in (None, row_split) and (not domains or domain in domains):
                files[-1].append(prompt)
    if not any(files):
        raise NoPromptsError(
            f"{', '.join(map(str, paths))} must hold a row of split {split or 'any'} and domain "
            f"{' or '.join(sorted(domains)) or 'any'}; there are splits {sorted(map(str, seen_splits))} and domains "
            f"{sorted(map(str, seen_domains))}"
        )
    prompts = list(itertools.chain.from_iterable(_first_of_each(files, limit) if limit else files))
    return list(itertools.chain.from_iterable(_epochs(prompts, shuffle_seed, epochs)))


def read_dataset(
    name: str,
    *,
    split: str,
    field: str,
    answer_field: str | None = None,
    parse: Callable[..., Parsed] | None = None,
    skip: int = 0,
    limit: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
) -> Iterator[Parsed]:
    """The rows of a hub dataset, or of a local file or folder, streamed: nothing is read before it is needed.

    field         the column that holds the prompt: text, a list of turns, or messages in either form.
    answer_field  the column that holds its answer, for `as_answered`. Without one a text of `field` stands alone.
    parse         `as_messages`, the default, or `as_answered`.
    skip          rows left out at the start, as held out; then `limit` rows make an epoch, 0 takes all.
    Public conversations hold some in which nobody asks anything: such a row is passed over with a warning.
    Raises ValueError for rows without these fields, and what `datasets` raises for unknown names.
    """
    import datasets  # seconds to import

    parse = parse or as_messages
    text_key = "text" if parse is as_answered and answer_field is None else "prompt"
    builder = _FORMATS.get(Path(name).suffix.lower())
    if builder is not None and not Path(name).is_file():
        raise FileNotFoundError(f"no file {name}; give a dataset's name, a file or a folder")
    source = {"path": builder, "data_files": name} if builder is not None else {"path": name}
    rows = datasets.load_dataset(**source, split=split, streaming=True)
    rows = rows.skip(skip)
    if limit:
        rows = rows.take(limit)
    for epoch in range(epochs):
        ordered = rows
        if shuffle_seed is not None:
            ordered = rows.shuffle(seed=shuffle_seed + epoch, buffer_size=SHUFFLE_BUFFER)
        for index, row in enumerate(ordered):
            where = f"{name}, row {index}"
            for column in (field, answer_field):
                if column is not None and column not in row:
                    raise ValueError(f"{where}: no column {column!r}; there are {', '.join(sorted(row))}")
            answer = {} if answer_field is None else {"answer": row[answer_field]}
            try:
                parsed = parse({_key_for(row[field], text_key): row[field]} | answer, where=where)
            except NothingAskedError as nothing:
                _LOG.warning("%s: passed over", nothing)
                continue
            yield parsed


def as_messages(row: Mapping[str, Any], *, where: str) -> Messages:
    """The chat messages of one row; `where` names it in errors. Raises ValueError saying what is wrong.

    A row is {"turns": [...]}, {"prompt": ...}, {"messages": [...]} or ShareGPT's {"conversations": [...]}. Of turns the
    first is asked: the later ones need an answer to it. Of messages those after the user's last are left out.
    """
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError(f"{where}: turns must be a list of texts, got {_short(turns)}")
        return [{"role": "user", "content": turns[0]}]
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise ValueError(f"{where}: prompt must be a text, got {_short(row['prompt'])}")
        return [{"role": "user", "content": row["prompt"]}]
    messages = _messages_of(row, where=where)
    if messages is None:
        raise ValueError(
            f"{where}: a row needs one of {', '.join(_PROMPT_KEYS)}; got {', '.join(sorted(row)) or 'nothing'}"
        )
    return _up_to_last("user", messages, where=where)


def as_answered(row: Mapping[str, Any], *, where: str) -> AnsweredPrompt:
    """The prompt of one row and its answer; `where` names it in errors. Raises ValueError saying what is wrong.

    A row is what `as_messages` reads, with the answer under "answer" or "text"; or messages, in either form, of which
    the assistant's last is the answer and those after it are left out; or a "text" alone.
    """
    key = "answer" if "answer" in row else "text"
    if key in row:
        if not isinstance(row[key], str) or not row[key]:
            raise ValueError(f"{where}: {key} must be a text, got {_short(row[key])}")
        has_prompt = key == "answer" or any(name in row for name in _PROMPT_KEYS)
        return AnsweredPrompt(as_messages(row, where=where) if has_prompt else [], row[key])
    messages = _messages_of(row, where=where)
    if messages is None:
        raise ValueError(
            f"{where}: a row needs an answer, a text, or messages that hold one; got "
            f"{', '.join(sorted(row)) or 'nothing'}; warmup.source=answers has the model answer"
        )
    *prompt, answer = _up_to_last("assistant", messages, where=where)
    if not any(message["role"] == "user" for message in prompt):
        raise ValueError(f"{where}: an answer needs one by the user before it, got {_short(messages)}")
    return AnsweredPrompt(prompt, answer["content"])


def as_text(messages: Messages) -> str:
    """The messages' texts alone, for models without a chat template."""
    return "\n\n".join(message["content"] for message in messages)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no prompts file {path}; give JSONL rows with turns, prompt or messages") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} must be a JSONL file in UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}): {_short(line)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be an object, got {_short(row)}")
        yield where, row


def _first_of_each(files: list[list[Parsed]], limit: int) -> list[list[Parsed]]:
    """The files' first rows, `limit` in all: one of each file, then the second of each, and so on."""
    ranks = sorted((row, file) for file, rows in enumerate(files) for row in range(len(rows)))[:limit]
    return [rows[: sum(of == file for _, of in ranks)] for file, rows in enumerate(files)]


def _epochs(prompts: list[Parsed], shuffle_seed: int | None, epochs: int) -> Iterator[list[Parsed]]:
    for epoch in range(epochs):
        order = list(prompts)
        if shuffle_seed is not None:
            random.Random(shuffle_seed + epoch).shuffle(order)
        yield order


def _key_for(value: object, text_key: str) -> str:
    """What a dataset's column holds, as the key that a row of ours would have it under."""
    if not isinstance(value, list):
        return text_key
    if not value:
        return "messages"
    if not isinstance(value[0], dict):
        return "turns"
    return "conversations" if "from" in value[0] else "messages"


def _messages_of(row: Mapping[str, Any], *, where: str) -> Messages | None:
    """The messages of a row that holds a conversation, in either form; None of one that does not."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise ValueError(f"{where}: messages must be a list of texts with role and content, got {_short(messages)}")
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    if "conversations" not in row:
        return None
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(_is_sharegpt_turn(turn) for turn in turns):
        raise ValueError(
            f"{where}: conversations must be a list of texts with value and from, one of "
            f"{', '.join(_SHAREGPT_ROLES)}; got {_short(turns)}"
        )
    return [{"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _up_to_last(role: str, messages: Messages, *, where: str) -> Messages:
    last = max((i for i, message in enumerate(messages) if message["role"] == role), default=None)
    if last is None:
        raise NothingAskedError(f"{where}: messages must hold one by the {role}, got {_short(messages)}")
    return messages[: last + 1]


def _is_sharegpt_turn(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("from") in _SHAREGPT_ROLES and isinstance(turn.get("value"), str)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
