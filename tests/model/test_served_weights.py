"""Served weights multiply with what was last written, in one place, whatever lays them out."""

from __future__ import annotations

import copy

import pytest
import torch

from dvi.model.native import library
from dvi.model.served_weights import PackedProduct, ServedLinear, TransposedProduct, served_product
from dvi.model.split import SplitModel
from tests.support.drafter_doubles import random_drafter
from tests.support.tiny_models import tiny_model

KINDS = {"native": PackedProduct, "x86-64-v3": PackedProduct, "off": TransposedProduct}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float64: 1e-9}


@pytest.fixture(params=list(KINDS))
def layout(request, monkeypatch) -> str:
    """The kernels' way, in both widths, and that of machines without them."""
    monkeypatch.setenv(library.SWITCH, request.param)
    if request.param != "off" and library.load() is None:
        pytest.skip("no compiled kernels on this machine")
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_outputs", [48, 39])
def test_a_product_is_the_plain_one_with_what_was_last_written(num_outputs, has_bias, dtype, layout):
    """Catches a piece written beside its place, filled outputs that leak, and a first weight that shines through."""
    bias_N = normal(num_outputs, seed=3).to(dtype) if has_bias else None
    served = served_product(normal(num_outputs, 64, seed=1).to(dtype), bias_N)
    assert isinstance(served, KINDS[layout])
    weight_NK, x_MK, address = normal(num_outputs, 64, seed=2), normal(5, 64), served.buffer.data_ptr()
    served.write(weight_NK[:16])
    served.write(weight_NK[16:], start=16)
    expected_MN = x_MK.to(dtype).double() @ weight_NK.to(dtype).double().t()
    expected_MN = expected_MN if bias_N is None else expected_MN + bias_N
    error = (served(x_MK).double() - expected_MN).norm() / expected_MN.norm()
    assert error < TOLERANCE[dtype] and served.buffer.data_ptr() == address


def test_what_no_kernel_takes_is_multiplied_all_the_same(layout):
    """float64, and an odd number of inputs."""
    for weight_NK in (normal(32, 6).double(), normal(32, 7)):
        served = served_product(weight_NK, None)
        served.write(weight_NK)
        assert isinstance(served, TransposedProduct)
        torch.testing.assert_close(served(weight_NK[:2]), weight_NK[:2] @ weight_NK.t())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_serves_its_parameter_as_it_was_published(dtype, layout):
    linear = ServedLinear(64, 32, served_dtype=dtype, device=torch.device("cpu"))
    x_MK, plus_MN = normal(3, 64), normal(3, 32, seed=1)
    for _ in range(2):  # the first time it is packed, the second rewritten
        linear.weight.mul_(-1.5)
        linear.serve()
        for expected_MN, found_MN in (
            (linear(x_MK), linear.served(x_MK)), (linear(x_MK) + plus_MN, linear.served(x_MK, plus_MN))
        ):
            assert (found_MN - expected_MN).norm() / expected_MN.norm() < TOLERANCE[dtype]


def test_a_copy_has_memory_of_its_own(layout):
    """Catches a companion that drafts with the drafter's newest head: the kernels are told addresses."""
    served = served_product(normal(32, 64), None)
    served.write(normal(32, 64))
    x_MK = normal(2, 64, seed=1)
    before, copied = served(x_MK), copy.deepcopy(served)
    served.write(torch.zeros(32, 64))
    assert torch.equal(copied(x_MK), before) and not served(x_MK).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchored_step_in_one_call_gives_what_its_parts_give(dtype, layout, monkeypatch):
    """Catches a depth's state read for another row's, and a part computed before what it reads is whole."""
    model = tiny_model("llama", num_layers=2, hidden_size=64, vocab_size=200, dtype=dtype)
    drafter = random_drafter(SplitModel(model, split_layer=1), seed=1)
    hidden_BD, state = normal(3, 64).to(dtype), drafter.begin(normal(3, 64, seed=1).to(dtype))
    assert drafter._is_one_call == (layout != "off")
    whole = [drafter.step(hidden_BD, state, depth) for depth in range(3)]
    monkeypatch.setattr(drafter, "_is_one_call", False)
    for depth, logits_BV in enumerate(whole):
        parts_BV = drafter.step(hidden_BD, state, depth)
        assert (logits_BV - parts_BV).float().norm() / parts_BV.float().norm() < TOLERANCE[dtype]
