"""Models, dtypes, drafters and modes on a device that is not there: they wait for verdicts alone, and answers agree."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.draft.length_policies import FixedLength
from dvi.model.cuda_graph import can_capture
from dvi.model.drafter import DRAFTER_KINDS
from dvi.model.llama_path import DirectPath
from tests.support.drafter_doubles import small_config
from tests.support.exact_doubles import self_check_left_out
from tests.support.pretend_device import DEVICE, DeviceFault, PretendDevice
from tests.support.rehearsal import params_of
from tests.support.small_speculator import sequence_of
from tests.support.tiny_models import ARCHITECTURES, tiny_model

# What transformers itself does in every pass, whoever asks: found here, and not ours to mend.
WAITS = {"falcon": "copies from host to device", "qwen3_moe": "nonzero"}


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice() as device:
        yield device


def speculator_of(
    where: torch.device | str, *, arch: str = "llama", path: str = "views", kind: str = "anchored", mode: str = "fast",
    dtype: torch.dtype = torch.float64,
) -> SelfSpeculator:
    with mock.patch.object(DirectPath, "supports", lambda model: path == "direct"), self_check_left_out():
        torch.manual_seed(1)
        model = tiny_model(arch, num_layers=2, hidden_size=16, seed=3, dtype=dtype).to(where)
        return SelfSpeculator(model, None, split_layer=1, drafter=small_config(kind), path=path, mode=mode)


def tokens_of(
    device: PretendDevice, where: torch.device | str, *, sampling: str = "greedy", **options: object
) -> list[list[int]]:
    """What two rows of unequal length have after two rounds, within `without_waits`."""
    batch = speculator_of(where, **options).open_batch(max_rows=2, policy=FixedLength(2), wants_transitions=True)
    with device.without_waits(where):
        for index, prompt in enumerate(([5, 9, 33, 2, 7, 8, 1], [7])):
            batch.admit(sequence_of(index, prompt, params_of(sampling)))
        for _ in range(2):
            batch.round()
    return [sequence.token_ids for sequence in batch.sequences]


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in WAITS])
def test_the_general_path_waits_in_no_architecture(device, arch):
    """Catches a mask, a position or a cache of ours that makes transformers look at a number."""
    assert tokens_of(device, DEVICE, arch=arch) == tokens_of(device, "cpu", arch=arch)


@pytest.mark.parametrize("arch", list(WAITS))
def test_where_transformers_waits_by_itself_it_is_named(device, arch):
    """Catches a rehearsal that is blind within a library, and tells when a newer one no longer waits."""
    with pytest.raises(DeviceFault, match=WAITS[arch]):
        tokens_of(device, DEVICE, arch=arch)


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "qwen3"])
def test_the_lean_path_waits_in_no_architecture(device, arch):
    """Catches a window, a bias or a norm of the queries that only the blocks of GPUs treat so."""
    assert tokens_of(device, DEVICE, arch=arch, path="direct") == tokens_of(device, "cpu", arch=arch)


@pytest.mark.parametrize("kind", list(DRAFTER_KINDS))
def test_no_drafter_waits(device, kind):
    options = {"kind": kind, "sampling": "sampled"}
    assert tokens_of(device, DEVICE, **options) == tokens_of(device, "cpu", **options)


@pytest.mark.parametrize("path", ["direct", "views"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_where_it_is(device, dtype, path):
    """Catches a product of two dtypes, which the blocks of CPUs never meet; bits are the kernels' own."""
    assert all(len(ids) >= 2 for ids in tokens_of(device, DEVICE, dtype=dtype, path=path))


def test_exact_mode_waits_for_verdicts_alone(device):
    options = {"mode": "exact", "dtype": torch.float32}
    assert tokens_of(device, DEVICE, **options) == tokens_of(device, "cpu", **options)


def test_a_round_in_exact_mode_is_no_graph():
    """Its rows have caches of their own, which come and go: captured, its first round ended in an error."""
    exact = speculator_of("cpu", path="direct", mode="exact", dtype=torch.float32).passes
    on_cuda = {"device": torch.device("cuda")}
    assert can_capture(SimpleNamespace(path="direct", **on_cuda))
    assert not can_capture(SimpleNamespace(path=exact.path, **on_cuda))
