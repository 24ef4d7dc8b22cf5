"""The host's linear layers behind the core's seam: which of them only multiply by their weight as it is."""
from __future__ import annotations

import comfy.ops
from torch import Tensor, nn

from ...pixart.linear import by_call, by_kernel, fits_kernel

LINEAR = comfy.ops.disable_weight_init.Linear
METHODS = {name: getattr(LINEAR, name, None) for name in ("forward", "forward_comfy_cast_weights")}  # the host's own
ask_for_interruption = getattr(comfy.ops, "run_every_op", lambda: None)  # newer hosts do so in every layer


def host_linear(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """As `pixart.linear.torch_linear`; layers with patches on top, or with weights in a format of their own, are called."""
    if isinstance(layer, LINEAR) and fits_kernel(layer, x) and _is_plain(layer):
        ask_for_interruption()
        return by_kernel(layer, x, gelu=gelu)
    return by_call(layer, x, gelu=gelu)


def _is_plain(layer: nn.Module) -> bool:
    """A layer that casts its weight is, too: `fits_kernel` has seen that dtype and device are those of x already."""
    own = all(getattr(type(layer), name, None) is method for name, method in METHODS.items())
    return own and not (layer.weight_function or layer.bias_function)
