"""Tiny random models of many architectures, built from configs: no downloads, the same weights for the same seed.

The scales are chosen so that a wrong layer, position, mask or head shows: next-token distributions are peaked, norms
and biases are not the identity, and logit scaling, soft-capping and short sliding windows are on.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_HEADS = 4
NUM_KV_HEADS = 2
SLIDING_WINDOW = 5
MAX_POSITIONS = 512
LOGIT_GAIN = 3.0

# What each architecture sets besides the sizes. The names are the config's own.
_SETTINGS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 2},
    "gemma": {},
    "gemma2": {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0},
    "gemma3_text": {
        "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": SLIDING_WINDOW},
    "olmo2": {},
    "granite": {
        "logits_scaling": 1.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.4,
    },
    "cohere": {"logit_scale": 0.6, "use_qk_norm": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_parallel_residual": False, "use_qkv_bias": True},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "falcon": {"new_decoder_architecture": True, "alibi": False},
    "bloom": {},
    # Grouped matrix products of experts have no float64; "eager" has.
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "experts_implementation": "eager",
    },
}  # fmt: skip
ARCHITECTURES = list(_SETTINGS)

_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PER_LAYER = ("layer_types", "no_rope_layers")


def tiny_model(
    arch: str,
    *,
    num_layers: int = 4,
    hidden_size: int = 32,
    vocab_size: int = 64,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tied: bool | None = None,
    **config_overrides,
) -> PreTrainedModel:
    """A random causal language model of the architecture, in eval mode, its weights fixed by the seed.

    tied              share embedding and output head; None is the architecture's own default.
    config_overrides  any field of the architecture's config, also `attn_implementation`.
    Architectures outside ARCHITECTURES get the Llama names for their sizes.
    """
    settings = _sizes(arch, num_layers=num_layers, hidden_size=hidden_size) | _SETTINGS.get(arch, {})
    for name in _PER_LAYER:
        if name in settings:
            settings[name] = (settings[name] * num_layers)[:num_layers]
    settings |= {"vocab_size": vocab_size} | _TOKEN_IDS | config_overrides
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(arch, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    _randomise(model, seed)
    return model


def _sizes(arch: str, *, num_layers: int, hidden_size: int) -> dict:
    """The architecture's own names for layer count, widths and heads."""
    if arch == "gpt2":
        return {"n_layer": num_layers, "n_embd": hidden_size, "n_head": NUM_HEADS, "n_positions": MAX_POSITIONS}
    if arch == "bloom":
        return {"n_layer": num_layers, "hidden_size": hidden_size, "n_head": NUM_HEADS}
    sizes = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": NUM_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
    }
    if arch == "opt":
        return sizes | {"ffn_dim": 2 * hidden_size, "word_embed_proj_dim": hidden_size}
    if arch == "falcon":
        return sizes | {"num_kv_heads": NUM_KV_HEADS}
    sizes |= {"intermediate_size": 2 * hidden_size}
    if arch == "gpt_neox":
        return sizes
    return sizes | {"num_key_value_heads": NUM_KV_HEADS, "head_dim": hidden_size // NUM_HEADS}


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Unit-gain matrices, norms and biases off their defaults, and a head that gives peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter is head.weight:
            parameter.copy_(noise * LOGIT_GAIN / parameter.shape[-1] ** 0.5)
        elif parameter in embeddings:
            parameter.copy_(noise * 0.5)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
