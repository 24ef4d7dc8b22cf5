"""adaLN in one pass is the formula's."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from pixart.layers import normalized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_scaled_and_shifted_norm_is_the_formulas(pictures: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, shift, scale = 3 + 5 * torch.randn(pictures, 7, 24), torch.randn(pictures, 1, 24), torch.randn(pictures, 1, 24)
    values, gradient = [x, shift, scale], torch.randn(pictures, 7, 24)
    found, exact = ([value.to(kind).requires_grad_() for value in values] for kind in (torch.float32, torch.float64))
    out = normalized(nn.LayerNorm(24, elementwise_affine=False, eps=1e-6), *found, dtype)
    x, shift, scale = exact
    middle = x - x.mean(-1, keepdim=True)
    expected = middle / (middle.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    assert out.dtype == dtype and out.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(out, found, gradient.to(dtype)), torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * float(theirs.abs().max()), rtol=tolerance)


def test_another_dtype_of_hidden_tokens_is_computed_too() -> None:
    x, shift, scale = torch.randn(1, 7, 24), torch.randn(1, 1, 24), torch.randn(1, 1, 24)
    norm = nn.LayerNorm(24, elementwise_affine=False, eps=1e-6)
    found = normalized(norm, x.double(), shift, scale, torch.float32)
    torch.testing.assert_close(found, normalized(norm, x, shift, scale, torch.float32), atol=1e-5, rtol=1e-5)
