"""A model's config, tokenizer and weights by its name: a Hugging Face folder, a hub id, or a GGUF file or its folder.

The one place that tells these apart. Knows files and transformers; `source` are transformers' own arguments, such as
revision and trust_remote_code, which mean nothing to a GGUF file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dvi.model import gguf
from dvi.model.blocks import BYTES


def read_config(name_or_path: str | Path, **source: object) -> PretrainedConfig:
    """Raises ValueError when there is no such folder or file, and for models that do not decode from the left."""
    file = gguf.find_gguf(name_or_path)
    if file is None and not Path(name_or_path).is_dir() and str(name_or_path).startswith((".", "/", "checkpoints/")):
        raise ValueError(
            f"no model folder at {name_or_path}; give a Hugging Face folder, a GGUF file or a hub id"
            + ("; dvi model get makes those it knows" if str(name_or_path).startswith("checkpoints/") else "")
        )
    config = AutoConfig.from_pretrained(name_or_path, **source) if file is None else gguf.read_config(file)
    if config.is_encoder_decoder:
        raise ValueError(f"{name_or_path} is an encoder-decoder model; only decoder-only models can be split")
    return config


def read_tokenizer(name_or_path: str | Path, **source: object) -> PreTrainedTokenizerBase:
    file = gguf.find_gguf(name_or_path)
    return AutoTokenizer.from_pretrained(name_or_path, **source) if file is None else gguf.read_tokenizer(file)


def why_no_blocks(name_or_path: str | Path, config: PretrainedConfig, *, path: str) -> str | None:
    """Why the model cannot be decoded from a file's quantised blocks; None where it can be. path: of `SplitModel`."""
    from dvi.model.native.path import NativePath

    file = gguf.find_gguf(name_or_path)
    if file is None:
        return "it is no GGUF file"
    if gguf.bytes_of_layers(file) is None:
        return f"none of its layers' weights is {', '.join(BYTES)}"
    if path not in ("auto", "native"):
        return f"path {path!r} reads dense weights"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return None if NativePath.takes(model, torch.bfloat16) else f"blocks are for {NativePath.TAKES}"


def read_weights(
    name_or_path: str | Path, *, dtype: torch.dtype, with_blocks: bool = False,
    placed: dict[str, object] | None = None, **source: object,
) -> PreTrainedModel:
    """The causal language model in eval mode, on the CPU or where `placed`, further arguments, has it put.

    with_blocks: of a GGUF file, see `dvi.model.gguf.read_model`.
    Raises ValueError for a GGUF file that is to be placed, and for one that transformers cannot read.
    """
    file = gguf.find_gguf(name_or_path)
    if file is None:
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **placed or {}, **source).eval()
    if placed:
        refuse_gguf(name_or_path)
    return gguf.read_model(file, dtype=dtype, with_blocks=with_blocks)


def refuse_gguf(name_or_path: str | Path) -> None:
    """For placements over several devices. Raises ValueError for a GGUF file."""
    file = gguf.find_gguf(name_or_path)
    if file is not None:
        raise ValueError(
            f"{file} goes onto a single device; for other placements convert it once: dvi model get --file {file}"
        )
