"""The linear seam of a block, and one kernel for product, bias and GELU on x86 CPUs with bf16 instructions.

There torch copies the bias to every row and adds the product to it, and GELU is another pass with a slow tanh. oneDNN does all three
at once and rounds once: 0.6 of the time of a block's first MLP layer, 0.8 of the time of its queries, keys and values (with AMX).
"""
from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import X86, bf16_instructions


class LinearFunction(Protocol):
    """What a layer makes of x, (..., in) -> (..., out); gelu: through tanh-GELU."""

    def __call__(self, layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor: ...


def torch_linear(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """In one kernel where that is faster; a layer that isn't torch's own, as an adapter's, is called."""
    if type(layer) is nn.Linear and fits_kernel(layer, x):
        return by_kernel(layer, x, gelu=gelu)
    return by_call(layer, x, gelu=gelu)


def by_call(layer: nn.Module, x: Tensor, *, gelu: bool) -> Tensor:
    """By the layer itself. GELU's input is the largest tensor of a block, so it is overwritten where no gradient needs it."""
    out = layer(x)
    if not gelu:
        return out
    return F.gelu(out, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(out, approximate="tanh")


def by_kernel(layer: nn.Module, x: Tensor, *, gelu: bool) -> Tensor:
    """For layers that `fits_kernel` takes."""
    return _kernel()(x, layer.weight, layer.bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))


def fits_kernel(layer: nn.Module, x: Tensor) -> bool:
    """Whether there is a kernel: bf16 on a CPU, without gradients, hooks or a replaced `forward`; a compiler chooses kernels itself.

    The layer must do nothing but multiply by its weight as it is and add its bias, which the caller knows.
    """
    if torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    weight, bias = layer.weight, layer.bias
    alike = type(weight) is nn.Parameter and bias is not None and weight.dtype == bias.dtype == x.dtype and weight.device == x.device
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return alike and not changed and x.numel() > 0 and x.is_contiguous() and weight.is_contiguous() and _kernel() is not None


@cache
def _kernel() -> Any:
    """oneDNN's linear layer with what follows it, if this CPU gains by it and this torch has it; else None.

    Not on Arm, where oneDNN has it only for packed weights, and else computes number by number.
    """
    if bf16_instructions() not in X86 or not torch.backends.mkldnn.is_available():
        return None
    with torch.autocast("cpu", enabled=False), torch.device("cpu"):  # whatever the first caller has set
        x, weight, bias = (torch.linspace(-2, 2, count, dtype=torch.bfloat16) for count in (32, 64, 4))
        x, weight = x.view(2, 16), weight.view(4, 16)
        try:
            kernel = torch.ops.mkldnn._linear_pointwise
            found = kernel(x, weight, bias, "gelu", [], "tanh")
        except (AttributeError, RuntimeError):  # another torch, whose kernel is elsewhere or wants packed weights
            return None
        wanted = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
        return kernel if torch.allclose(found.float(), wanted, atol=0.02, rtol=0.02) else None
