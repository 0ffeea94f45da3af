"""Layers that gave up weights of which somebody holds a packed copy, and take them back when they are asked to compute.

Knows modules and parameters; knows nothing of how weights are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Unpack = Callable[[], Mapping[str, Tensor]]


def hollow_out(layer: nn.Module, names: Iterable[str], unpack: Unpack) -> None:
    """Frees the weights of these names, which unpack() gives, until the layer's forward or its state dict is wanted.

    What stays has their shape, and NaN for every number: whoever reads the parameters past these two notices.
    """
    if not hasattr(layer, "unpack_weights"):
        layer.register_forward_pre_hook(lambda layer, _inputs: refill(layer))
        layer.register_state_dict_pre_hook(lambda layer, _prefix, _keep_vars: refill(layer))
    layer.unpack_weights = unpack
    for name in names:
        weight = layer.get_parameter(name)
        weight.data = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)


def refill(layer: nn.Module) -> None:
    """Gives a layer its weights back, where it gave them up."""
    unpack = getattr(layer, "unpack_weights", None)
    if unpack is None:
        return
    layer.unpack_weights = None
    for name, weight in unpack().items():
        layer.get_parameter(name).data = weight
