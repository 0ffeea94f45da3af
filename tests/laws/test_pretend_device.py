"""The pretended device itself: faults planted one by one are each found and named, and what is allowed passes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dvi.model.transfers import to_device, to_host
from tests.support.pretend_device import DEVICE, DeviceFault, OnDevice, PretendDevice


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice() as device:
        yield device


def numbers() -> Tensor:
    return torch.arange(4.0, device=DEVICE)


# Each by a word of what it is to be called: the name that torch has for it.
Faults = list[tuple[str, Callable[[Tensor], object]]]
READS: Faults = [
    ("_local_scalar_dense", lambda x: x.sum().item()),
    ("_local_scalar_dense", lambda x: bool(x[0] == 0)),
    ("_local_scalar_dense", lambda x: int(x[1])),
    ("_local_scalar_dense", lambda x: float(x.count_nonzero())),
    ("equal", lambda x: torch.equal(x, x)),
    ("_local_scalar_dense", lambda x: torch.allclose(x, x)),
    ("_to_copy", lambda x: x.tolist()),
    ("_to_copy", lambda x: x.cpu()),
    ("_to_copy", lambda x: x.to("cpu", non_blocking=True)),
    ("copy_", lambda x: torch.zeros(4, device="cpu").copy_(x)),
]
SHAPES: Faults = [
    ("nonzero", lambda x: x.nonzero()),
    ("nonzero", lambda x: torch.where(x > 1)),
    ("nonzero", lambda x: torch.argwhere(x > 1)),
    ("masked_select", lambda x: x.masked_select(x > 1)),
    ("index.", lambda x: x[x > 1]),
    ("index_put_", lambda x: x.__setitem__(x > 1, 0.0)),
    ("index_put.", lambda x: x.index_put((x > 1,), x[0])),
    ("_unique2", lambda x: x.unique()),
    ("unique_consecutive", lambda x: x.unique_consecutive()),
    ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
    ("bincount", lambda x: x.long().bincount()),
]
UPLOADS: Faults = [
    ("_to_copy", lambda x: torch.tensor([1.0, 2.0], device=DEVICE)),
    ("_to_copy", lambda x: torch.zeros(4, device="cpu").to(DEVICE)),
    ("_to_copy", lambda x: torch.as_tensor([1.0], device=x.device)),
    ("_to_copy", lambda x: x.new_tensor([1.0])),
    ("_to_copy", lambda x: x[[0, 2]]),
    ("copy_", lambda x: x.copy_(torch.ones(4, device="cpu"))),
]
MIXTURES: Faults = [
    ("add", lambda x: x + torch.ones(4, device="cpu")),
    ("index", lambda x: x[torch.arange(2, device="cpu")]),
    ("cat", lambda x: torch.cat([x, torch.ones(4, device="cpu")])),
    ("mm", lambda x: x[None] @ torch.ones(4, 1, device="cpu")),
    ("where", lambda x: torch.where(torch.ones(4, dtype=torch.bool, device="cpu"), x, x)),
]
OPEN: Faults = [
    ("tensor", lambda x: torch.tensor([1])), ("zeros", lambda x: torch.zeros(3)), ("ones", lambda x: torch.ones(3)),
    ("arange", lambda x: torch.arange(3)), ("full", lambda x: torch.full((2,), 1.0)), ("eye", lambda x: torch.eye(3)),
    ("randint", lambda x: torch.randint(3, (2,))), ("as_tensor", lambda x: torch.as_tensor([1])),
]  # fmt: skip
FAULTS = [
    (kind, name, fault)
    for kind, faults in {
        "waits for the device|from device to host": READS, "waits for the device|by a mask": SHAPES,
        "from host to device": UPLOADS, "mixes tensors": MIXTURES, "leaves the device open": OPEN,
    }.items()
    for name, fault in faults
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "fault"), FAULTS, ids=[name for _, name, _ in FAULTS])
def test_a_planted_fault_is_found_and_named_with_its_line(device, kind, name, fault):
    """Catches a rehearsal that passes because it looks at nothing."""
    x = numbers()
    with pytest.raises(DeviceFault, match=f"{kind}") as raised, device.without_waits():
        fault(x)
    assert name in str(raised.value)
    assert f"tests/laws/test_pretend_device.py:{fault.__code__.co_firstlineno}: " in str(raised.value)


def test_a_fault_that_somebody_catches_is_told_at_the_end(device):
    """A round's failure ends a request, which then has an error: nothing of a test need fail by that."""
    x = numbers()
    with (
        pytest.raises(DeviceFault, match="_local_scalar_dense"), device.without_waits(),
        contextlib.suppress(RuntimeError),
    ):  # fmt: skip
        x[0].item()


def test_crossings_by_name_pass_and_are_counted_by_the_line_that_asks(device):
    with device.without_waits() as transfers:
        x = to_device([[1, 2], [3, 4]], DEVICE, dtype=torch.int64)
        y = to_device(torch.ones(2, device="cpu"), DEVICE)
        assert to_host(x + y.long()).tolist() == [[2, 3], [4, 5]]
    assert (device.count("to_device"), device.count("to_host")) == (2, 1)
    assert all(place.startswith("tests/laws/test_pretend_device.py:") for _, place in transfers)


def test_outside_of_rounds_reading_is_free_and_mixing_is_not(device):
    x = numbers()
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0] and x[x > 1].sum().item() == 5 and bool((x >= 0).all())
    assert (x + torch.tensor(2.0)).tolist() == [2.0, 3.0, 4.0, 5.0]  # a number goes along with the launch
    with pytest.raises(DeviceFault, match="mixes tensors of host and device"):
        x + torch.ones(4)


def test_the_host_may_do_what_it_likes_with_what_is_its_own(device):
    """An optimizer's count of steps, a generator's draws: no device is asked."""
    with device.without_waits():
        host = torch.arange(4, device="cpu")
        assert host[host > 1].tolist() == [2, 3] and host.sum().item() == 6


def test_it_computes_what_a_cpu_computes(device):
    """Views share memory, what is written in place stays written, gradients come through, copies are copies."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(5, 4, dtype=torch.float64)
    for module, inputs in ((layer, x), (there, x.to(DEVICE))):
        module(inputs).square().mean().backward()
    assert isinstance(there.weight, OnDevice) and there.weight.device == DEVICE
    assert torch.equal(there.weight.grad.cpu(), layer.weight.grad)
    base = torch.zeros(2, 3, device=DEVICE)
    base[1].add_(torch.arange(3.0, device=DEVICE))
    kept = copy.deepcopy(base)
    base.t()[0] = 7
    assert base.tolist() == [[7, 0, 0], [7, 1, 2]] and kept.tolist() == [[0, 0, 0], [0, 1, 2]]


def test_without_the_mode_its_tensors_are_of_no_use():
    """Catches a rehearsal that goes on where nobody looks."""
    with PretendDevice():
        x = numbers()
    with pytest.raises(DeviceFault, match="after it was taken away"):
        x + x
