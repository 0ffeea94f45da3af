"""What is there: an adapter's manifest, a model's split, a machine's abilities. For people first, so facts by name.

Knows how to look; changes nothing and decides only what is a problem.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from dvi import software
from dvi.config import load_config
from dvi.decode.precision import choose_weights, known_dtype
from dvi.decode.speculator import SelfSpeculator
from dvi.inspect.memory_plan import DEVICE_GB, SplitShape
from dvi.model.adapter_store import MANIFEST_FILE, read_manifest
from dvi.model.context import max_positions_of, why_shorter
from dvi.model.drafter import DRAFTER_KINDS, DrafterConfig
from dvi.model.exact import exact_passes
from dvi.model.gguf import bytes_of_layers, find_gguf
from dvi.model.native.library import why_none
from dvi.model.pretrained import read_config, read_tokenizer
from dvi.model.split import SplitModel
from dvi.model.starting_drafter import choose_split_layer, settle_adapter
from dvi.records import LearnerMemory
from dvi.settings import LearningSettings, ServeConfig, TrainConfig

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "gguf")
OPTIONAL = {"fastapi": ("serve", "a server"), "deepspeed": ("deepspeed", "training with DeepSpeed")}  # extra, what for

CHECKED_BYTES = 2**30  # of weights: a model up to this size is loaded and its split checked, unasked
USUAL_POSITIONS = 4096  # of a row where nothing else is said: prompt and answer of all but few requests


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / MANIFEST_FILE).is_file()


def describe_adapter(folder: str | Path) -> dict[str, Any]:
    """The manifest of a saved drafter, and the bytes of each file beside it."""
    manifest = dataclasses.asdict(read_manifest(folder))
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return manifest | {"bytes": files}


def describe_model(
    name_or_path: str,
    settings: TrainConfig | ServeConfig | None = None,
    *,
    dtype: str | None = None,
    positions: int | None = None,
    check: bool | None = None,
    learner_memory: Callable[[LearningSettings, SplitModel], LearnerMemory],
) -> dict[str, Any]:
    """Where the model is split, what the parts weigh and what a run of these settings takes on a device; or
    {"is_splittable": False, "reason": ...}.

    name_or_path  a folder, of which config.json is enough, or a hub id. settings.model.path is not looked at.
    settings      of a run or a server: split layer, drafter, rows, replay ...; default those of `dvi train`.
    dtype         None is that of the settings, whose "auto" is known only where it need not be measured or has been;
                  else, and "auto" here, the one the weights are stored in.
    positions     cached positions of each row; default up to 4096 of a run, an equal share of a server's.
    check         load the weights and compare the split with the plain model, which takes the model's memory; None
                  does so for a small model in a local folder. Without it the shape alone is looked at, and a model
                  whose forward hides something may still turn out not to be splittable.
    learner_memory  what a learner keeps, asked where the settings have one: `trainers.learning.memory.learner_memory`.
    Raises ValueError when there is no such model, and for settings that do not fit it.
    """
    settings = settings or TrainConfig()
    config = read_config(name_or_path)
    model = dataclasses.replace(settings.model, path=str(name_or_path))
    settings = settle_adapter(dataclasses.replace(settings, model=model))
    dtype = dtype or known_dtype(name_or_path, settings, config) or "auto"
    dtype = _dtype_of(config) if dtype == "auto" else getattr(torch, dtype)
    split_layer, path = settings.model.split_layer, settings.model.path_kind
    if split_layer is None:
        split_layer = choose_split_layer(config, settings.drafter.adapter)
    file = find_gguf(name_or_path)
    weights = "dense" if file is None else choose_weights(
        name_or_path, config, weights=settings.model.weights, dtype=str(dtype).removeprefix("torch."),
        device=settings.model.device, placement=settings.model.placement, path=path,
    )  # fmt: skip
    try:
        shape = SplitShape(
            config, dtype=dtype, split_layer=split_layer, path=path,
            block_bytes=bytes_of_layers(file) if weights == "blocks" else None,
        )
        demand = _demand(settings, positions, longest=max_positions_of(config.get_text_config()))
        drafter = _drafter_config(settings)
        plan = shape.plan_memory(
            drafter=drafter, learning=settings.train, num_draft_tokens=settings.draft.num_draft_tokens,
            learner_memory=learner_memory, **demand,
        )
        if check is None:
            check = plan.layers + plan.other_weights <= CHECKED_BYTES and any(Path(name_or_path).glob("*.safetensors"))
        if check:
            SelfSpeculator.from_pretrained(
                name_or_path, split_layer=split_layer, dtype=dtype, weights=weights, device="cpu", path=path
            )
    except ValueError as error:
        if "cannot be split" not in str(error):
            raise
        return {"is_splittable": False, "reason": str(error)}
    split, counts = shape.split, shape.count_parameters(drafter)
    return {
        "is_splittable": True,
        "is_checked": check,
        "architecture": type(split.model).__name__,
        "dtype": str(split.dtype).removeprefix("torch."),
        "weights": weights,
        "path": split.path,
        "num_layers": split.num_layers,
        "split_layer": split_layer,
        "hidden_size": split.hidden_size,
        "vocab_size": split.vocab_size,
        "is_tied": split.model.get_output_embeddings().weight is split.model.get_input_embeddings().weight,
        "has_chat_template": _has_chat_template(name_or_path),
        "max_positions": max_positions_of(config.get_text_config()),
        "why_shorter": why_shorter(config.get_text_config()),
        "parameters": dataclasses.asdict(counts),
        "draft_step_share": round(counts.draft_step_share, 4),
        "cache_bytes_per_position": shape.cache_bytes_per_position,
        "drafter_parameters": {
            kind: shape.count_parameters(dataclasses.replace(drafter, kind=kind)).drafter for kind in DRAFTER_KINDS
        },
        "update_bytes": {
            name: counts.drafter_trimmed * getattr(torch, name).itemsize for name in ("float32", "bfloat16")
        },
        "demand": demand,
        "memory": dataclasses.asdict(plan) | {"total": plan.total},
        "devices": {f"{size} GB": shape.devices_needed(plan, device_gb=size) for size in DEVICE_GB},
    }


def load_settings(path: str | Path, overrides: Iterable[str]) -> TrainConfig | ServeConfig:
    """Settings of a server from a file with a section `serve`, else of a run. Raises what `load_config` raises."""
    is_server = any(line.startswith("serve:") for line in Path(path).read_text(encoding="utf-8").splitlines())
    return load_config(path, overrides, schema=ServeConfig if is_server else TrainConfig)


def memory_table(facts: Mapping[str, Any]) -> Table:
    """The memory plan of `describe_model` for people, largest part first, and which devices hold it."""
    demand, parts = facts["demand"], dict(facts["memory"])
    total = parts.pop("total")
    unit, size = ("GB", 10**9) if total >= 10**9 else ("MB", 10**6)
    table = Table("on each device", unit, title=f"{demand['rows']} rows of {demand['positions']:,} positions")
    table.columns[1].justify = "right"
    for name, num_bytes in sorted(parts.items(), key=lambda part: -part[1]):
        if num_bytes:
            table.add_row(name.replace("_", " "), f"{num_bytes / size:.2f}")
    table.add_section()
    table.add_row("total", f"{total / size:.2f}")
    table.add_section()
    for name, count in facts["devices"].items():
        fit = "too small" if count is None else "1 is enough" if count == 1 else f"{count}, tensor parallel"
        table.add_row(f"devices of {name}", fit)
    return table


def describe_machine() -> dict[str, Any]:
    """Versions, devices and precisions; "problems" lists what is wrong, with remedies, "notes" what is only absent."""
    problems, notes = [], []
    versions, required = software.versions_of(("dvi", *PACKAGES, *OPTIONAL)), software.requirements()
    for requirement in map(Requirement, required or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = software.version_of(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found or 'is missing'}: pip install '{requirement}'")
    if required is None:
        notes.append("dvi is not installed, only importable: pip install -e .")
    notes += [
        f"{name} is missing; {purpose} needs it: {software.install_extra(extra)}"
        for name, (extra, purpose) in OPTIONAL.items() if versions[name] is None
    ]  # fmt: skip
    devices = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
    without_kernels = why_none()
    if without_kernels is not None:
        notes.append(f"Llama-shaped models are decoded without compiled kernels, slower: {without_kernels}")
    exact = {dtype: _exact_mode_reason(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    notes += [reason for reason in exact.values() if reason is not None]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices or ["cpu"],
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bfloat16": "cuda" if devices and torch.cuda.is_bf16_supported() else "cpu" if _has_fast_cpu_bf16() else "slow",
        "compiled_kernels": without_kernels is None,
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


def _demand(settings: TrainConfig | ServeConfig, positions: int | None, *, longest: int) -> dict[str, int]:
    """The rows and positions of `SplitShape.plan_memory`. longest: positions of the model's context."""
    if isinstance(settings, ServeConfig):
        serve = settings.serve
        usual, prefixes = serve.max_positions // serve.max_rows, serve.prefix_cache_positions
        return {"rows": serve.max_rows, "positions": positions or min(usual, longest), "prefix_positions": prefixes}
    return {"rows": settings.data.batch_size, "positions": positions or min(USUAL_POSITIONS, longest)}


def _drafter_config(settings: TrainConfig | ServeConfig) -> DrafterConfig:
    if settings.drafter.adapter is not None:
        return read_manifest(settings.drafter.adapter).drafter
    names = (field.name for field in dataclasses.fields(DrafterConfig))
    return DrafterConfig(**{name: getattr(settings.drafter, name) for name in names})


def _dtype_of(config: PretrainedConfig) -> torch.dtype:
    """The one the weights are stored in; float32 where the config does not say."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _has_chat_template(name_or_path: str) -> bool | None:
    """None where there is no tokenizer beside the config."""
    try:
        return read_tokenizer(name_or_path).chat_template is not None
    except (OSError, ValueError):
        return None


def _exact_mode_reason(dtype: torch.dtype) -> str | None:
    """Why exact mode does not hold on this machine for a small random Llama; None when it does."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=128,
        max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        exact_passes(SplitModel(model, split_layer=1))
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
