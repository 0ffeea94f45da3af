"""A Hugging Face folder of a GGUF file: safetensors, config, tokenizer, chat template, and a card that says whence.

Knows files and where they came from; the folder appears whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from dvi.model import gguf
from dvi.progress import doing

SOURCE_FILE = "dvi_source.json"
# Against dequantised float32 weights, SmolLM2 in Q4_1: 720 of 724 greedy tokens of 16 answers are equal, KL 5e-5 nats,
# the answers' own loss the same to 1e-4. float16: 723, KL 2e-6, but CPUs do not compute in it. bfloat16 arithmetic
# itself costs 25 times that (KL 1.2e-3).
DTYPE = torch.bfloat16
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class ModelSource:
    """Where a converted model comes from.

    title     of the model. file, sha256 of the GGUF.
    base      the hub's name of the model as it was trained, licence its terms, where they are known.
    obtained  how the file was had, a sentence for the card.
    """

    title: str
    file: str
    sha256: str
    base: str | None = None
    licence: str | None = None
    obtained: str | None = None


def read_source(folder: Path) -> ModelSource | None:
    """What a converted folder was made of; None when `convert` did not make it."""
    try:
        return ModelSource(**json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def convert(file: Path, folder: Path, source: ModelSource) -> None:
    """Writes the model in `file` into `folder`, an empty one.

    Raises ValueError for a file that cannot be read, OSError when the disk refuses.
    """
    with doing(f"reading the tokenizer of {file.name}"):
        tokenizer = gguf.read_tokenizer(file)
    with doing(f"reading {file.name}", noun="tensors") as stage:

        def tell(done: int, total: int) -> None:
            stage.total = total
            stage.advance(done - stage.done)

        model = gguf.read_model(file, dtype=DTYPE, report=tell)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which else warns that it looked
    with doing("writing safetensors"), refusing_a_full_disk(folder):
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
        (folder / SOURCE_FILE).write_text(json.dumps(asdict(source), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(source, num_parameters=model.num_parameters()), encoding="utf-8")


@contextmanager
def refusing_a_full_disk(folder: Path) -> Iterator[None]:
    """An OSError of a full disk, with where it is full and what helps."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            where = f"the disk of {folder.parent} is full"
            raise OSError(f"{where}; make room, or give --output on another disk") from error
        raise


def _card(source: ModelSource, *, num_parameters: int) -> str:
    licence, base = source.licence, source.base
    header = [*([f"license: {licence}"] if licence else ()), *([f"base_model: {base}"] if base else ())]
    lines = [
        *(["---", *header, "---"] if header else ()),
        f"# {source.title}",
        "",
        f"{num_parameters / 1e6:.1f} M parameters, dequantised from `{source.file}` to bfloat16 by `dvi model get`: as "
        "good as the quantised weights, not as those it was quantised from.",
        "",
        f"Model: {base or 'as the file says: ' + source.title}. Licence: {licence or 'not said in the file'}.",
        *([source.obtained] if source.obtained else ()),
        f"SHA-256 of the file: {source.sha256}.",
    ]
    return "\n".join(lines) + "\n"
