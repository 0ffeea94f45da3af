"""Prompts for a run: from JSON lines, or from anything that `datasets` can read.

Knows rows and chat messages; knows nothing of tokenizers or models. A bad row stops the reading: traffic that is
dropped in silence would change what a run learns.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]

DEFAULT_SPLIT = "traffic"
SHUFFLE_BUFFER = 1000  # rows of a streamed dataset that are shuffled at a time
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class NoPromptsError(ValueError):
    """The files are sound, but no row of them was asked for."""


def read_prompts(
    paths: Iterable[str | Path],
    *,
    split: str | None = None,
    domains: Iterable[str] = (),
    limit: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
) -> list[Messages]:
    """The chosen rows of JSONL files as chat messages, each epoch in an order of its own.

    A row is {"turns": [...]}, {"prompt": ...} or {"messages": [...]}, optionally with "split" and "domain". Of turns
    the first is asked: the later ones need an answer to it. Of messages those after the user's last are left out.

    split         keep only its rows; None keeps all. A row that names none is traffic.
    domains       keep only these; empty keeps all.
    limit         rows of one epoch, the files' first ones; 0 takes all.
    shuffle_seed  None keeps the order of the files.
    Raises ValueError naming file and line for a bad row, NoPromptsError when no row is left, and FileNotFoundError.
    """
    domains, seen_splits, seen_domains = set(domains), set(), set()
    prompts: list[Messages] = []
    paths = [Path(path) for path in paths]
    for path in paths:
        for where, row in _rows(path):
            messages = as_messages(row, where=where)
            row_split, domain = row.get("split", DEFAULT_SPLIT), row.get("domain")
            seen_splits.add(row_split)
            seen_domains.add(domain)
            if split in (None, row_split) and (not domains or domain in domains):
                prompts.append(messages)
    if not prompts:
        raise NoPromptsError(
            f"{', '.join(map(str, paths))} must hold a row of split {split or 'any'} and domain "
            f"{' or '.join(sorted(domains)) or 'any'}; there are splits {sorted(map(str, seen_splits))} and domains "
            f"{sorted(map(str, seen_domains))}"
        )
    return list(itertools.chain.from_iterable(_epochs(prompts[: limit or None], shuffle_seed, epochs)))


def read_dataset(
    name: str,
    *,
    split: str,
    field: str,
    skip: int = 0,
    limit: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
) -> Iterator[Messages]:
    """Chat messages from a hub dataset, or a local file or folder, streamed: nothing is read before it is needed.

    field   the column that holds the prompt: text, a list of turns, or chat messages.
    skip    rows left out at the start, as held out; then `limit` rows make an epoch, 0 takes all.
    Raises ValueError for rows without the field, and what `datasets` raises for unknown names.
    """
    import datasets  # seconds to import

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
            if field not in row:
                raise ValueError(f"{where}: no column {field!r}; there are {', '.join(sorted(row))}")
            yield as_messages({_key_for(row[field]): row[field]}, where=where)


def as_messages(row: Mapping[str, Any], *, where: str) -> Messages:
    """The chat messages of one row; `where` names it in errors. Raises ValueError saying what is wrong."""
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError(f"{where}: turns must be a list of texts, got {_short(turns)}")
        return [{"role": "user", "content": turns[0]}]
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise ValueError(f"{where}: prompt must be a text, got {_short(row['prompt'])}")
        return [{"role": "user", "content": row["prompt"]}]
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise ValueError(f"{where}: messages must be a list of texts with role and content, got {_short(messages)}")
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ValueError(f"{where}: messages must hold one by the user, got {_short(messages)}")
        return [{"role": message["role"], "content": message["content"]} for message in messages[: last + 1]]
    raise ValueError(f"{where}: a row needs one of turns, prompt, messages; got {', '.join(sorted(row)) or 'nothing'}")


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


def _epochs(prompts: list[Messages], shuffle_seed: int | None, epochs: int) -> Iterator[list[Messages]]:
    for epoch in range(epochs):
        order = list(prompts)
        if shuffle_seed is not None:
            random.Random(shuffle_seed + epoch).shuffle(order)
        yield order


def _key_for(value: object) -> str:
    """What a dataset's column holds, as the key that a row of ours would have it under."""
    if not isinstance(value, list):
        return "prompt"
    return "messages" if value and isinstance(value[0], dict) else "turns"


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
