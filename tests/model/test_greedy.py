"""The greedy token is torch's, whoever looks for it."""

from __future__ import annotations

import pytest
import torch

from dvi.model.greedy import likeliest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (2, 50), (2, 3, 50)])
def test_the_likeliest_is_the_first_of_the_largest(shape, dtype):
    """Catches another order among ties, of which half precision has many, and a NaN that is passed over."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randint(-3, 3, shape, generator=generator).to(dtype)
    for value in (0.0, float("inf"), float("nan")):
        logits_V.view(-1)[logits_V.numel() // 2] = value
        found = likeliest(logits_V)
        assert found.dtype == torch.int64 and torch.equal(found, logits_V.argmax(-1))


def test_float64_keeps_its_digits():
    """Catches a conversion in which two logits become equal."""
    assert likeliest(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)).tolist() == [1]
