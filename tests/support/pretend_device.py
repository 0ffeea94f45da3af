"""A device that is not there: tensors say they are on it, the CPU computes them, and a GPU's rules hold.

`PretendDevice` is a mode. While it is on, `DEVICE` takes factories, `.to` and modules as "cuda" would where there was
one, results are right to the bit, and what lies on the device meets nothing of the host's. So code runs that no CPU
run reaches: a device that is not "cpu" has no shortcuts.

Inside `without_waits()` a call also fails, by name and line, that would make a GPU's host wait or its shapes follow the
data: a read, a shape that depends on values, and whatever crosses between host and device outside of the two functions
of `dvi.model.transfers`, which are counted. So does a factory of the project's own that leaves the device open.
`recorded()` notes every call, from which `tests.support.recorded_rounds` makes graphs.

It does not tell of waits that no call shows: an allocation that has to free memory first, a library's own.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dvi.model import transfers
from tests.support.paths import ROOT

# A device type that torch knows and no build here has: nothing but this mode can compute on it, no code of ours asks
# for it by name, and autograd goes back through it in the calling thread, as elsewhere on "cpu" and "meta" alone.
DEVICE = torch.device("lazy")
_CROSSINGS = {transfers.to_device.__code__: "to_device", transfers.to_host.__code__: "to_host"}
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_TAGS_OF_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_WAYS = [str(ROOT / name) for name in ("dvi", "trainers", "tests", "scripts")]


class DeviceFault(RuntimeError):
    """What a GPU would refuse, or what would make it wait."""


class OnDevice(Tensor):
    """A tensor on the pretended device; `host` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise DeviceFault(f"{func} of a tensor on the pretended device, after it was taken away")

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict) -> OnDevice:
        copied = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        return copied

    @property
    def data(self) -> OnDevice:
        return self.detach()

    @data.setter
    def data(self, value: OnDevice) -> None:
        Tensor.data.__set__(self, value)
        self.host = value.host

    def tolist(self) -> list:
        return self.cpu().tolist()  # torch has none for subclasses


@dataclass(frozen=True)
class Call:
    """One call on the device, with the host's tensors in the places of the device's."""

    function: Callable
    args: tuple
    kwargs: dict
    outputs: object
    place: str

    @property
    def size(self) -> tuple:
        """What it was and of what sizes its results are, for rounds that ought to be alike."""
        outputs = [x for x in tree_flatten(self.outputs)[0] if isinstance(x, Tensor)]
        return self.place, str(self.function), [tuple(x.shape) for x in outputs]


class PretendDevice(TorchDispatchMode):
    """The mode. transfers: crossings inside `without_waits`, by function and calling line; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[tuple[str, str]] = Counter()
        self._faults: list[DeviceFault] = []
        self._is_strict = False
        self._calls: list[Call] | None = None

    def __enter__(self) -> PretendDevice:
        # Else torch.tensor(numbers, device=...) moves them there before any mode hears of it.
        self._lifts_host_only = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts_host_only)
        super().__exit__(*raised)

    @contextmanager
    def without_waits(self, where: torch.device | str = DEVICE) -> Iterator[Counter[tuple[str, str]]]:
        """Fails on what the module names, at the call; at the end, too, where somebody has caught it.

        where: what is inside runs there. On another device nothing is forbidden: it is there to compare with.
        """
        self.transfers.clear()
        if where != DEVICE:
            yield self.transfers
            return
        was_strict, self._is_strict = self._is_strict, True
        try:
            with _DevicesAreTold(self._fail):
                yield self.transfers
        finally:
            self._is_strict = was_strict
        if self._faults:
            raise self._faults.pop()

    @contextmanager
    def recorded(self) -> Iterator[list[Call]]:
        """Notes the calls on the device, in order."""
        outer, self._calls = self._calls, []
        try:
            yield self._calls
        finally:
            self._calls = outer

    def count(self, name: str) -> int:
        """Crossings by this function in the newest `without_waits`."""
        return sum(number for (function, _), number in self.transfers.items() if function == name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_device = {id(x.host): x for x in tensors if isinstance(x, OnDevice)}
        target = kwargs.get("device")
        gives_device = bool(on_device) if target is None else torch.device(target).type == DEVICE.type
        if func in _COPIES:
            self._check_copy(func, args, gives_device)
            gives_device = isinstance(args[0], OnDevice) if func is _aten.copy_.default else gives_device
        elif on_device:
            self._check(func, args, tensors)
        if target is not None:
            kwargs["device"] = torch.device("cpu") if torch.device(target).type == DEVICE.type else target
        args, kwargs = tree_map(_host_of, (args, kwargs))
        outputs = func(*args, **kwargs)
        if not gives_device:
            return outputs
        if self._calls is not None:
            self._calls.append(Call(func, args, kwargs, outputs, _place()[0]))

        def placed(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            return on_device[id(x)] if id(x) in on_device else OnDevice(x)

        return tree_map(placed, outputs)

    def _check_copy(self, func: Callable, args: tuple, gives_device: bool) -> None:
        is_in_place = func is _aten.copy_.default
        source = args[1] if is_in_place else args[0]
        to_device = isinstance(args[0], OnDevice) if is_in_place else gives_device
        is_crossing = isinstance(source, OnDevice) != to_device
        if not (is_crossing and self._is_strict):
            return
        place, frame = _place()
        named = _crossing_of(frame)
        direction = "from host to device" if to_device else "from device to host"
        if named is None:
            self._fail(f"{func} copies {direction}, which only `dvi.model.transfers` may, at {place}")
        self.transfers[named, _place(frame, skipped=transfers.__file__)[0]] += 1

    def _check(self, func: Callable, args: tuple, tensors: list[Tensor]) -> None:
        # As on a GPU, a number may stay on the host: it goes along with the launch.
        if any(not isinstance(x, OnDevice) and x.dim() > 0 for x in tensors):
            self._fail(f"{func} mixes tensors of host and device at {_place()[0]}")
        if not self._is_strict:
            return
        if func in _INDEXING:
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self._fail(f"{func} by a mask waits for the device, which has to count it, at {_place()[0]}")
        elif any(tag in func.tags for tag in _TAGS_OF_WAITS):
            self._fail(f"{func} waits for the device at {_place()[0]}")

    def _fail(self, what: str) -> None:
        self._faults.append(DeviceFault(what))
        raise self._faults[-1]


class _DevicesAreTold(TorchFunctionMode):
    """Fails where the project's own code makes a tensor and leaves its device open: that is the host's, by default."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        super().__init__()
        self._fail, self._factories = fail, _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._factories and kwargs.get("device") is None:
            place, _, caller = *_place(), sys._getframe(1)
            is_ours = any(caller.f_code.co_filename.startswith(way) for way in _WAYS)
            if is_ours and _crossing_of(caller) is None:
                self._fail(f"{func.__name__} leaves the device open at {place}")
        return func(*args, **kwargs)


def _host_of(x: object) -> object:
    return x.host if isinstance(x, OnDevice) else x


def _crossing_of(frame: FrameType | None) -> str | None:
    """The function of `dvi.model.transfers` that is under way, if one is."""
    while frame is not None:
        if frame.f_code in _CROSSINGS:
            return _CROSSINGS[frame.f_code]
        frame = frame.f_back
    return None


def _place(frame: FrameType | None = None, *, skipped: str = __file__) -> tuple[str, FrameType | None]:
    """The innermost line of the project's own code, as "file:line: text", and its frame."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path not in (__file__, skipped) and any(path.startswith(way) for way in _WAYS):
            line = linecache.getline(path, frame.f_lineno).strip()
            return f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno}: {line}", frame
        frame = frame.f_back
    return "a line outside the project", None
