"""Models in one GGUF file, read through transformers: which file a name means, its config, tokenizer and weights.

What comes out is what a Hugging Face folder of the same model gives: dense weights, and a config that knows nothing of
GGUF. What transformers cannot read is refused with the reason. Reading takes several times as long as reading
safetensors: `dvi model get --file` converts once.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dvi.model.blocks import BYTES, Blocks

SUFFIX = ".gguf"
WEIGHT_SUFFIXES = (".safetensors", ".bin")
# llama.cpp's names of tokenizers that take every digit by itself and then split as GPT-2 does; transformers leaves the
# digits together, which changes how spaces before them are split.
DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})

_LINEAR_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "output": "lm_head", "token_embd": "embedding",
}  # fmt: skip
_LINEAR = re.compile(rf"(?P<layers>(?:blk\.\d+\.)?)(?P<part>{'|'.join(_LINEAR_NAMES)})\.weight")

Report = Callable[[int, int], None]  # told how many tensors are read, of how many


def find_gguf(name_or_path: str | Path) -> Path | None:
    """The GGUF file that a model's name means: itself, or the one in a folder without other weights. None: no GGUF.

    Raises ValueError for a file that is not there, and for a folder of several.
    """
    path = Path(name_or_path)
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give a GGUF file, a Hugging Face folder or a hub id")
        return path
    if not path.is_dir():
        return None
    files = sorted(path.iterdir())
    found = [file for file in files if file.suffix.lower() == SUFFIX]
    if not found or any(file.suffix in WEIGHT_SUFFIXES for file in files):
        return None
    if len(found) > 1:
        raise ValueError(
            f"{path} holds {len(found)} GGUF files, {', '.join(file.name for file in found)}; give the path of one"
        )
    return found[0]


def read_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata by llama.cpp's keys, arrays of strings as their lengths. Raises ValueError as all here do."""
    if find_spec("gguf") is None:
        raise ValueError(f"{path} cannot be read without the package gguf; pip install gguf")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the path of a GGUF file")
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with _refusing(path):
        metadata, _ = read_gguf_metadata(str(path))
    num_parts = metadata.get("split.count", 1)
    if num_parts > 1:
        raise ValueError(
            f"{path} is one of {num_parts} parts of a model; join them with llama.cpp's llama-gguf-split --merge"
        )
    return metadata


def read_config(path: Path) -> PretrainedConfig:
    """The model's config, with the file as its name."""
    architecture = read_metadata(path)["general.architecture"]
    with _refusing(path, architecture):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    return _without_gguf(config, path)


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes, with its chat template; tokenizer files beside it are not looked at."""
    splitter = read_metadata(path).get("tokenizer.ggml.pre")
    with tempfile.TemporaryDirectory() as alone, _refusing(path):
        os.symlink(path.resolve(), Path(alone) / path.name)
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    tokenizer.name_or_path = str(path)
    if splitter in DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def read_model(
    path: Path, *, dtype: torch.dtype, with_blocks: bool = False, report: Report | None = None
) -> PreTrainedModel:
    """The causal language model on the CPU, in eval mode, its weights dequantised to dtype.

    with_blocks: linear layers whose weight the file holds in `Blocks` have these too, as their attribute `blocks`.
    """
    config = read_config(path)
    with _refusing(path), _reporting(report):
        quantised, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=dtype, output_loading_info=True,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    if info["missing_keys"] or info["mismatched_keys"]:  # transformers fills these with random numbers
        lacking = sorted({*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])})
        raise ValueError(f"{path} lacks {len(lacking)} weights of its model, such as {lacking[0]}; get it anew")
    # Again, from these weights: a model that was read from GGUF keeps a quantizer, and refuses to be moved or saved.
    generation_config = quantised.generation_config
    model = type(quantised).from_pretrained(None, config=config, state_dict=quantised.state_dict(), dtype=dtype)
    model.generation_config = generation_config
    model.config.name_or_path = str(path)
    if with_blocks:
        _attach(read_blocks(path, config), model)
    return model.eval()


def bytes_of_layers(path: Path) -> int | None:
    """Of the layers' linear weights once they are packed from blocks; None where the file has none.

    Projections that are one product are taken to be alike in the file, as they nearly always are.
    """
    from transformers.integrations.gguf.dequant import GGML_NAME
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        tensors = GgufHeader.from_file(str(path)).tensors
    except (ValueError, IndexError, struct.error):  # of a kind that only the slow reader knows, or damaged
        return None
    total, has_blocks = 0, False
    for tensor in tensors:
        match, kind = _LINEAR.fullmatch(tensor.name), GGML_NAME.get(tensor.ggml_type)
        if match is None or not match["layers"]:
            continue
        if kind in BYTES:
            has_blocks = True
            packed = max(BYTES[kind], BYTES["Q4_1"])  # the kernels have a low beside every 4-bit scale
            total += tensor.nbytes // BYTES[kind] * packed
        else:
            total += math.prod(tensor.shape) * torch.bfloat16.itemsize
    return total if has_blocks else None


def read_blocks(path: Path, config: PretrainedConfig) -> dict[str, Blocks]:
    """What the file holds as `Blocks` of a Llama-shaped model's linear layers, by their names, rows in their order.

    Nearly nothing is read before it is used.
    """
    from transformers.integrations.gguf.dequant import GGML_NAME
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

    with _refusing(path):
        header = GgufHeader.from_file(str(path))
    found = {}
    for name, lazy in load_gguf_state_dict(header).items():
        match, kind = _LINEAR.fullmatch(name), GGML_NAME.get(lazy.ggml_type)
        if match is None or kind not in BYTES:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a mapped file must not be written to
            blocks = Blocks(torch.from_numpy(lazy.data).view(lazy.shape[0], -1, BYTES[kind]), kind)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(match["part"])
        if header.architecture == "llama" and heads is not None:
            # llama.cpp rotates neighbours, transformers the two halves of a head.
            blocks = blocks.reordered(torch.arange(lazy.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten())
        found[match["layers"].replace("blk", "model.layers") + _LINEAR_NAMES[match["part"]]] = blocks
    embedding = found.pop(_LINEAR_NAMES["token_embd"], None)
    if "output.weight" not in header.ggml_types and embedding is not None:
        found[_LINEAR_NAMES["output"]] = embedding  # tied
    return found


def _attach(found: dict[str, Blocks], model: PreTrainedModel) -> None:
    """Raises ValueError when none of them means the weights that the model has."""
    used = 0
    for name, blocks in found.items():
        linear = model.get_submodule(name)
        # Infinite and NaN scales, and whatever transformers should do to weights of this kind one day, show here.
        if torch.equal(blocks.dequantised().to(linear.weight.dtype), linear.weight):
            linear.blocks, used = blocks, used + 1
    if not used:
        raise ValueError(
            f"{model.config.name_or_path} holds no block that transformers {transformers.__version__} reads as these "
            "kernels do; take weights 'dense'"
        )


def _without_gguf(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """A copy without what refers to the file's form."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # From the file's title, that of whoever trained the model, it would pass for a hub id.
    config.__dict__.pop("_model_name_or_path", None)
    config.name_or_path = str(path)
    return config


@contextmanager
def _refusing(path: Path, architecture: str | None = None) -> Iterator[None]:
    """Whatever a damaged file, or one of a kind unknown to transformers, makes the readers raise, as one ValueError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, OSError, struct.error) as error:
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        known = ""
        if architecture is not None and architecture not in GGUF_SUPPORTED_ARCHITECTURES:
            known = f" of architecture {architecture!r}, one of {', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))} is,"
        raise ValueError(
            f"{path}{known} cannot be read by transformers {transformers.__version__} ({reason}); it may be damaged, "
            "or of a kind it does not know: get it anew, or take the model's safetensors"
        ) from error


@contextmanager
def _reporting(report: Report | None) -> Iterator[None]:
    """Has the reader's loop over the tensors call `report` instead of drawing a bar that nothing turns off.

    The reader also makes the table of llama.cpp's names anew for every module of the model, a third of its time: here
    it makes it once.
    """
    import gguf as package
    from transformers import modeling_gguf_pytorch_utils as reader

    def counted(tensors: Iterable[Any], **_bar: object) -> Iterator[Any]:
        tensors = list(tensors)
        for index, tensor in enumerate(tensors):
            yield tensor
            if report is not None:
                report(index + 1, len(tensors))

    bar, reader.tqdm = reader.tqdm, counted
    table, package.get_tensor_name_map = package.get_tensor_name_map, functools.cache(package.get_tensor_name_map)
    try:
        yield
    finally:
        reader.tqdm, package.get_tensor_name_map = bar, table
