"""Folders that a crash leaves old or new, never mixed, and files that are on the disk when a call returns.

Knows paths, renames and syncs, and tensors only as the content of a file; knows nothing of what a folder means.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dvi.whole_files import sync

ANYONE, OWNER_ONLY = 0o777, 0o700  # who may read a folder: its mode, before the umask


@contextmanager
def staged_folder(folder: str | Path, *, mode: int = ANYONE) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place, whole and synced, when the block ends without an error.

    mode: the folder's permissions, of which the umask takes some; its files get the same ones, none to execute.
    A crash at any point leaves `surviving_folder(folder)` old or new.
    Raises ValueError when the old folder has an entry that the new one has not, OSError when the disk refuses.
    """
    folder = Path(folder).resolve()  # a link to a folder stays a link
    staging, previous = folder.with_name(f".{folder.name}.staging"), _previous(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove(staging)
    staging.mkdir(mode=mode)
    try:
        yield staging
        orphans = sorted(_entries(folder) - _entries(staging))
        if orphans:
            raise ValueError(f"{folder} holds {', '.join(orphans)}, which saving would delete; save to another folder")
        file_mode = staging.stat().st_mode & 0o666
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(file_mode)  # safetensors makes files that only their owner can read
            sync(path)
        sync(staging)
        if folder.exists():
            _remove(previous)
            os.rename(folder, previous)
        os.rename(staging, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.exists() and previous.exists():
            os.rename(previous, folder)
    shutil.rmtree(previous, ignore_errors=True)


def surviving_folder(folder: str | Path) -> Path:
    """`folder`, or its predecessor when a crash came just between their renames."""
    folder = Path(folder).resolve()
    previous = _previous(folder)
    return previous if previous.exists() and not folder.exists() else folder


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file; tensors that share memory are written apart. Raises OSError when the disk refuses."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        safetensors.torch.save_file(separate, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
