"""A drafter as an ordinary Hugging Face model: the first layers, the drafter's norm, its head with the correction in.

Knows split models and their configs; what it writes is loaded without this library. `adapter_store` keeps drafters of
every kind as they are; this is a copy of what one kind computes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dvi.durable import staged_folder
from dvi.model.drafter import RmsGain

if TYPE_CHECKING:  # only an export needs transformers, which takes seconds to import
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from dvi.model.split import SplitModel


def export_standalone(
    folder: str | Path,
    drafter: nn.Module,
    split: SplitModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the shallow layers, the drafter's norm and its merged head as an ordinary Hugging Face checkpoint.

    `AutoModelForCausalLM` loads it without this library, for `generate(assistant_model=...)` or any server that takes
    a draft model. The vocabulary is the full one: tokens that a trimmed drafter cannot draft keep the frozen rows.
    overwrite: `folder` may hold such a model, which this one replaces; a folder with anything else is refused anyway.
    Raises ValueError for drafters that read the verifier's state, for split_layer 0, when `folder` is not empty, and
    when the first layers as a model of their own do not give the drafter's logits.
    """
    from transformers import AutoModelForCausalLM

    if drafter.config.kind != "lora_head":
        raise ValueError(
            f"drafter kind must be lora_head for a standalone model, got {drafter.config.kind!r}: it reads the "
            "verifier's hidden state, so it needs this runtime; share it with save_drafter instead"
        )
    if split.split_layer == 0:
        raise ValueError("split_layer must be >= 1 for a standalone model, got 0: a model needs a layer; try 1")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} must be a new or an empty folder for a standalone model; choose another")
    model = AutoModelForCausalLM.from_config(_shallow_config(split.model.config, split), dtype=split.dtype)
    source = split.model.state_dict()
    model.load_state_dict({name: source[name] for name in model.state_dict()})  # layer i keeps its name
    for name, module in split.model.named_modules():
        if module is split.final_norm:
            _copy_norm(drafter.norm, model.get_submodule(name))
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(_merged_head(drafter, split))
    _check_drafts_alone(model.eval(), drafter, split)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        reloaded = AutoModelForCausalLM.from_pretrained(staging, dtype=split.dtype).state_dict()
        for name, tensor in model.state_dict().items():
            if name not in reloaded or not torch.equal(tensor, reloaded[name]):
                raise ValueError(f"the draft model written for {folder} does not come back, so it is not kept: {name}")


def _shallow_config(config: PretrainedConfig, split: SplitModel) -> PretrainedConfig:
    """The model's config for its first layers: whatever it lists per layer is cut, the head is no longer tied."""
    fields = copy.deepcopy(config.to_dict())
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == split.num_layers and not name.endswith("token_id"):
            fields[name] = value[: split.split_layer]
    fields |= {"num_hidden_layers": split.split_layer, "tie_word_embeddings": False}
    return type(config).from_dict(fields)


@torch.no_grad()
def _copy_norm(drafter_norm: nn.Module, norm: nn.Module) -> None:
    """Gives `norm`, of the base's own class, the drafter's values. Raises ValueError when it cannot hold them."""
    if not isinstance(drafter_norm, RmsGain):
        norm.load_state_dict(drafter_norm.norm.state_dict())
        return
    gain_D = drafter_norm.gain.cpu()
    trial = copy.deepcopy(norm).float()
    probe_ND = torch.linspace(-2.0, 3.0, 2 * gain_D.shape[0]).view(2, -1)
    expected = copy.deepcopy(drafter_norm).cpu()(probe_ND)
    for weight_D in (gain_D, gain_D - 1.0):  # Gemma stores gain - 1
        trial.weight.copy_(weight_D)
        if torch.allclose(trial(probe_ND), expected, rtol=1e-5, atol=1e-6):
            norm.weight.copy_(weight_D)
            return
    raise ValueError(f"{type(norm).__name__} holds neither the drafter's gain nor gain - 1; share it with save_drafter")


def _merged_head(drafter: nn.Module, split: SplitModel) -> Tensor:
    """[V, D] float32: a copy of the frozen head with the drafter's correction added to the rows it can draft."""
    head = drafter.draft_head
    merged_VD = split.head_weight_VD.detach().to(torch.float32, copy=True)
    correction_VD = head.scaling * (head.lora_B.detach() @ head.lora_A.detach())
    rows = slice(None) if head.draft_token_ids_V is None else head.draft_token_ids_V
    merged_VD[rows] += correction_VD
    return merged_VD


@torch.no_grad()
def _check_drafts_alone(model: nn.Module, drafter: nn.Module, split: SplitModel) -> None:
    # Some models nest their config, or scale layers by how many there are: their first layers make no model.
    token_ids_BQ = torch.randint(split.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    cache = split.make_cache(1, 8)
    hidden_BQD = split.shallow(token_ids_BQ.to(split.device), cache, cache.place(offset=0, width=8))
    expected_BQV = drafter(hidden_BQD, hidden_BQD[:, 0])  # a lora_head drafter ignores the anchor
    logits_BQV = drafter.draft_head.gather_logits(model(input_ids=token_ids_BQ).logits.to(expected_BQV.device))
    error = ((logits_BQV - expected_BQV).norm() / expected_BQV.norm()).item()
    tolerance = 0.1 if split.dtype.itemsize == 2 else 1e-3  # what rounding explains, as in SplitModel's own check
    if not error <= tolerance:
        raise ValueError(
            f"the first {split.split_layer} layers of {type(split.model).__name__} do not draft alone: their logits "
            f"miss the drafter's by a relative error of {error:.1e}, at most {tolerance:.0e}; use save_drafter instead"
        )
