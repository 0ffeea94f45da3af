"""Exact checkpoints: any state of tensors and plain values, back bit for bit, or the one before it.

Knows trees of values and folders; knows nothing of what the values mean. A checkpoint is a folder `step-XXXXXXXX` with
    tensors.safetensors   every tensor, by number       state.json   the tree that refers to them
    SHA256SUMS            the hashes of both, as `sha256sum -c` reads them
No pickles. Tensors come back on the CPU, apart from each other, without gradients.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from dvi.durable import ANYONE, OWNER_ONLY, staged_folder, write_tensors
from dvi.whole_files import sync

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
TENSORS_FILE = "tensors.safetensors"
TREE_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
LOCK_FILE = ".lock"


class CheckpointStore:
    """The last `keep` checkpoints of one run in one folder, which it locks until `close` or the end of the process.

    Raises ValueError when keep < 1 or when another store, in any process, holds the folder.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}; 2 leaves one to fall back on")
        self.folder = Path(folder)
        self.keep = keep
        self._damaged: set[int] = set()  # found by load_latest; the next save removes them
        self.folder.mkdir(parents=True, exist_ok=True)
        sync(self.folder.parent)
        self._lock = _lock(self.folder)
        self._settle()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another store have the folder."""
        self._lock.close()

    def renew(self) -> bool:
        """Makes the folder again, and locks it, where it was removed or replaced meanwhile; whether it was.

        Raises OSError when the disk refuses, or when another run holds the folder that is there now.
        """
        try:
            now, held = os.stat(self.folder / LOCK_FILE), os.fstat(self._lock.fileno())
            if (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino):
                return False
        except FileNotFoundError:
            pass
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(self.folder)
        except ValueError as error:
            raise OSError(str(error)) from None
        self._lock.close()
        self._lock = lock
        log.warning("%s was removed or replaced while in use; checkpoints are now written to a new one", self.folder)
        return True

    @property
    def next_step(self) -> int:
        """A step that `save` takes and that is newer than all others, for runs that have no number of their own."""
        return max((step for step in self._steps() if step not in self._damaged), default=0) + 1

    def save(self, state: dict[str, object], step: int, *, is_private: bool = False) -> Path:
        """Writes a checkpoint, then removes those beyond `keep`. When it returns, a power cut cannot undo it.

        is_private: only the owner of the process can read it.

        state holds tensors, None, booleans, numbers and strings in dicts, lists and tuples of any depth; the keys of
        dicts may be any of these plain values. Subclasses of dict come back as dicts; other types raise TypeError.
        Raises ValueError when the folder holds a later step, which this one would hide behind; OSError when the disk
        refuses, and then the checkpoints already there stay.
        """
        assert step >= 0
        self.renew()
        later = [other for other in self._steps() if other > step and other not in self._damaged]
        if later:
            raise ValueError(
                f"step must be >= {max(later)}, the last one saved in {self.folder}, got {step}; "
                "resume with load_latest or choose another folder"
            )
        tensors: dict[str, Tensor] = {}
        tree = {"format_version": FORMAT_VERSION, "step": step, "state": _flatten(state, tensors, "state")}
        path = self._path(step)
        with staged_folder(path, mode=OWNER_ONLY if is_private else ANYONE) as staging:
            write_tensors(staging / TENSORS_FILE, tensors)
            (staging / TREE_FILE).write_text(json.dumps(tree), encoding="utf-8")
            (staging / SUMS_FILE).write_bytes(_sum_line(staging / TENSORS_FILE) + _sum_line(staging / TREE_FILE))
        self._damaged.discard(step)
        self._prune()
        return path

    def keep_only(self, step: int) -> None:
        """Removes every other checkpoint, also what a crash or a failed save left of one; OSError when one stays."""
        self._settle()
        for other in self._steps():
            if other != step:
                shutil.rmtree(self._path(other))
        sync(self.folder)

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints later than this one: a run that goes on from it comes to other states."""
        for other in self._steps():
            if other > step:
                shutil.rmtree(self._path(other))
        sync(self.folder)

    def load_latest(self) -> tuple[dict[str, object], int] | None:
        """(state, step) of the newest checkpoint that is whole; None when there is none.

        Warns about each newer one that is damaged, naming the file. Raises ValueError when the newest whole one was
        written in another format.
        """
        whole = whole_steps(self.folder)
        self._damaged |= {step for step in self._steps() if step > max(whole, default=-1)}
        return (read_checkpoint(self.folder, whole[-1]), whole[-1]) if whole else None

    def _path(self, step: int) -> Path:
        return _path(self.folder, step)

    def _steps(self) -> list[int]:
        return _steps(self.folder)

    def _settle(self) -> None:
        """Undoes what a crash left half done."""
        for staging in self.folder.glob(".step-*.staging"):
            shutil.rmtree(staging)
        for previous in self.folder.glob(".step-*.previous"):
            path = self.folder / previous.name[1 : -len(".previous")]
            if path.exists():
                shutil.rmtree(previous)
            else:
                os.rename(previous, path)

    def _prune(self) -> None:
        whole = [step for step in self._steps() if step not in self._damaged]
        for step in [*whole[: -self.keep], *self._damaged]:
            shutil.rmtree(self._path(step), ignore_errors=True)
        self._damaged.clear()


def _lock(folder: Path) -> IO[bytes]:
    """An open file whose lock lasts as long as it is open, so that also a killed process lets go of it."""
    file = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder} is locked by another run; stop that run or choose another folder") from None
    return file


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder that are as they were written; none where there is no such folder.

    Warns about each newer one that is damaged, naming the file.
    """
    if not folder.is_dir():
        return []
    whole: list[int] = []
    for step in reversed(_steps(folder)):
        damage = _damage(_path(folder, step))
        if damage is None:
            whole.insert(0, step)
        elif not whole:
            warnings.warn(f"checkpoint {_path(folder, step)} is damaged: {damage}; trying the one before", stacklevel=3)
    return whole


def read_checkpoint(folder: Path, step: int) -> dict[str, object]:
    """The state saved at a step that is whole. ValueError when it was written in another format."""
    path = _path(folder, step)
    return _unflatten(_tree(path)["state"], load_file(path / TENSORS_FILE))


def peek(folder: Path, step: int, key: str) -> object:
    """A plain value at the top of the state saved at a step, without its tensors; None where it has none."""
    return dict(map(tuple, _tree(_path(folder, step))["state"]["dict"])).get(key)


def check_counts(counts: Mapping[str, object], *, where: str) -> None:
    """Raises ValueError for a number that no run can have come to: not finite, 2^53 and more, or a count below 0."""
    for name, value in counts.items():
        is_count = isinstance(value, int)
        if not (0 if is_count else -(2**53)) <= value < 2**53:  # NaN is in no range
            raise ValueError(
                f"{where}: {name} must be finite, {'>= 0 ' if is_count else ''}and < 2^53, got {value}; the checkpoint "
                "was changed: resume from the one before, or start afresh in another output.folder"
            )


def pack(state: dict[str, object]) -> Tensor:
    """The state as bytes, uint8 [n], for another process."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(state, tensors, "state"))
    # Names of tensors are numbers, so an empty one is free for the tree.
    tensors[""] = torch.frombuffer(bytearray(tree.encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save({name: tensor.contiguous() for name, tensor in tensors.items()})),
                            dtype=torch.uint8)  # fmt: skip


def unpack(message: Tensor) -> dict[str, object]:
    """What `pack` was given, on the CPU."""
    tensors = load(message.numpy().tobytes())
    return _unflatten(json.loads(tensors.pop("").numpy().tobytes()), tensors)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    matches = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _tree(folder: Path) -> dict[str, object]:
    tree = json.loads((folder / TREE_FILE).read_bytes())
    if tree["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {folder} has format {tree['format_version']!r}, this version reads {FORMAT_VERSION}; "
            "resume with the version that wrote it"
        )
    return tree


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they are as they were written."""
    try:
        sums = (folder / SUMS_FILE).read_bytes()
        lines = [_sum_line(folder / name) for name in (TENSORS_FILE, TREE_FILE)]
    except OSError as error:
        return str(error)
    for line in lines:
        if line not in sums:
            return f"{line.split()[1].decode()} does not match {SUMS_FILE}"
    return None


def _sum_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode()


def _flatten(value: object, tensors: dict[str, Tensor], where: str) -> object:
    """The value as JSON. An object has one key, its type: {"tensor": name}, {"tuple": items}, {"dict": pairs}."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [_flatten(item, tensors, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict):
        return {
            "dict": [
                (_flatten(key, tensors, f"a key of {where}"), _flatten(item, tensors, f"{where}[{key!r}]"))
                for key, item in value.items()
            ]
        }
    raise TypeError(
        f"{where} must be a tensor, None, bool, int, float, str, list, tuple or dict, got {type(value).__name__}; "
        "convert it first"
    )


def _unflatten(node: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(node, list):
        return [_unflatten(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return {_unflatten(key, tensors): _unflatten(item, tensors) for key, item in content}
