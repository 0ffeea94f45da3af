"""Files that a crash or an interruption leaves old or new, never half, and that are on the disk when a call returns.

Knows paths and bytes; imports nothing heavy. Whole folders are `dvi.durable`'s.
"""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, and its folder if there is none. Text becomes UTF-8. Raises OSError when the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has: two machines may write the same file of one run.
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}.staging")
    try:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    sync(path.parent)


def write_picture(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG file."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_whole(path, png.getvalue())


def sync(path: Path) -> None:
    """Waits until the file, or the list of names in the folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
