"""Whole models on a CUDA device that is not there, without numbers: shapes, dtypes and devices by torch's own rules.

`FakeTensorMode` says what each call on "cuda" would give. A build for CPUs alone lacks CUDA's device guard, which
Python's indexing and `~` ask for, so within `fake_cuda` they are the calls that they stand for; and pinned memory is
ordinary memory there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.llama_path import DirectPath
from dvi.model.split import SplitModel

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten


@contextmanager
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(), _WithoutDriver(), torch.no_grad():
        yield


class _WithoutDriver(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            tensor, tensors = _viewed(*args)
            return _aten.index(tensor, tensors) if tensors else tensor
        if func is Tensor.__setitem__:
            tensor, tensors = _viewed(*args[:2])
            value = args[2] if isinstance(args[2], Tensor) else tensor.new_full((), args[2])
            if tensors:
                return _aten.index_put_(tensor, tensors, value)
            # A copy into a slice cannot be faked. It has no result: what fits is all there is to say of it.
            assert value.expand_as(tensor).device == tensor.device
            return None
        if func is Tensor.__invert__:
            return args[0].bitwise_not()
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **(kwargs or {}))


def _viewed(tensor: Tensor, index: object) -> tuple[Tensor, list[Tensor | None]]:
    """What the index's numbers, slices and Nones view, and the tensors among its parts, by dimension; [] if none."""
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [number for number, part in enumerate(parts) if part is Ellipsis]
    if places:
        num_named = sum(part is not None and part is not Ellipsis for part in parts)
        parts[places[0] : places[0] + 1] = [slice(None)] * (tensor.dim() - num_named)
    tensors: list[Tensor | None] = []
    for part in parts:
        dim = len(tensors)
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice) and part != slice(None):
            tensor = _aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, Tensor) else None)
    return tensor, tensors if any(part is not None for part in tensors) else []


def to_fake_cuda(module: nn.Module) -> nn.Module:
    """The module with parameters and buffers there, of the same shapes; within `fake_cuda`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_fake(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _fake(buffer)
    return module


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def meta_split(config: PretrainedConfig, *, split_layer: int, dtype: torch.dtype) -> tuple[SplitModel, nn.Module]:
    """Split and drafter on the meta device: layers cannot be initialised on a fake one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    split = SplitModel(model, split_layer=split_layer, path="views")
    return split, build_drafter(split, DrafterConfig())


def moved_to_fake_cuda(split: SplitModel, drafter: nn.Module) -> None:
    """Both there, by the lean path; within `fake_cuda`."""
    model = to_fake_cuda(split.model)
    split.device, split.path = CUDA, "direct"
    split.head_weight_VD = model.get_output_embeddings().weight
    split._path = DirectPath(model, split_layer=split.split_layer)
    split._linear_head = split._path.head
    to_fake_cuda(drafter).draft_head._frozen = (split.head_weight_VD, None)
    drafter.publish(drafter, 1)
