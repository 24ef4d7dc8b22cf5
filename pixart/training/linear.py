"""Linear layers that keep no cast copy of their weight: autocast's would stay in memory from the forward to the backward pass.

Of XL/2 in 16 bits these copies are 1.1 GiB. The weight is cast again in the backward pass, to the same numbers.
"""
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**16  # values of a weight; below, a copy costs less than the call


def cast_weights_anew(model: nn.Module) -> None:
    """Replaces `forward` of large linear layers in training; names and parameters stay."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad and layer.weight.numel() >= SMALLEST:
            layer.forward = partial(_forward, layer)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """(..., in) -> (..., out), in autocast's dtype; without autocast as ever."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    return _Product.apply(x.to(torch.get_autocast_dtype(kind)), layer.weight, layer.bias)


class _Product(torch.autograd.Function):
    """x W^T + b in the dtype of x, whatever that of W and b is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        for_x = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        for_weight = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        for_bias = rows.sum(0).to(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias
