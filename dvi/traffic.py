"""Prompts for a run: from files of rows or plain text, or from anything that `datasets` can read.

Knows rows and chat messages; knows nothing of tokenizers or models. A bad row of a file stops the reading before
anything runs: traffic that is dropped in silence would change what a run learns.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dvi.bundled import here_or_bundled
from dvi.prompt_files import rows_of, short

_LOG = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")

SPLITS = ("traffic", "eval")
DEFAULT_SPLIT = "traffic"
ROLES = ("system", "developer", "user", "assistant", "tool")
SHUFFLE_BUFFER = 1000  # rows of a streamed dataset that are shuffled at a time
_PROMPT_KEYS = ("turns", "prompt", "messages", "conversations", "instruction", "text")
_ANSWER_KEYS = ("answer", "output", "response")
# Who speaks in rows as ShareGPT has them, {"from": ..., "value": ...}; its data name several assistants.
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"
)
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class NothingAskedError(ValueError):
    """A row in which nobody asks anything, or nobody answers where an answer is wanted, or of text that is none."""


class NoPromptsError(ValueError):
    """The files are sound, but no row of them was asked for."""


class Messages(list[dict[str, str]]):
    """The messages of a chat, {"role", "content"} each; where: the file and line, or row, that they come from."""

    def __init__(self, messages: Iterable[dict[str, str]] = (), *, where: str = "") -> None:
        super().__init__(messages)
        self.where = where


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with the answer that the data give to it. Without messages the answer is a text that stands alone."""

    messages: Messages
    answer: str

    @property
    def where(self) -> str:
        return self.messages.where


def read_prompts(
    paths: Iterable[str | Path],
    *,
    parse: Callable[..., Parsed] | None = None,
    field: str | None = None,
    split: str | None = None,
    domains: Iterable[str] = (),
    limit: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
    leave_out: Iterable[Parsed] = (),
) -> list[Parsed]:
    """The chosen rows of files (see `dvi.prompt_files`), by default as chat messages, each epoch in its own order.

    A row holds what `parse` takes, optionally with "split" and "domain".

    parse         `as_messages`, the default, or `as_answered`.
    field         what holds the prompt, where it is none of the names that `parse` knows.
    split         keep only its rows; None keeps all. A row that names none is traffic.
    domains       keep only these; empty keeps all.
    limit         rows of one epoch, the first ones of each file in equal parts as far as they go; 0 takes all.
    shuffle_seed  None keeps the order of the files.
    leave_out     prompts of which no row is taken, wherever it stands: `hold_out`'s.
    Raises ValueError naming file and line for a bad row, NoPromptsError when no row is left, and FileNotFoundError.
    """
    parse = parse or as_messages
    domains, left_out, seen_splits, seen_domains = set(domains), {_digest(one) for one in leave_out}, set(), set()
    paths = [here_or_bundled(path) for path in paths]
    files: list[list[Parsed]] = []
    for path in paths:
        files.append([])
        for where, row in rows_of(path):
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be an object, got {short(row)}")
            row_split, domain = _labels(row, where)
            prompt = parse(_picked(row, field, None, parse, where=where), where=where)
            seen_splits.add(row_split)
            seen_domains.add(domain)
            is_wanted = split in (None, row_split) and (not domains or domain in domains)
            if is_wanted and not (left_out and _digest(prompt) in left_out):
                files[-1].append(prompt)
    if not any(files):
        names = ", ".join(map(str, paths))
        if not seen_splits:
            raise NoPromptsError(f"{names} must hold a prompt, got none; give a row or a line for each")
        raise NoPromptsError(
            f"{names} must hold a row of split {split or 'any'} and domain "
            f"{' or '.join(sorted(domains)) or 'any'}; there are splits {sorted(map(str, seen_splits))} and domains "
            f"{sorted(map(str, seen_domains))}"
        )
    prompts = list(itertools.chain.from_iterable(_first_of_each(files, limit) if limit else files))
    return list(itertools.chain.from_iterable(_epochs(prompts, shuffle_seed, epochs)))


def hold_out(prompts: list[Parsed], *, limit: int) -> list[Parsed]:
    """A tenth of the prompts, at least one and at most `limit`: those whose text's SHA-256 is smallest.

    So they are the same wherever and in whatever order the rows are read. None of less than two different prompts.
    """
    by_digest = {_digest(prompt): prompt for prompt in prompts}
    num_held = min(limit, max(len(by_digest) // 10, 1), len(by_digest) - 1)
    return [by_digest[digest] for digest in sorted(by_digest)[:num_held]]


def read_dataset(
    name: str,
    *,
    split: str,
    field: str | None = None,
    answer_field: str | None = None,
    parse: Callable[..., Parsed] | None = None,
    skip: int = 0,
    limit: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
) -> Iterator[Parsed]:
    """The rows of a hub dataset, or of a local file or folder, streamed: nothing is read before it is needed.

    field         the column that holds the prompt: text, a list of turns, or messages in either form; None takes the
                  first that `parse` knows by its name.
    answer_field  the column that holds its answer, for `as_answered`. Without one a text of `field` stands alone.
    parse         `as_messages`, the default, or `as_answered`.
    skip          rows left out at the start, as held out; then `limit` rows make an epoch, 0 takes all.
    Public conversations hold some in which nobody asks anything, and broken characters: such a row is passed over with
    a warning. Raises ValueError for rows without these fields, and what `datasets` raises for unknown names.
    """
    import datasets  # seconds to import

    parse = parse or as_messages
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
            try:
                parsed = parse(_picked(row, field, answer_field, parse, where=where), where=where)
            except NothingAskedError as nothing:
                _LOG.warning("%s: passed over", nothing)
                continue
            yield parsed


def as_messages(row: Mapping[str, Any], *, where: str) -> Messages:
    """The chat messages of one row; `where` names it in errors. Raises ValueError saying what is wrong.

    A row is {"turns": [...]}, {"prompt": ...}, {"messages": [...]}, ShareGPT's {"conversations": [...]}, Alpaca's
    {"instruction": ..., "input": ...} or {"text": ...}; of several the first of these. Of turns the first is asked: the
    later ones need an answer to it. Of messages those after the user's last are left out.
    """
    key = next((key for key in _PROMPT_KEYS if key in row), None)
    if key is None:
        raise ValueError(
            f"{where}: a row needs one of {', '.join(_PROMPT_KEYS)}; got {', '.join(map(str, row)) or 'nothing'}; "
            "data.field names another"
        )
    if key == "prompt" and isinstance(row[key], list):  # as TRL has it
        return as_messages({_key_for(row[key], key): row[key]}, where=where)
    if key in ("messages", "conversations"):
        return _up_to_last("user", _messages_of(row, where=where), where=where)
    if key == "turns":
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError(f"{where}: turns must be a list of texts, got {short(turns)}")
        text = turns[0]
    else:
        text = row[key]
    _check_text(text, key, where)
    more = row.get("input") if key == "instruction" else None
    if more:
        _check_text(more, "input", where)
        text = f"{text}\n\n{more}"
    return Messages([{"role": "user", "content": text}], where=where)


def as_answered(row: Mapping[str, Any], *, where: str) -> AnsweredPrompt:
    """The prompt of one row and its answer; `where` names it in errors. Raises ValueError saying what is wrong.

    A row is what `as_messages` reads, with the answer under "answer", "output", "response" or "text"; or messages, in
    either form, of which the assistant's last is the answer and those after it are left out; or a "text" alone.
    """
    key = next((key for key in (*_ANSWER_KEYS, "text") if key in row), None)
    if key is not None:
        _check_text(row[key], key, where)
        asked = {name: value for name, value in row.items() if name != "text"}
        has_prompt = key != "text" or any(name in asked for name in _PROMPT_KEYS)
        return AnsweredPrompt(as_messages(asked, where=where) if has_prompt else Messages(where=where), row[key])
    messages = _messages_of(row, where=where)
    if messages is None:
        raise ValueError(
            f"{where}: a row needs an answer, a text, or messages that hold one; got "
            f"{', '.join(sorted(row)) or 'nothing'}; warmup.source=answers has the model answer"
        )
    *prompt, answer = _up_to_last("assistant", messages, where=where)
    if not any(message["role"] == "user" for message in prompt):
        raise ValueError(f"{where}: an answer needs one by the user before it, got {short(messages)}")
    return AnsweredPrompt(Messages(prompt, where=where), answer["content"])


def as_text(messages: list[dict[str, str]]) -> str:
    """The messages' texts alone, for models without a chat template."""
    return "\n\n".join(message["content"] for message in messages)


def why_no_text(text: str) -> str | None:
    """What keeps a string from being text that a tokenizer takes; None where nothing does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"holds half a surrogate pair, {half!r} at character {error.start}: write the whole character"
    if "\0" in text:
        return f"holds a NUL at character {text.index(chr(0))}: take it out"
    return None


def _check_text(text: object, name: str, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {name} must be a text, got {short(text)}")
    reason = why_no_text(text)
    if reason is not None:
        raise NothingAskedError(f"{where}: {name} {reason}")


def _labels(row: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """The row's split and domain."""
    split, domain = row.get("split", DEFAULT_SPLIT), row.get("domain")
    if split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {short(split)}; or leave it out")
    if domain is not None and not isinstance(domain, str):
        raise ValueError(f"{where}: domain must be a text, got {short(domain)}; or leave it out")
    return split, domain


def _picked(
    row: Mapping[str, Any], field: str | None, answer_field: str | None, parse: Callable, *, where: str
) -> Mapping[str, Any]:
    """The row under the names that `parse` knows. Raises ValueError for a field that it does not have."""
    for name in (field, answer_field):
        if name is not None and name not in row:
            raise ValueError(f"{where}: no field {name!r}; there are {', '.join(sorted(row)) or 'none'}")
    if answer_field is not None:
        answer = {"answer": row[answer_field]}
    else:
        answer = {name: row[name] for name in _ANSWER_KEYS if name in row and name != field}
    if field is None:
        return row if answer_field is None else {**row, **answer}
    text_key = "text" if parse is as_answered and not answer else "prompt"
    return {_key_for(row[field], text_key): row[field]} | answer


def _digest(prompt: object) -> str:
    """SHA-256 of what is asked, or of a text that stands alone, wherever it stands."""
    if isinstance(prompt, AnsweredPrompt):
        prompt = prompt.messages or prompt.answer
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()


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
    """What a field holds, as the key that a row of ours would have it under."""
    if not isinstance(value, list):
        return text_key
    if not value:
        return "messages"
    if not isinstance(value[0], dict):
        return "turns"
    return "conversations" if "from" in value[0] else "messages"


def _messages_of(row: Mapping[str, Any], *, where: str) -> Messages | None:
    """The messages of a row that holds a conversation, in either form; None of one that does not."""
    key = next((key for key in ("messages", "conversations") if key in row), None)
    if key is None:
        return None
    role_key, text_key = ("role", "content") if key == "messages" else ("from", "value")
    roles = {role: role for role in ROLES} if key == "messages" else _SHAREGPT_ROLES
    if not isinstance(row[key], list):
        raise ValueError(
            f"{where}: {key} must be a list of texts with {text_key} and {role_key}, got {short(row[key])}"
        )
    messages = Messages(where=where)
    for index, message in enumerate(row[key]):
        name = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: {name} must have {role_key} and {text_key}, got {short(message)}")
        role, text = message.get(role_key), message.get(text_key)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"{where}: {name}.{role_key} must be one of {', '.join(roles)}, got {short(role)}")
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name}.{text_key} must be a text, got {short(text)}")
        reason = why_no_text(text)
        if reason is not None:
            raise NothingAskedError(f"{where}: {name}.{text_key} {reason}")
        messages.append({"role": roles[role], "content": text})
    return messages


def _up_to_last(role: str, messages: Messages, *, where: str) -> Messages:
    last = max((i for i, message in enumerate(messages) if message["role"] == role), default=None)
    if last is None:
        raise NothingAskedError(f"{where}: messages must hold one by the {role}, got {short(list(messages))}")
    if not messages[last]["content"].strip():
        raise NothingAskedError(f"{where}: messages[{last}].content must be a text, got ''; it is the {role}'s last")
    return Messages(messages[: last + 1], where=where)
