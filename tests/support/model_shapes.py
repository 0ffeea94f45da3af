"""What the config.json of models in use says of their shape, so that tests can build them whole on the meta device.

Public facts, as the models' pages have them; `num_parameters` is the number that is known of the model from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """settings: of the config, next to model_type. num_parameters: tied ones once."""

    path: str
    model_type: str
    num_parameters: int
    settings: dict[str, object]

    @property
    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, dtype="bfloat16", **self.settings)


SHAPES = {
    "vicuna_7b": ModelShape("lmsys/vicuna-7b-v1.5", "llama", 6_738_415_616, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }),
    "llama31_8b": ModelShape("meta-llama/Llama-3.1-8B-Instruct", "llama", 8_030_261_248, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }),
    "qwen3_8b": ModelShape("Qwen/Qwen3-8B", "qwen3", 8_190_735_360, {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "qwen3_0.6b": ModelShape("Qwen/Qwen3-0.6B", "qwen3", 596_049_920, {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
}  # fmt: skip
