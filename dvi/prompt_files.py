"""Rows of prompt files: JSON lines, a JSON list or plain text, packed with gzip or not, each with its place.

Knows files and lines; knows nothing of what a row means. A file that cannot be read to its end is refused at the line
where that shows.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz")


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row: a JSON line, a value of a JSON file's list, or {"prompt": line} of a text file.

    The name says which: `.txt` is text, `.json` may be one list, all else is JSON lines; `.gz` after it is unpacked.
    Blank lines are skipped. Raises FileNotFoundError, and ValueError naming file and line for what is none of these.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".txt"):
        yield from ((where, {"prompt": line}) for where, line in _lines(path))
        return
    lines = _lines(path)
    if name.endswith(".json"):
        lines = list(lines)
        if lines and lines[0][1].lstrip().startswith("["):
            yield from _listed(path, "\n".join(line for _, line in lines))
            return
    for where, line in lines:
        yield where, _parsed(line, where)


def _listed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(text, str(path))
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}): {short(text)}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deep to be a row: {short(text)}") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise ValueError(f"{where}: not a row ({error}): {short(text)}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each line that is not blank."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of it, or all of them as a list")
    number = 0
    try:
        # In bytes: a text's own line separators, which JSON may hold as they are, end no line.
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield f"{path}, line {number}", text
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no prompts file {path}; give JSONL rows with turns, prompt or messages, or text, one prompt a line"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: must be UTF-8: {error}; convert the file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, line {number + 1}: the gzip file is damaged ({error}); fetch it again") from None


def short(value: object) -> str:
    """Its repr, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
