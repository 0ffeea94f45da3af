"""What is there: an adapter's manifest, a model's split, a machine's abilities. For people first, so facts by name.

Knows how to look; changes nothing and decides only what is a problem.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dvi.adapter_store import MANIFEST_FILE, read_manifest
from dvi.drafter import DRAFTER_KINDS, DrafterConfig, build_drafter
from dvi.exact import ExactSplit
from dvi.speculator import EXACT_WIDTH, SelfSpeculator
from dvi.split import SplitModel
from dvi.views import dissect

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
OPTIONAL = {"deepspeed": "training with DeepSpeed needs it: pip install 'dvi[deepspeed]'"}


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / MANIFEST_FILE).is_file()


def describe_adapter(folder: str | Path) -> dict[str, Any]:
    """The manifest of a saved drafter, and the bytes of each file beside it."""
    manifest = dataclasses.asdict(read_manifest(folder))
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return manifest | {"bytes": files}


def describe_model(name_or_path: str, *, split_layer: int | None, dtype: str = "auto") -> dict[str, Any]:
    """Where the model would be split and what the parts weigh, or {"is_splittable": False, "reason": ...}.

    draft_step_share  parameters a draft step reads over those a full step reads: the c of docs/benchmarks.md, before
                      the drafter's own. Experts all count, also those that a token does not reach.
    The model is loaded and its split checked, so this takes its memory. Raises ValueError when there is no such model.
    """
    try:
        speculator = SelfSpeculator.from_pretrained(name_or_path, split_layer=split_layer, dtype=dtype, device="cpu")
    except ValueError as error:
        if "cannot be split" not in str(error):
            raise
        return {"is_splittable": False, "reason": str(error)}
    split, layers = speculator.split, dissect(speculator.model).layers
    split_layer = split.split_layer
    shallow, deep = (sum(map(_num_parameters, part)) for part in (layers[:split_layer], layers[split_layer:]))
    head = split.head_weight_VD.numel()
    return {
        "is_splittable": True,
        "architecture": type(speculator.model).__name__,
        "dtype": str(split.dtype).removeprefix("torch."),
        "path": split.path,
        "num_layers": split.num_layers,
        "split_layer": split_layer,
        "hidden_size": split.hidden_size,
        "vocab_size": split.vocab_size,
        "is_tied": split.head_weight_VD is speculator.model.get_input_embeddings().weight,
        "has_chat_template": speculator.tokenizer.chat_template is not None,
        "max_positions": speculator.max_positions,
        "parameters": {
            "shallow": shallow, "deep": deep, "head": head, "all": _num_parameters(speculator.model),
        },
        "draft_step_share": round((shallow + head) / (shallow + deep + head), 4),
        "cache_bytes_per_position": _cache_bytes_per_position(split),
        "drafter_parameters": {
            kind: _num_parameters(build_drafter(split, DrafterConfig(kind=kind))) for kind in DRAFTER_KINDS
        },
    }


def describe_machine() -> dict[str, Any]:
    """Versions, devices and precisions; "problems" lists what is wrong, with remedies, "notes" what is only absent."""
    problems, notes = [], []
    versions = {name: _version(name) for name in ("dvi", *PACKAGES, *OPTIONAL)}
    for requirement in map(Requirement, metadata.requires("dvi") or () if versions["dvi"] else ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found or 'is missing'}: pip install '{requirement}'")
    if versions["dvi"] is None:
        notes.append("dvi is not installed, only importable: pip install -e .")
    notes += [f"{name} is missing; {remedy}" for name, remedy in OPTIONAL.items() if versions[name] is None]
    devices = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
    exact = {dtype: _exact_mode_reason(dtype) for dtype in (torch.float32, torch.float64)}
    notes += [reason for reason in exact.values() if reason is not None]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices or ["cpu"],
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bfloat16": "cuda" if devices and torch.cuda.is_bf16_supported() else "cpu" if _has_fast_cpu_bf16() else "slow",
        "exact_mode": {str(dtype).removeprefix("torch."): reason is None for dtype, reason in exact.items()},
        "problems": problems,
        "notes": notes,
    }


def facts_table(facts: Mapping[str, Any], *, title: str) -> Table:
    """Names and values, those of a nested mapping under their path."""
    table = Table("", "", title=title, show_header=False)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            for key, entry in value.items():
                table.add_row(f"{name}.{key}", _shown(entry))
        else:
            table.add_row(name, _shown(value))
    return table


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "\n".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _cache_bytes_per_position(split: SplitModel) -> int:
    """Bytes of keys and values one position takes over all layers, seen in a real cache."""
    cache, ids_11 = split.make_cache(1, 1), torch.zeros(1, 1, dtype=torch.int64, device=split.device)
    placement = cache.place(offset=0, width=1)
    split.deep(split.shallow(ids_11, cache, placement), ids_11, cache, placement)
    return cache.num_bytes


def _exact_mode_reason(dtype: torch.dtype) -> str | None:
    """Why exact mode does not hold on this machine for a small random Llama; None when it does."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        ExactSplit(SplitModel(model, split_layer=1), width=EXACT_WIDTH)
    except ValueError as error:
        return str(error)
    return None


def _has_fast_cpu_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16 on x86, BF16 on Arm)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags.split() for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
