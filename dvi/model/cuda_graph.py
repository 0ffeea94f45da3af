"""Rounds as CUDA graphs: one launch instead of a thousand, where shapes and addresses stand still.

Knows nothing of what it captures, only that it is a function without arguments, without waits for the device and
without effects that a second run would spoil. Outputs of one key are the same tensors at every run: read or copy them
before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def can_capture(split: object) -> bool:
    """True on a CUDA device with the direct path, whose calls neither wait for the device nor move their buffers."""
    return split.device.type == "cuda" and getattr(split, "path", None) == "direct"


class RoundGraphs:
    """Captured rounds by key. The key must hold all that decides shapes, addresses and the host's branches."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool = None

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """function(), by replaying its graph; captured at a key's first run, after one run to warm up."""
        if key not in self._captured:
            self._captured[key] = self._capture(function)
        graph, result = self._captured[key]
        graph.replay()
        return result

    def _capture(self, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        # On a side stream, as capture demands: libraries allocate their workspaces now and not inside the graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls belong to the capture: among several ranks NCCL's thread looks at events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        self._pool = graph.pool()
        return graph, result
