"""The linear seam of a block, and one kernel for product, bias and GELU on CPUs with bf16 instructions.

There torch copies the bias to every row and adds the product to it, and GELU is another pass with a slow tanh. oneDNN does all three
at once and rounds once: 0.6 of the time of a block's first MLP layer with AMX, 0.8 of the time of its queries, keys and values.
"""
from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import bf16_instructions


class LinearFunction(Protocol):
    """What a layer makes of x, (..., in) -> (..., out); gelu: through tanh-GELU."""

    def __call__(self, layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor: ...


def torch_linear(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """In one kernel where that is faster; a layer that isn't torch's own, as an adapter's, is called."""
    return applied(layer, x, gelu=gelu, plain=type(layer) is nn.Linear)


def applied(layer: nn.Module, x: Tensor, *, gelu: bool, plain: bool) -> Tensor:
    """As `torch_linear`; plain: the layer is known to do nothing but multiply by its weight as it is and add its bias."""
    if plain and _fits_kernel(layer, x):
        return _kernel()(x, layer.weight, layer.bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
    out = layer(x)
    if not gelu:
        return out
    # The largest tensor of a block, so in place where no gradient needs it
    return F.gelu(out, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(out, approximate="tanh")


def _fits_kernel(layer: nn.Module, x: Tensor) -> bool:
    """bf16 on a CPU, without gradients, hooks or a replaced `forward`; in a graph the compiler chooses kernels itself."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    weight, bias = layer.weight, layer.bias
    alike = type(weight) is nn.Parameter and bias is not None and weight.dtype == bias.dtype == x.dtype and weight.device == x.device
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return alike and not changed and x.numel() > 0 and x.is_contiguous() and weight.is_contiguous() and _kernel() is not None


@cache
def _kernel() -> Any:
    """oneDNN's linear layer with what follows it, if this CPU has bf16 instructions and this torch the kernel; else None."""
    if not bf16_instructions() or not torch.backends.mkldnn.is_available():
        return None
    x, weight, bias = (torch.linspace(-2, 2, count, dtype=torch.bfloat16) for count in (32, 64, 4))
    x, weight = x.view(2, 16), weight.view(4, 16)
    try:
        kernel = torch.ops.mkldnn._linear_pointwise
        found = kernel(x, weight, bias, "gelu", [], "tanh")
    except (AttributeError, RuntimeError):  # another torch, whose kernel is elsewhere or wants packed weights
        return None
    wanted = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    return kernel if torch.allclose(found.float(), wanted, atol=0.02, rtol=0.02) else None
