"""One adapted weight and its mathematics, in float32: LoRA, LoHa, LoKr, OFT, BOFT, differences, whole weights, and DoRA on top."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .names import Place
from .rotation import rotated, rows_of

ALGORITHMS = {
    "lora_up": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "diff": "difference", "oft_blocks": "OFT",
    "set": "whole weight",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The tensors that change one weight (or a piece of a fused one); `scale` is alpha / rank, of OFT its constraint."""

    place: Place
    tensors: Mapping[str, Tensor]  # by role, see names.ROLES
    scale: float
    keys: tuple[str, ...]  # as the file names them

    @property
    def algorithm(self) -> str:
        """Name of the decomposition, with "DoRA" where a magnitude is given."""
        name = next((name for role, name in ALGORITHMS.items() if role in self.tensors), "bias")
        name = "BOFT" if name == "OFT" and self.tensors["oft_blocks"].ndim == 4 else name
        return f"DoRA ({name})" if self.is_dora else name

    @property
    def is_dora(self) -> bool:
        """Whether the sum of weight and change is brought to a learned magnitude."""
        return "dora_scale" in self.tensors

    @property
    def has_weight(self) -> bool:
        """Whether the weight is changed, and not the bias alone."""
        return any(role in self.tensors for role in ALGORITHMS)

    @property
    def is_sum(self) -> bool:
        """Whether the change is the same whatever the weight is."""
        return not (self.is_dora or "oft_blocks" in self.tensors or "set" in self.tensors)

    @property
    def rank(self) -> int | None:
        """Inner size of the decomposition; None if it has none."""
        return rank_of(self.tensors)

    def shape(self) -> tuple[int, int | None]:
        """(rows, all other axes) of the change, None for any; RuntimeError where the matrices don't fit each other."""
        if "oft_blocks" in self.tensors:
            rows = rows_of(self.tensors["oft_blocks"])
            scale = self.tensors.get("rescale")
            if scale is not None and scale.numel() != rows:
                raise RuntimeError(f"{scale.numel()} factors of rescale for {rows} rows")
            return rows, None
        delta = product({role: torch.empty(t.shape, device="meta") for role, t in self.tensors.items()})
        return delta.shape[0], prod(delta.shape[1:])

    def change(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (rows, ...) at strength 1, in float32 and of its shape.

        DoRA (arXiv:2402.09353, eq. 5): W' = m (W + dW) / ||W + dW||, with the norm over each row, as PEFT has it, or
        over each column where LyCORIS stored one magnitude per column.
        """
        tensors = {role: t.to(weight.device, torch.float32) for role, t in self.tensors.items()}
        if "set" in tensors:
            return tensors["set"].reshape(weight.shape) - weight.to(torch.float32)
        if "oft_blocks" in tensors:
            weight = weight.to(torch.float32)
            return rotated(weight, tensors["oft_blocks"], self.scale, tensors.get("rescale")) - weight
        delta = (self.scale * product(tensors)).reshape(weight.shape)
        if not self.is_dora:
            return delta
        weight = weight.to(torch.float32)
        changed = weight + delta
        axis = magnitude_axis(tensors["dora_scale"], weight.shape)
        others = [i for i in range(weight.ndim) if i != axis]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        magnitude = tensors["dora_scale"].reshape(norm.shape)
        return changed * (magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)) - weight

    def of_bias(self) -> Layer | None:
        """The same layer's bias, as a layer of its own; None if it isn't changed."""
        if "diff_b" in self.tensors:
            change = {"diff": self.tensors["diff_b"]}
        elif "set_b" in self.tensors:
            change = {"set": self.tensors["set_b"]}
        elif "lora_bias" in self.tensors:
            change = {"diff": self.scale * self.tensors["lora_bias"].to(torch.float32)}
        else:
            return None
        return Layer(self.place, change, 1.0, self.keys)


def magnitude_axis(magnitude: Tensor, shape: tuple[int, ...]) -> int:
    """0 for one magnitude per row, 1 for one per column; ValueError for other shapes. PEFT's of a convolution is (1, rows, 1, 1)."""
    if magnitude.numel() == shape[0] and (magnitude.ndim == 1 or magnitude.shape[0] == shape[0]):
        return 0
    if magnitude.ndim > 1 and len(shape) > 1 and magnitude.numel() == magnitude.shape[1] == shape[1]:
        return 1
    if magnitude.ndim == len(shape) > 2 and magnitude.numel() == magnitude.shape[1] == shape[0]:
        return 0
    raise ValueError(f"magnitude has shape {tuple(magnitude.shape)} for a weight {tuple(shape)}")


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Rank by which alpha is divided (LyCORIS: of the second factor, if that one is decomposed)."""
    inner = next((tensors[role] for role in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in tensors), None)
    return None if inner is None or inner.ndim == 0 else inner.shape[0]


def product(tensors: Mapping[str, Tensor]) -> Tensor:
    """The change without its scale, (rows, ...); kernels may be flattened. KeyError for a missing matrix.

    LoRA: up @ down (arXiv:2106.09685). LoHa: (a1 b1) * (a2 b2) elementwise (arXiv:2108.06098). LoKr: Kronecker
    product of two factors, each whole or decomposed (LyCORIS, arXiv:2309.14859).
    """
    whole = next((tensors[role] for role in ("diff", "set") if role in tensors), None)
    if whole is not None:
        return whole
    if "hada_w1_a" in tensors:
        first = _factor(tensors["hada_w1_a"], tensors["hada_w1_b"], tensors.get("hada_t1"))
        return first * _factor(tensors["hada_w2_a"], tensors["hada_w2_b"], tensors.get("hada_t2"))
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        first, second = _whole(tensors, "lokr_w1"), _whole(tensors, "lokr_w2")
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)
    up, core = tensors["lora_up"], tensors.get("lora_mid")
    return _factor(up if core is None else up.flatten(1).T, tensors["lora_down"], core)


def _whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    return _factor(tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get(name.replace("w", "t")))


def _factor(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b, kernels flattened; with a Tucker core (r, r, ...): a (r, rows), b (r, columns)."""
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    return torch.einsum("ij...,ip,jr->pr...", core, a, b.flatten(1))
