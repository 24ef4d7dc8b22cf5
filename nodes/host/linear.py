"""The host's linear layers behind the core's seam: which of them only multiply by their weight as it is."""
from __future__ import annotations

import comfy.ops
from torch import Tensor, nn

from ...pixart.linear import applied

PLAIN = comfy.ops.disable_weight_init.Linear


def host_linear(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """As `pixart.linear.torch_linear`; layers with patches on top, or with weights in a format of their own, are called."""
    kind = type(layer)
    # A layer that casts its weight serves too: the core asks whether dtype and device are those of x already
    own = issubclass(kind, PLAIN) and all(getattr(kind, name) is getattr(PLAIN, name) for name in ("forward", "forward_comfy_cast_weights"))
    return applied(layer, x, gelu=gelu, plain=own and not (layer.weight_function or layer.bias_function))
