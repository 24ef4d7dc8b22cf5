"""Frozen weights that adapters and ControlNets are trained beside, in as few bits as asked; they are never written into a result."""
from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.quantize import FP8, LARGEST, MATRICES
from ..errors import ConfigError
from ..text.names import NF4
from ..text.quantize import QuantizedLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED = ("fp8", "nf4")
OF_BLOCKS = re.compile(MATRICES.pattern.removesuffix(r"\.weight"))


def check_base(base: str | None, precision: str) -> None:
    """Raises ConfigError unless frozen weights can be kept in `base` (null: as `precision` computes) in this run."""
    if base not in (None, *DTYPES, *PACKED):
        raise ConfigError(f"base is {base!r}; expected one of {', '.join((*DTYPES, *PACKED))}, or null for the run's own precision.")
    if base in ("bf16", "fp16") and precision != base:
        raise ConfigError(f"base is {base!r}, which needs the precision {base!r} too; this run computes in {precision!r}.")


def base_dtype(base: str | None, precision: str) -> torch.dtype:
    """Of the weights that stay as they are; of packed ones, those beside the matrices."""
    return DTYPES.get(precision if base is None or base in PACKED else base, torch.float32)


def pack_matrices(network: nn.Module, base: str | None, device: torch.device, names: re.Pattern[str] = OF_BLOCKS) -> nn.Module:
    """Puts a `PackedLinear` in the place of every linear layer that `names` matches, if `base` is one of PACKED; returns the network."""
    if base in PACKED:
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Linear) and names.fullmatch(name):
                network.set_submodule(name, PackedLinear(layer, base, device))
    return network


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is fp8 with a scale for each row, or bitsandbytes' nf4 (QLoRA, arXiv:2305.14314).

    It is unpacked for each product, and again in the backward pass. `weight` is the unpacked one, for peft.
    """

    def __init__(self, layer: nn.Linear, precision: str, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        weight = layer.weight.detach()
        self.nf4, self.precision = None, precision
        if precision == "nf4" and device.type != "meta":  # in a dry run fp8 stands for it
            self.nf4 = QuantizedLinear(self.in_features, self.out_features)
            self.nf4.quantize(weight, NF4, device)
            return
        wide = weight.to(device, torch.float32)
        scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("packed", (wide / scale).clamp(-LARGEST, LARGEST).to(FP8))
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """(out, in), unpacked, fp32."""
        return self.unpacked(torch.float32)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in a dtype of computation."""
        if self.nf4 is not None:
            return self.nf4.unpack(self.nf4.parts()).to(dtype)
        return (self.packed.to(torch.float32) * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype that autocast asks for, else that of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _Product.apply(x.to(dtype), self)


class _Product(torch.autograd.Function):
    """x W^T + b that keeps no unpacked weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None
