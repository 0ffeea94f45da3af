"""CUDA graphs without CUDA: a round's calls on the pretended device, noted once and made again in the same memory.

Stands where `dvi.model.cuda_graph.RoundGraphs` does. A graph replays launches and nothing else: no host code runs, and
every address and number is the one of its capture. So at each later run under a key the function is recorded anew
beside the replay, and `GraphFault` says where a call differs from the captured one (its name, a number baked in, the
size of what it allocates, the address of what it reads) or where the two come to different bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import dvi.decode.batch
from tests.support.pretend_device import Call, OnDevice, PretendDevice

Result = TypeVar("Result")


class GraphFault(AssertionError):
    """What would make a captured graph compute something else than the code it was captured from."""


@dataclass(frozen=True)
class Captured:
    """result: of the function, as it was captured; described: its calls, see `_described`."""

    calls: list[Call]
    described: list[tuple[tuple, str]]
    result: object


class RecordedGraphs:
    """num_replays: of all keys."""

    def __init__(self, device: PretendDevice) -> None:
        self._device = device
        self._captured: dict[Hashable, Captured] = {}
        self.num_replays = 0

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, function: Callable[[], Result]) -> Result:
        if key not in self._captured:
            function()  # to warm up, as libraries want it
            self._captured[key] = self._capture(function)
            return self._captured[key].result
        captured, fresh = self._captured[key], self._capture(function)
        for (first, place), (now, place_now) in zip(captured.described, fresh.described, strict=False):
            if first != now:
                raise GraphFault(f"under one key {first} at {place} came to be {now} at {place_now}")
        if len(captured.described) != len(fresh.described):
            raise GraphFault(f"under one key {len(captured.calls)} calls came to be {len(fresh.calls)}")
        self._replay(captured)
        for one, other in zip(_tensors(captured.result), _tensors(fresh.result), strict=True):
            if not torch.equal(one.host, other.host):
                raise GraphFault(f"a graph replayed to other numbers than its code, {one} of {key}")
        return captured.result

    def _capture(self, function: Callable[[], object]) -> Captured:
        with self._device.recorded() as calls:
            result = function()
        return Captured(calls, _described(calls), result)

    def _replay(self, captured: Captured) -> None:
        self.num_replays += 1
        for call in captured.calls:
            outputs = [x for x in tree_leaves(call.outputs) if isinstance(x, Tensor)]
            held = {_memory(x) for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)}
            is_view = not call.function._schema.is_mutable and all(_memory(x) in held for x in outputs)
            if is_view:
                continue  # of memory that is where it was
            again = [x for x in tree_leaves(call.function(*call.args, **call.kwargs)) if isinstance(x, Tensor)]
            for output, new in zip(outputs, again, strict=True):
                if _memory(output) != _memory(new):
                    output.copy_(new)


@contextmanager
def capturing(device: PretendDevice) -> Iterator[list[RecordedGraphs]]:
    """Rounds of the lean path are captured; the graphs of every batch since."""
    made: list[RecordedGraphs] = []

    def make() -> RecordedGraphs:
        made.append(RecordedGraphs(device))
        return made[-1]

    with mock.patch.multiple(dvi.decode.batch, can_capture=lambda split: split.path == "direct", RoundGraphs=make):
        yield made


def _described(calls: list[Call]) -> list[tuple[tuple, str]]:
    """All that a graph holds fast of each call, in numbers that two recordings share, and its line.

    A tensor is named by the call that made its memory, or by its address where it was there before.
    """
    makers: dict[int, str] = {}
    described = []
    for number, call in enumerate(calls):

        def named(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            memory = makers.get(_memory(x), f"memory at {_memory(x):#x}")
            return memory, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype

        inputs = tree_map(named, (call.args, call.kwargs))
        for output in tree_leaves(call.outputs):
            if isinstance(output, Tensor) and not any(
                _memory(output) == _memory(x) for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)
            ):
                makers[_memory(output)] = f"memory of call {number}"
        described.append(((str(call.function), inputs, tree_map(named, call.outputs)), call.place))
    return described


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(result: object) -> list[OnDevice]:
    """Of a record of records, in order."""
    if isinstance(result, OnDevice):
        return [result]
    return [tensor for value in getattr(result, "__dict__", {}).values() for tensor in _tensors(value)]
