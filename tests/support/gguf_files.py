"""Tiny GGUF files, written by the package gguf: a Llama in float32, a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dvi.model.blocks import BYTES, Blocks
from tests.support.tiny_models import tiny_model

CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
MERGES = ["Ġ Ġ", "Ġ a"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ", "Ġa"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def quantised(weight_NK: Tensor, kind: str) -> tuple[Blocks, Tensor]:
    """The weight's blocks, and what they mean: both as the package gguf has it, which is llama.cpp's own."""
    type_ = gguf.GGMLQuantizationType[kind]
    raw = quantize(weight_NK.numpy(), type_)
    blocks = Blocks(torch.from_numpy(raw).unflatten(-1, (-1, BYTES[kind])), kind)
    return blocks, torch.from_numpy(dequantize(raw, type_))


def write_gguf(
    path: Path, *, seed: int = 0, architecture: str = "llama", splitter: str = "smollm", num_parts: int = 1,
    without: tuple[str, ...] = (), kinds: dict[str, str] | None = None,
    before_writing: Callable[[PreTrainedModel], None] = lambda model: None, **model_options: object,
) -> PreTrainedModel:
    """Writes a file and returns the model whose weights are in it, before they were quantised.

    without        tensors that are left out.
    kinds          by the end of a tensor's name, without ".weight", how it is quantised, such as {"attn_q": "Q4_1"}.
    before_writing  changes the model.
    model_options  of `tiny_model`.
    """
    model = tiny_model("llama", **{"vocab_size": len(TOKENS), "seed": seed} | model_options).float()
    with torch.no_grad():
        before_writing(model)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    if num_parts > 1:
        writer.add_uint16("split.count", num_parts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in _tensors(model).items():
        kind = next((kind for end, kind in (kinds or {}).items() if name.endswith(f"{end}.weight")), None)
        if kind is not None:
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, quantize(weight.numpy(), type_), raw_dtype=type_)
        elif name not in without:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights under llama.cpp's names, queries and keys in its order of rotary pairs."""
    config, state = model.config, model.state_dict()
    named = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        named["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
            named[f"blk.{layer}.{theirs}.weight"] = weight
    return named
