"""One adapted weight and its bias: what a file's tensors change, in float32, with DoRA on top."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .matrices import MATRICES, product, rank_of
from .names import Place
from .rotation import ROTATIONS, Rotation, rotated

SCALINGS = {"ia3_l": "(IA)^3", "ia3_weight": "(IA)^3"}  # role -> method: PEFT's, and LyCORIS', which leaves the bias alone
METHODS = {**MATRICES, **ROTATIONS, **SCALINGS}
BIAS_ROLES = ("diff_b", "lora_bias", "whole_bias")
MAGNITUDES = ("dora_scale", "magnitude")


@dataclass(frozen=True)
class Layer:
    """The tensors that change one weight (or a piece of a fused one); `scale` is alpha / rank."""

    place: Place
    tensors: Mapping[str, Tensor]  # by role, see names.ROLES
    scale: float
    keys: tuple[str, ...]  # as the file names them
    rotation: Rotation = Rotation()

    @property
    def algorithm(self) -> str:
        """Name of the method, with "DoRA" where a magnitude is given."""
        name = next(iter(self.methods), "whole layer" if "whole" in self.tensors else "bias")
        if name == "OFT" and self.tensors.get("oft_blocks", torch.empty(0)).ndim == 4:
            name = "BOFT"
        return f"DoRA ({name})" if self.is_dora else name

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods of which the file has tensors for this layer; more than one can't be."""
        return tuple(dict.fromkeys(METHODS[role] for role in self.tensors if role in METHODS))

    @property
    def is_dora(self) -> bool:
        """Whether the sum of weight and change is brought to a learned magnitude."""
        return any(role in self.tensors for role in MAGNITUDES)

    @property
    def has_weight(self) -> bool:
        """Whether the weight is changed, and not the bias alone."""
        return "whole" in self.tensors or self._has(METHODS)

    @property
    def has_bias(self) -> bool:
        """Whether the layer's bias is changed, which the model must then have."""
        return self._has(BIAS_ROLES)

    @property
    def rank(self) -> int | None:
        """Inner size of the decomposition; None if it has none."""
        return rank_of(self.tensors)

    @property
    def is_product(self) -> bool:
        """Whether the change is a product of matrices, whatever the weight is."""
        return self._has(MATRICES) and not self.is_dora and "whole" not in self.tensors

    @property
    def is_matrices(self) -> bool:
        """Whether a product of matrices is part of the change, so that `shape` tells its size."""
        return self._has(MATRICES)

    @property
    def bias_size(self) -> int:
        """Numbers of the changed bias."""
        return next(self.tensors[role].numel() for role in BIAS_ROLES if role in self.tensors)

    def on(self, device: torch.device) -> Layer:
        """The same layer with its tensors on a device; on "meta" without their numbers."""
        return replace(self, tensors={role: tensor.to(device) for role, tensor in self.tensors.items()})

    def shape(self) -> tuple[int, int]:
        """(rows, all other axes) of a product; RuntimeError where the matrices don't fit each other."""
        delta = product({role: torch.empty(t.shape, device="meta") for role, t in self.tensors.items()})
        return delta.shape[0], prod(delta.shape[1:])

    def change(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (rows, ...) at strength 1, in float32 and of its shape; RuntimeError where sizes don't fit.

        DoRA (arXiv:2402.09353, eq. 5): W' = m (W + dW) / ||W + dW||, with the norm over each row, as PEFT has it, or
        over each column where LyCORIS stored one magnitude per column.
        """
        tensors = {role: t.to(weight.device, torch.float32) for role, t in self.tensors.items()}
        if self.is_product:
            return (self.scale * product(tensors)).reshape(weight.shape)
        weight = weight.to(torch.float32)
        changed = self._changed(tensors["whole"].reshape(weight.shape) if "whole" in tensors else weight, tensors)
        if self.is_dora:
            changed = _to_magnitude(changed, tensors)
        return changed - weight

    def _changed(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The new weight, before DoRA."""
        if self._has(MATRICES):
            return weight + (self.scale * product(tensors)).reshape(weight.shape)
        if self._has(ROTATIONS):
            return rotated(weight, tensors, self.rotation)
        if self._has(SCALINGS):
            factors = next(tensors[role] for role in SCALINGS if role in tensors)
            axis = _scaled_axis(factors, weight.shape)
            return weight * factors.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        return weight

    def touches(self, bias: tuple[int, ...] | None, weight: tuple[int, ...]) -> bool:
        """Whether a bias of this shape, beside a weight of that shape, is changed; (IA)^3 of rows scales it too."""
        if self.has_bias:
            return True
        return bias is not None and "ia3_l" in self.tensors and _scaled_axis(self.tensors["ia3_l"], weight) == 0

    def bias_change(self, bias: Tensor) -> Tensor:
        """What is added to `bias` (rows) at strength 1, in float32; RuntimeError where sizes don't fit."""
        tensors = {role: t.to(bias.device, torch.float32) for role, t in self.tensors.items()}
        bias = bias.to(torch.float32)
        changed = tensors["whole_bias"].reshape(bias.shape) if "whole_bias" in tensors else bias
        if "diff_b" in tensors:
            changed = changed + tensors["diff_b"].reshape(bias.shape)
        if "lora_bias" in tensors:
            changed = changed + self.scale * tensors["lora_bias"].reshape(bias.shape)
        if "ia3_l" in tensors and tensors["ia3_l"].numel() == bias.numel():
            changed = changed * tensors["ia3_l"].reshape(bias.shape)
        return changed - bias

    def _has(self, roles: Mapping[str, str] | tuple[str, ...]) -> bool:
        return any(role in self.tensors for role in roles)


def _to_magnitude(changed: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    role = next(role for role in MAGNITUDES if role in tensors)
    axis = magnitude_axis(role, tensors[role], changed.shape)
    norm = torch.linalg.vector_norm(changed, dim=[i for i in range(changed.ndim) if i != axis], keepdim=True)
    return changed * (tensors[role].reshape(norm.shape) / norm.clamp_min(torch.finfo(torch.float32).tiny))


def magnitude_axis(role: str, magnitude: Tensor, shape: tuple[int, ...]) -> int:
    """0 for one magnitude per row, 1 for one per column; RuntimeError for other shapes.

    PEFT always has one per row: (rows,), of convolutions (1, rows, 1, 1). LyCORIS, kohya and OneTrainer have (rows, 1)
    or (1, columns).
    """
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 0
    sizes, numbers = tuple(magnitude.shape), magnitude.numel()
    if numbers == rows and max(sizes, default=0) == rows and (role == "magnitude" or sizes[0] == rows or rows != columns):
        return 0
    if len(sizes) > 1 and numbers == sizes[1] == columns:
        return 1
    raise RuntimeError(f"magnitude has shape {sizes} for a weight {tuple(shape)}")


def _scaled_axis(factors: Tensor, shape: tuple[int, ...]) -> int:
    """0 where factors (rows, 1) scale what comes out, 1 where (1, columns) scale what goes in; convolutions have (1, n, 1, 1)."""
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 0
    sizes = tuple(factors.shape)
    if factors.numel() == rows and (sizes[0] == rows or len(sizes) == 4):
        return 0
    if factors.numel() == columns and len(sizes) > 1 and sizes[1] == columns:
        return 1
    raise RuntimeError(f"factors have shape {sizes} for a weight {tuple(shape)}")
