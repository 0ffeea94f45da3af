"""The crossings between host and device. Whatever a round or a learner's step moves goes through here, in sight.

Knows numbers and tensors, and nothing of what they mean. A crossing made elsewhere, `torch.tensor(numbers, device=...)`
too, waits for all that a GPU has been given to do; tests decode and learn on a device that lets nothing else cross.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Tensor | Sequence, device: torch.device | str, *, dtype: torch.dtype | None = None) -> Tensor:
    """The host's numbers as a tensor there, without a wait."""
    tensor = torch.as_tensor(numbers, dtype=dtype, device="cpu")
    if torch.device(device).type == "cuda":
        # From ordinary memory the copy would wait for the stream. torch keeps what is pinned until it has been read.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def overwrite(tensor: Tensor, numbers: Sequence) -> None:
    """Has a tensor hold the host's integers, as many as it has, without a wait."""
    if tensor.device.type == "cpu":
        tensor.numpy()[:] = numbers  # a new tensor would take five times as long
    else:
        tensor.copy_(to_device(numbers, tensor.device, dtype=tensor.dtype))


def to_host(tensor: Tensor) -> Tensor:
    """The same on the CPU, to be read there. Waits for the device: every call of this is a wait, and no other is."""
    return tensor.cpu()
