"""Drafters on disk: a PEFT adapter with a manifest, whole or not at all, and never a pickle.

Knows files, tensors and which backbone a drafter fits; knows nothing of decoding or learning. A saved folder holds
    adapter_config.json, adapter_model.safetensors   the low-rank head correction, for PEFT alone to load on any module
                                                     with a linear layer named `draft_head`
    drafter_extra.safetensors                        the drafter's other tensors under their state-dict names
    dvi_manifest.json, README.md                     what it fits (`AdapterManifest`), for machines and for people
A folder is staged beside its place, read back, synced and renamed, so a crash leaves the old drafter or the new one,
and what does not come back as it was leaves nothing.
"""
# D hidden, R rank, V draft vocabulary (trimmed or full).

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import safetensors.torch
import torch
from annotated_types import Ge, Le
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from torch import Tensor, nn

from dvi.durable import staged_folder, surviving_folder, write_tensors
from dvi.model.drafter import MAX_VERSION, MAX_VOCAB, MAX_WIDTH, DrafterConfig, build_drafter
from dvi.software import versions_of

if TYPE_CHECKING:  # reading a manifest needs no transformers, which takes seconds to import
    from dvi.model.split import SplitModel

FORMAT_VERSION = 1
MANIFEST_FILE = "dvi_manifest.json"
ADAPTER_FILE = "adapter_model.safetensors"
EXTRA_FILE = "drafter_extra.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAX_HEADER_BYTES = 1 << 20  # a drafter has some ten tensors; a longer safetensors header is an attack or damage
MAX_MANIFEST_BYTES = 1 << 20  # one is some 3 kB
MAX_LAYERS = 1 << 16

TENSOR_FILES = (ADAPTER_FILE, EXTRA_FILE)
TOKEN_IDS = "draft_head.draft_token_ids_V"
PEFT_NAMES = {f"draft_head.{name}": f"base_model.model.draft_head.{name}.weight" for name in ("lora_A", "lora_B")}


@dataclass(frozen=True)
class AdapterManifest:
    """What a saved drafter is and which backbone it fits.

    drafter           its shape; drafter_version counts publishes.
    base_model        hub id or path as the user gave it; base_revision the hub's commit, where it is known.
    head_fingerprint  SHA-256 of the head the drafter corrects, which depends on dtype, the backbone's.
    sha256            of each tensor file, by name.
    metrics, config   whatever the run wants remembered.
    created           ISO 8601, UTC. software: versions by package name.
    has_learnt_lossy  it learnt, here or before, from text in which only a lossy verify rule let some tokens pass.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}

    format_version: int
    drafter: DrafterConfig
    drafter_version: Annotated[int, Ge(0), Le(MAX_VERSION)]
    base_model: str
    base_revision: str | None
    architecture: str
    dtype: str
    head_fingerprint: str
    split_layer: Annotated[int, Ge(0), Le(MAX_LAYERS)]
    num_layers: Annotated[int, Ge(1), Le(MAX_LAYERS)]
    hidden_size: Annotated[int, Ge(1), Le(MAX_WIDTH)]
    vocab_size: Annotated[int, Ge(1), Le(MAX_VOCAB)]
    sha256: dict[str, str]
    metrics: dict[str, Any]
    config: dict[str, Any]
    created: str
    software: dict[str, str | None]
    has_learnt_lossy: bool = False


def save_drafter(
    folder: str | Path,
    drafter: nn.Module,
    split: SplitModel,
    *,
    base_model: str,
    metrics: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes the drafter to `folder`, in place of a drafter saved there before. One writer at a time.

    Raises ValueError when `folder` holds files that this would delete, or when what was written does not come back bit
    for bit, OSError when the disk refuses; what was there then stays as it was.
    """
    from peft import LoraConfig  # seconds to import, and only saving needs it

    tensors = drafter.state_dict()
    with staged_folder(folder) as staging:
        write_tensors(staging / ADAPTER_FILE, {PEFT_NAMES[name]: tensors.pop(name) for name in PEFT_NAMES})
        write_tensors(staging / EXTRA_FILE, tensors)
        LoraConfig(
            r=drafter.config.lora_rank,
            lora_alpha=drafter.config.lora_alpha,
            target_modules=["draft_head"],
            base_model_name_or_path=base_model,
            inference_mode=True,
        ).save_pretrained(staging)
        manifest = AdapterManifest(
            format_version=FORMAT_VERSION,
            drafter=drafter.config,
            drafter_version=drafter.version,
            base_model=base_model,
            base_revision=getattr(split.model.config, "_commit_hash", None),
            **_backbone_facts(split),
            sha256={name: sha256_of((staging / name).read_bytes()) for name in TENSOR_FILES},
            metrics=metrics or {},
            config=config or {},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            software=versions_of(("dvi", "torch", "transformers", "peft")),
            has_learnt_lossy=drafter.has_learnt_lossy,
        )
        (staging / MANIFEST_FILE).write_bytes(TypeAdapter(AdapterManifest).dump_json(manifest, indent=2) + b"\n")
        is_trimmed = drafter.draft_head.draft_token_ids_V is not None
        (staging / "README.md").write_text(_model_card(manifest, is_trimmed=is_trimmed), encoding="utf-8")
        _check_comes_back(staging, drafter, manifest, folder)


def _check_comes_back(staging: Path, drafter: nn.Module, manifest: AdapterManifest, folder: str | Path) -> None:
    """Reads what was just written. Raises ValueError unless it is the drafter and its vocabulary, to the bit."""
    try:
        found, expected = read_manifest(staging), drafter.state_dict()
        for name in ("drafter", "drafter_version", "sha256", "has_learnt_lossy"):
            if getattr(found, name) != getattr(manifest, name):
                raise ValueError(f"{name} is {getattr(found, name)!r} and was {getattr(manifest, name)!r}")
        tensors = _named_tensors(staging, found)
        _check_tensors(tensors, expected, staging)
        for name, tensor in tensors.items():
            if not torch.equal(tensor, expected[name].cpu()):
                raise ValueError(f"{name} is not what it was")
    except ValueError as error:
        reason = str(error).replace(str(staging), str(folder))
        raise ValueError(f"the drafter written for {folder} does not come back, so it is not kept: {reason}") from error


def load_drafter(folder: str | Path, split: SplitModel) -> nn.Module:
    """The drafter saved in `folder`, published at its saved version, beside the backbone it was trained on.

    Raises ValueError, with the reason and the remedy, when anything is missing, damaged, unsafe, not finite or made
    for another backbone.
    """
    folder = surviving_folder(folder)
    manifest = read_manifest(folder)
    _check_backbone(manifest, split, folder)
    tensors = _named_tensors(folder, manifest)
    _check_claimed_sizes(tensors, manifest.drafter, folder)
    token_ids_V = tensors.get(TOKEN_IDS)
    if token_ids_V is not None:
        _check_token_ids(token_ids_V, split.vocab_size, folder)
        token_ids_V = token_ids_V.to(split.device)
    drafter = build_drafter(split, manifest.drafter, draft_token_ids_V=token_ids_V)
    _check_tensors(tensors, drafter.state_dict(), folder)
    drafter.load_state_dict(tensors)
    drafter.publish(drafter, manifest.drafter_version)
    drafter.has_learnt_lossy = manifest.has_learnt_lossy
    return drafter


def read_manifest(folder: str | Path) -> AdapterManifest:
    """What the drafter saved in `folder` is. Raises ValueError when there is none, or one that must not be loaded."""
    folder = surviving_folder(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no adapter folder {folder}; give the folder that a drafter was saved to")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ValueError(f"{path} may be a pickle, which runs any code when loaded; keep safetensors files only")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing, so nothing tells what the drafter fits; save it with save_drafter")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path} must be <= {MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}; do not use it")
    text = path.read_bytes()
    try:
        fields = from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); save the drafter again") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version!r}, this dvi reads {FORMAT_VERSION}; use the dvi that wrote it")
    try:
        return TypeAdapter(AdapterManifest).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message, found = first["msg"].removeprefix("Value error, "), repr(first["input"])
        got = "" if first["type"] in ("missing", "value_error") else f", got {found[:40]}"
        raise ValueError(f"{path} is not valid: {where}: {message}{got}; save the drafter again") from error


def _backbone_facts(split: SplitModel) -> dict[str, Any]:
    """What must be equal for a drafter to fit: the manifest's fields about the backbone."""
    return {
        "architecture": type(split.model).__name__,
        "num_layers": split.num_layers,
        "hidden_size": split.hidden_size,
        "vocab_size": split.vocab_size,
        "split_layer": split.split_layer,
        "dtype": str(split.dtype).removeprefix("torch."),
        "head_fingerprint": split.head_fingerprint(),
    }


def _check_backbone(manifest: AdapterManifest, split: SplitModel, folder: Path) -> None:
    for name, found in _backbone_facts(split).items():
        wanted = getattr(manifest, name)
        if found != wanted:
            revision = f" at revision {manifest.base_revision}" if manifest.base_revision else ""
            raise ValueError(
                f"{folder} was trained with {name} {wanted!r}, this model has {found!r}; load {manifest.base_model}"
                f"{revision} with split_layer={manifest.split_layer} in {manifest.dtype}, or train a new drafter"
            )


def _named_tensors(folder: Path, manifest: AdapterManifest) -> dict[str, Tensor]:
    """The saved tensors under their state-dict names; the manifest's sizes bound what is read."""
    rank, width = manifest.drafter.lora_rank, manifest.drafter.anchor_hidden
    hidden_size, vocab_size = manifest.hidden_size, manifest.vocab_size
    # Correction, token ids, MLP with its depths, norm with room to spare: no drafter of this shape is larger.
    largest = 4 * (rank + 2) * (hidden_size + vocab_size) + 12 * (width + 16) * (hidden_size + 16) + MAX_HEADER_BYTES
    tensors: dict[str, Tensor] = {}
    for file in TENSOR_FILES:
        tensors |= _read_tensors(folder / file, manifest, largest)
    for name, peft_name in PEFT_NAMES.items():
        if peft_name in tensors:
            tensors[name] = tensors.pop(peft_name)
    return tensors


def _read_tensors(path: Path, manifest: AdapterManifest, largest: int) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole folder again")
    if path.stat().st_size > largest:
        raise ValueError(
            f"{path} must be <= {largest} bytes for a drafter of this shape, got {path.stat().st_size}; do not use it"
        )
    # Read once: what is hashed is what is parsed, and a file cut short under a memory map would kill the process.
    content = path.read_bytes()
    wanted, found = manifest.sha256.get(path.name), sha256_of(content)
    if found != wanted:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, the manifest says {wanted}; copy it again")
    header_bytes = int.from_bytes(content[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{path} must have a header of <= {MAX_HEADER_BYTES} bytes, got {header_bytes}; do not use it")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); do not use it") from error


def _check_claimed_sizes(tensors: dict[str, Tensor], config: DrafterConfig, folder: Path) -> None:
    # Before anything is built: a manifest that lies about sizes must not make us allocate them.
    sizes = {"draft_head.lora_A": ("lora_rank", config.lora_rank)}
    if config.kind != "lora_head":
        sizes["from_hidden.weight"] = ("anchor_hidden", config.anchor_hidden)
    for name, (setting, size) in sizes.items():
        shape = list(tensors[name].shape) if name in tensors else None
        if not shape or shape[0] != size:
            raise ValueError(f"{folder}: {name} must have {setting}={size} rows, got shape {shape}; do not use it")


def _check_token_ids(token_ids_V: Tensor, vocab_size: int, folder: Path) -> None:
    is_list = token_ids_V.dtype == torch.int64 and token_ids_V.dim() == 1 and len(token_ids_V) > 0
    if not is_list or not (token_ids_V.diff() > 0).all() or token_ids_V[0] < 0 or token_ids_V[-1] >= vocab_size:
        raise ValueError(f"{folder}: {TOKEN_IDS} must be ascending int64 ids in 0..{vocab_size - 1}; do not use it")


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ValueError(f"{folder} must hold this drafter's tensors and no others; missing {missing}, extra {extra}")
    for name, tensor in tensors.items():
        wanted, found = (f"{t.dtype} {list(t.shape)}" for t in (expected[name], tensor))
        if found != wanted:
            raise ValueError(f"{folder}: {name} must be {wanted}, got {found}; do not use it")
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} holds NaN or infinity; use one saved before its training diverged")


def _model_card(manifest: AdapterManifest, *, is_trimmed: bool) -> str:
    base, drafter = json.dumps(manifest.base_model), manifest.drafter  # JSON strings are also YAML's and Python's
    metrics = "".join(f"| {name} | {value} |\n" for name, value in manifest.metrics.items())
    table = f"\n| metric | value |\n|---|---|\n{metrics}" if metrics else ""
    origin = "It learnt in part from text that a lossy verify rule let pass.\n" if manifest.has_learnt_lossy else ""
    rest = "is its norm, and what reads the verifier's hidden state, which only dvi has at hand."
    if drafter.kind == "lora_head":
        rest = "is its norm. For **transformers** `dvi export --standalone` makes both a draft model of its own."
    rows = "" if not is_trimmed else f'[load_file(f"{{folder}}/{EXTRA_FILE}")["{TOKEN_IDS}"]]'
    return f"""---
library_name: dvi
base_model: {base}
tags: [dvi, speculative-decoding]
---
# A DVI drafter for {manifest.base_model}

It drafts tokens from layer {manifest.split_layer} of {manifest.num_layers} for the other layers to verify, so it
changes how fast the model decodes, not what. Made for {manifest.architecture} in {manifest.dtype}, revision
{manifest.base_revision or "not recorded"}.

Kind `{drafter.kind}`, rank {drafter.lora_rank}, version {manifest.drafter_version}, saved {manifest.created}.
`{MANIFEST_FILE}` says what it was trained on and how.
{origin}
## What loads it

**dvi** loads all of it, and only dvi drafts with it:

```python
from dvi import SelfSpeculator

folder = "."  # where this file lies
speculator = SelfSpeculator.from_pretrained(
    {base}, split_layer={manifest.split_layer}, dtype="{manifest.dtype}", adapter=folder
)
```

**peft** loads a part: `{ADAPTER_FILE}`, the low-rank correction of the draft head, on a module that has a linear layer
named `draft_head`. It is refused on the base model itself, which has none, and that is meant: the correction on the
model's own head would change what the model says. The rest, in `{EXTRA_FILE}`,
{rest}

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = "."  # where this file lies
base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{manifest.dtype})
weight = base.get_output_embeddings().weight.detach(){rows}
head = torch.nn.ModuleDict({{"draft_head": torch.nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)}})
head["draft_head"].weight.data = weight
corrected = PeftModel.from_pretrained(head, folder).base_model.model["draft_head"]  # normed states to draft logits
```
{table}"""


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
