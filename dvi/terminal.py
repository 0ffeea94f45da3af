"""What every verb of the command line does alike: words for people to stderr, one JSON object as stdout's last line.

Imports nothing heavy, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from dvi.progress import doing

FOUND_WRONG, USER_ERROR, PEER_LOST = 1, 2, 3  # exit codes beside 0 and 128 + signal
is_json_asked = False  # by --json, see dvi.cli.main

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """A line for people; on a terminal it is broken between words, and paths stay whole."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr)


def finish(command: str, **facts: Any) -> None:
    """The last line of stdout: for programs, so that on a terminal it is left out unless it was asked for."""
    if is_json_asked or not sys.stdout.isatty():
        print(json.dumps({"command": command, **facts}, allow_nan=False), flush=True)


def finish_job(command: str, summary: dict[str, Any]) -> None:
    """The last line of a job, which of several ranks rank 0 alone prints."""
    if os.environ.get("RANK", "0") == "0":
        finish(command, **summary)


@functools.cache
def make_console() -> Console:
    """Where tables and progress bars go; one for all, since what is printed must make way for the bars."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False)  # a path may hold [brackets]


def quieten_transformers() -> None:
    """No loading bars and no advice from transformers: errors only. Imports both, which takes seconds."""
    with doing("importing torch and transformers"):
        import transformers
        import transformers.modeling_utils

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
