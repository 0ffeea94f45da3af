"""What a run starts from: the drafter that lies beside the model, where drafter.adapter is "auto", or an untrained one;
and the cut, if nobody names it.

Knows settings, manifests and the names of a model's weights; loads no model.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dvi.config import setting_of_run
from dvi.durable import surviving_folder
from dvi.model.adapter_store import MANIFEST_FILE, AdapterManifest, load_drafter, read_manifest
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.exact import may_be_exact
from dvi.model.pretrained import read_config
from dvi.model.split import SplitModel, fingerprint_of_head
from dvi.progress import doing
from dvi.settings import AUTO_ADAPTER, LearningSettings, ModelSettings, ServeConfig, TrainConfig, WarmupConfig

Config = TypeVar("Config", bound=TrainConfig | ServeConfig | WarmupConfig)

log = logging.getLogger(__name__)


def settle_adapter(config: Config, *, dtype: str | None = None) -> Config:
    """The settings with the folder, or null, that "auto" is. A drafter that lies there and is not taken is warned of.

    dtype: in which a run that is gone on with has the model, where model.dtype is "auto".
    """
    if config.drafter.adapter != AUTO_ADAPTER:
        return config
    beside = drafter_beside(config.model.path)
    reason = None if beside is None else _why_not(beside, config, dtype)
    if reason is not None:
        log.warning("the drafter in %s is not taken: %s; an untrained one starts", beside, reason)
        beside = None
    return with_adapter(config, beside)


def with_adapter(config: Config, adapter: str | None) -> Config:
    """The settings with another drafter.adapter."""
    return dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, adapter=adapter))


def adapter_of_run(folder: str | Path) -> str | None:
    """The one in the config.yaml that a run left in its folder; None where it began untrained, or left none."""
    adapter = setting_of_run(folder, "drafter", "adapter")
    return None if adapter == AUTO_ADAPTER else adapter


def drafter_beside(model_path: str) -> str | None:
    """MODEL-drafter for a model's folder MODEL; None where there is no drafter, and for models that are no folder."""
    folder = Path(model_path)
    if not folder.is_dir():
        return None
    if folder.name in ("", ".."):
        folder = folder.resolve()
    beside = folder.with_name(f"{folder.name}-drafter")
    return str(beside) if (surviving_folder(beside) / MANIFEST_FILE).is_file() else None


def _why_not(adapter: str, config: Config, dtype: str | None) -> str | None:
    """Why the drafter does not suit these settings and this model; None where it does."""
    try:
        manifest = read_manifest(adapter)
    except ValueError as error:
        return str(error)
    model = config.model
    dtype = model.dtype if model.dtype != "auto" else dtype
    if model.split_layer not in (None, manifest.split_layer):
        return f"it drafts from layer {manifest.split_layer}, model.split_layer is {model.split_layer}"
    if dtype not in (None, manifest.dtype):
        return f"it was trained in {manifest.dtype}, model.dtype is {dtype}"
    usual = type(config)().drafter
    for name, found in dataclasses.asdict(manifest.drafter).items():
        # Only what differs from its default was asked for.
        if getattr(config.drafter, name) not in (found, getattr(usual, name)):
            return f"its {name} is {found}, drafter.{name} is {getattr(config.drafter, name)}"
    trust = isinstance(config, ServeConfig) and config.serve.trust_remote_code
    with doing(f"looking whether {adapter} fits"):
        return _why_not_of_model(manifest, model, trust_remote_code=trust)


def _why_not_of_model(manifest: AdapterManifest, settings: ModelSettings, **source: object) -> str | None:
    """Why the model is not the one that the drafter was trained with, as `load_drafter` would find with it loaded; or
    does not decode so in its dtype."""
    model_path, dtype = settings.path, getattr(torch, manifest.dtype)
    try:
        model_config = read_config(model_path, **source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, **source)
        architecture, num_layers = type(model).__name__, model_config.get_text_config().num_hidden_layers
        if (architecture, num_layers) != (manifest.architecture, manifest.num_layers):
            return (
                f"it was trained with {manifest.num_layers} layers of {manifest.architecture}, {model_path} has "
                f"{num_layers} of {architecture}"
            )
        if settings.mode == "exact" and not may_be_exact(model, dtype, device=settings.device, path=settings.path_kind):
            return f"it was trained in {manifest.dtype}, model.mode is exact, which this model is not in that here"
        fingerprint = _fingerprint_on_disk(Path(model_path), model, dtype=dtype)
    except (AttributeError, OSError, SafetensorError, ValueError) as error:
        return f"{model_path} does not tell whether it fits ({error})"
    if fingerprint is None:
        return f"{model_path} does not tell whether it fits; if it does, drafter.adapter names it"
    return None if fingerprint == manifest.head_fingerprint else f"it was trained with other weights than {model_path}"


def _fingerprint_on_disk(folder: Path, model: PreTrainedModel, *, dtype: torch.dtype) -> str | None:
    """Of the output head, which alone is read; None where no safetensors file here holds it under its own name.

    model: of this shape, without weights.
    """
    weights = [model.get_output_embeddings().weight]
    if model.config.get_text_config().tie_word_embeddings:
        weights.append(model.get_input_embeddings().weight)
    entries = model.state_dict(keep_vars=True).items()
    names = {name for name, tensor in entries if any(tensor is weight for weight in weights)}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(names.intersection(file.keys())):
                return fingerprint_of_head(file.get_tensor(name).to(dtype))
    return None


def make_drafter(
    split: SplitModel, config: DrafterConfig | None = None, *, adapter: str | Path | None = None,
    seed: int = LearningSettings.seed,
) -> nn.Module:
    """A drafter that serves: the adapter's, else an untrained one. Raises ValueError as `load_drafter` does."""
    if adapter is not None:
        drafter = load_drafter(adapter, split)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drafter = build_drafter(split, config or DrafterConfig())
        drafter.publish(drafter, version=0)
    return drafter.requires_grad_(False)


def choose_split_layer(config: PretrainedConfig, adapter: str | Path | None) -> int:
    """Where to cut a model if nobody says: where the adapter was trained, else by `default_split_layer`."""
    if adapter is not None:
        return read_manifest(adapter).split_layer
    return default_split_layer(config.get_text_config().num_hidden_layers)


def default_split_layer(num_layers: int) -> int:
    """One layer in sixteen. An anchored drafter gains little acceptance from more, and every shallow layer is paid for
    at every drafted token: measured on the bundled model, docs/benchmarks.md; two of 32 layers is the paper's cut."""
    return num_layers // 16
