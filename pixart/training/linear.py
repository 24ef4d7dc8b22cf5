"""Linear layers in training under autocast, faster and in less memory than by separate operations.

No cast copy of a weight is kept: it would stay in memory from the forward to the backward pass, 1.1 GiB of XL/2 in 16 bits. The
weight is cast again in the backward pass, to the same numbers; not so in checkpointed blocks, which are computed again anyway. A LoRA
is added inside the product.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import NAME
from .teacher import adapter_layers

SMALLEST = 2**16  # values of a weight; below, a copy costs less than the call


def cast_weights_anew(model: nn.Module, keep_copies: bool = False) -> None:
    """Replaces `forward` of large linear layers in training; names and parameters stay.

    keep_copies: cast once for both passes, where a copy doesn't outlive its block.
    """
    for layer in _large_layers(model):
        layer.forward = partial(_forward, layer, keep_copies)


def large_weights(blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Those of the layers that `cast_weights_anew` changes."""
    return [layer.weight for block in blocks for layer in _large_layers(block)]


def _large_layers(model: nn.Module) -> list[nn.Linear]:
    """Adapters' own matrices are not among them: their gradients are fp32."""
    adapters = {part for layer in adapter_layers(model) for part in layer.modules()}
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear and layer not in adapters]
    return [layer for layer in linear if layer.weight.requires_grad and layer.weight.numel() >= SMALLEST]


def _forward(layer: nn.Linear, keep_copies: bool, x: Tensor) -> Tensor:
    """(..., in) -> (..., out), in autocast's dtype; without autocast as ever."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    return _Product.apply(x.to(torch.get_autocast_dtype(kind)), layer.weight, layer.bias, keep_copies)


def add_adapters_in_place(model: nn.Module) -> None:
    """Replaces `forward` of layers with a plain LoRA of peft's: the LoRA is added to the layer's own output, without casts to its fp32."""
    for layer in adapter_layers(model):
        if _is_plain_lora(layer):
            layer.forward = partial(_forward_with_lora, layer, layer.forward)


def _is_plain_lora(layer: nn.Module) -> bool:
    """One LoRA without dropout or a variant (DoRA), beside a frozen layer that isn't quantized."""
    from peft.tuners.lora import Linear

    varied = getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values())  # the second before peft 0.16
    if type(layer) is not Linear or layer.fan_in_fan_out or varied or list(layer.lora_A) != [NAME]:
        return False
    base, down, up = layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME]
    frozen = type(base) is nn.Linear and base.weight.is_floating_point() and not any(value.requires_grad for value in base.parameters())
    return frozen and type(layer.lora_dropout[NAME]) is nn.Identity and down.bias is None and up.bias is None


def _forward_with_lora(layer: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """As peft's own forward (`plain`), which serves without autocast, without gradients and where the adapter is off or merged."""
    kind = x.device.type
    if layer.disable_adapters or layer.merged or not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled():
        return plain(x)
    base, down, up = layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME]
    rows = x.to(torch.get_autocast_dtype(kind)).reshape(-1, x.shape[-1])
    return _ProductWithLora.apply(rows, base.weight, base.bias, down.weight, up.weight, layer.scaling[NAME]).reshape(*x.shape[:-1], -1)


class _ProductWithLora(torch.autograd.Function):
    """x W^T + b + scale x A^T B^T for rows x, in their dtype; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        low = x @ down.to(x.dtype).t()
        out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        out.addmm_(low, (up * scale).to(x.dtype).t())
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        for_low = gradient @ (up * ctx.scale).to(gradient.dtype)
        for_down = (for_low.t() @ x).to(down.dtype)
        for_up = (gradient.t() @ low).to(up.dtype) * ctx.scale
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient @ weight.to(gradient.dtype)).addmm_(for_low, down.to(gradient.dtype))
        return for_x, None, None, for_down, for_up, None


def _gradient_dtype(weight: Tensor) -> torch.dtype | None:
    """Before torch 2.10, and where a weight is computed itself, that of the weight."""
    return weight.grad_dtype if weight.is_leaf and hasattr(weight, "grad_dtype") else weight.dtype


class _Product(torch.autograd.Function):
    """x W^T + b in the dtype of x, whatever that of W and b is.

    A weight whose gradient may be in any dtype (`grad_dtype` None) gets it as it was computed, in that of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep_copies: bool) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast if keep_copies else weight)
        ctx.bias, ctx.wanted = None if bias is None else bias.dtype, _gradient_dtype(weight)
        return F.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        for_x = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        for_weight = (rows.t() @ x.flatten(0, -2)).to(ctx.wanted or x.dtype) if ctx.needs_input_grad[1] else None
        for_bias = rows.sum(0).to(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias, None
