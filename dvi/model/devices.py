"""Models bigger than a device: how one is loaded over several, and what the drafter's device must hold of it.

"single"      the whole model on one device.
"device_map"  one process; layers on this machine's GPUs in order, and in its memory or on its disk where they are full
              (accelerate's hooks move weights and activations).
"tensor"      one process per GPU under torchrun; each holds a part of every layer (transformers' own plan), and all run
              the same rounds in lock-step.
"zero3"       the same parts, gathered for every pass over whole texts: `trainers.learning.zero3` loads such a model.

Knows modules, devices and process groups; knows nothing of drafting. On several GPUs, and with NCCL, nothing here has
been tried.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from dvi.model.pretrained import read_weights
from dvi.settings import ServeConfig, TrainConfig, WarmupConfig

PLACEMENTS = ("single", "device_map", "tensor")
TIMED_POLICIES = ("goodput", "companion")
NOT_TIMED = "policies goodput and companion go by measured time, which differs between ranks of a tensor-parallel model"


def load_model(
    name_or_path: str, config: PretrainedConfig, *, placement: str, device: str, dtype: torch.dtype,
    with_blocks: bool = False, **source: object,
) -> PreTrainedModel:
    """The causal language model, in eval mode, where its placement puts it. config: its own, read before.

    device: for "single"; the others find theirs. with_blocks: of a GGUF file, see `dvi.model.gguf.read_model`.
    source: other arguments of `from_pretrained`.
    Raises ValueError for an unknown placement, and for what `check_tensor_parallel` refuses.
    """
    if placement == "single":
        placed = {}
    elif placement == "device_map":
        placed = {"device_map": "auto"}
    elif placement == "tensor":
        check_tensor_parallel(config, num_processes=num_processes())
        # Starts the process group where there is none, and takes the GPU of LOCAL_RANK.
        placed = {"distributed_config": DistributedConfig(tp_plan="auto")}
    else:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    model = read_weights(name_or_path, dtype=dtype, with_blocks=with_blocks, placed=placed, **source)
    return model.to(device) if placement == "single" else model


def is_gpu(device: str) -> bool:
    """Whether a setting's device, "auto" too, is a GPU."""
    return torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"


def num_processes() -> int:
    """Processes of this job, by its process group or, before there is one, by its launcher."""
    return distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def check_tensor_parallel(config: PretrainedConfig, *, num_processes: int) -> None:
    """Raises ValueError, with the remedy, when so many processes cannot share a model of this config."""
    text = config.get_text_config(decoder=True)
    if num_processes < 2:
        raise ValueError(
            f"placement 'tensor' needs at least 2 processes, got {num_processes}; start it with "
            "torchrun --nproc_per_node 2, or use placement 'device_map'"
        )
    if not getattr(text, "base_model_tp_plan", None):
        raise ValueError(
            f"placement 'tensor' needs a model that transformers has a tensor-parallel plan for, not "
            f"{text.model_type}; use placement 'device_map'"
        )
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if num_kv_heads % num_processes:
        raise ValueError(
            f"the number of processes must divide the model's {num_kv_heads} key/value heads with placement 'tensor', "
            f"got {num_processes}; try {_largest_divisor(num_kv_heads, below=num_processes)}, or placement 'device_map'"
        )


def check_settings(config: TrainConfig | ServeConfig | WarmupConfig) -> None:
    """Raises ValueError, with the reason, for what cannot be done with the model's placement.

    Not with "tensor": whatever asks a rank's own clock, for its ranks run in lock-step. Not with "zero3": to decode.
    """
    if config.model.placement == "zero3":
        _check_zero3(config)
    if config.model.placement != "tensor":
        return
    if isinstance(config, ServeConfig):
        raise ValueError(
            "model.placement must not be 'tensor' for a server, whose requests arrive at one rank while all must run "
            "them; use device_map, or an engine such as vLLM for tensor-parallel serving"
        )
    if config.draft.policy in TIMED_POLICIES:
        raise ValueError(f"{NOT_TIMED}; try draft.policy=fixed")
    if config.train.enabled and config.train.budget < 1:
        raise ValueError(
            "train.budget must be 1 with model.placement 'tensor', where every rank must make the same steps and a "
            f"share of time is each clock's own, got {config.train.budget}; train.rounds_per_step sets the pace"
        )


def _check_zero3(config: TrainConfig | ServeConfig | WarmupConfig) -> None:
    if not (isinstance(config, WarmupConfig) and config.warmup.source == "texts" and not config.eval.limit):
        raise ValueError(
            "model.placement must not be 'zero3' where the model decodes: ZeRO-3 gathers every layer from all ranks "
            "for every token, and each rank must run as many passes as the one with the longest answer; try device_map "
            "or tensor, or learn from texts: dvi warmup with warmup.source=texts and eval.limit=0"
        )
    if config.model.mode == "exact":
        raise ValueError("model.mode must be 'auto' or 'fast' with model.placement 'zero3', got 'exact'")
    if config.train.strategy != "ddp":
        raise ValueError(
            "train.strategy must be ddp with model.placement 'zero3', where DeepSpeed already holds the model, got "
            f"{config.train.strategy!r}"
        )


# What is loaded


def is_tensor_parallel(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_spread(model: nn.Module) -> bool:
    """Whether weights are elsewhere or in parts, so that only the modules' own forwards know how to use them."""
    return is_tensor_parallel(model) or any(hasattr(module, "_hf_hook") for module in model.modules())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with weights computes, wherever those are kept in between."""
    hook_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if hook_device is None else torch.device(hook_device)


@torch.no_grad()
def gather_module(module: nn.Module, device: torch.device) -> nn.Module:
    """The same module with whole weights on one device, without hooks: shared where they are that already, else copies.

    For modules without children, such as norms and heads. With placement "tensor" all ranks must call it together.
    """
    assert not any(module.children())
    gathered = copy.copy(module)
    # A forward bound to the instance (a hook's, a shard's) would still run the original.
    for name in ("forward", "_hf_hook", "_old_forward"):
        gathered.__dict__.pop(name, None)
    with align_module_device(module):
        gathered._parameters = {name: _gather(parameter, device) for name, parameter in module._parameters.items()}
    return gathered


@torch.no_grad()
def check_lock_step(split: object, drafter: nn.Module) -> None:
    """For a tensor-parallel model: raises RuntimeError when the ranks' drafters or results differ in any bit.

    They decide each for itself, so that one other bit may become another token, and ranks that wait for each other
    for ever. All ranks must call it together. split: a `SplitModel`.
    """
    width = 8
    ids_1Q = torch.arange(width, device=split.device)[None] % split.vocab_size
    cache = split.make_cache(1, width)
    placement = cache.place(offset=0, width=width)
    hidden_1QD = split.shallow(ids_1Q, cache, placement)
    final_1QD = split.deep(hidden_1QD, ids_1Q, cache, placement)
    drafted_1V = drafter.step(hidden_1QD[:, 0], drafter.begin(final_1QD[:, 0]), 0)
    logits_1QV = split.head(final_1QD)
    results = {"hidden states": hidden_1QD, "the verifier's logits": logits_1QV, "draft logits": drafted_1V}
    check_ranks_agree(results | drafter.state_dict())


def check_ranks_agree(tensors: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError, on every rank alike, naming the tensors of which some rank holds other bits than rank 0.

    All ranks must call it together, with the same names in the same order.
    """
    device = next(iter(tensors.values())).device
    mine_N = torch.tensor([_digest(tensor) for tensor in tensors.values()], device=device)
    all_RN = [torch.empty_like(mine_N) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_RN, mine_N)
    differs_N = (torch.stack(all_RN) != all_RN[0]).any(0).tolist()
    names = [name for name, differs in zip(tensors, differs_N, strict=True) if differs]
    if names:
        raise RuntimeError(
            f"ranks that must run in lock-step differ in {', '.join(names)}; give them equal devices and libraries, or "
            "use placement 'device_map'"
        )


def _gather(parameter: nn.Parameter | None, device: torch.device) -> nn.Parameter | None:
    if parameter is None:
        return None
    weight = parameter.detach()
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return nn.Parameter(whole.to(device), requires_grad=False)


def _digest(tensor: Tensor) -> int:
    """64 bits that tell tensors apart by their own bits."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def _largest_divisor(number: int, *, below: int) -> int:
    return next(count for count in range(min(below, number), 0, -1) if number % count == 0)
