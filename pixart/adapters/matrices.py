"""Changes that are a product of small matrices: LoRA, LoHa, LoKr, and whole differences."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MATRICES = {  # role -> method
    **dict.fromkeys(("lora_up", "lora_down", "lora_mid", "lora_bias"), "LoRA"),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), "LoHa"),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), "LoKr"),
    "diff": "difference",
}
_CAN_BE_ZERO = frozenset({"lora_up", "lora_down", "lora_mid", "lora_bias", "diff", "diff_b", "alpha"})


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Rank by which alpha is divided (LyCORIS: of the second factor, if that one is decomposed)."""
    inner = next((tensors[role] for role in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in tensors), None)
    return None if inner is None or inner.ndim == 0 else inner.shape[0]


def product(tensors: Mapping[str, Tensor]) -> Tensor:
    """The change without its scale, (rows, ...); kernels may be flattened. KeyError for a missing matrix.

    LoRA: up @ down (arXiv:2106.09685). LoHa: (a1 b1) * (a2 b2) elementwise (arXiv:2108.06098). LoKr: Kronecker
    product of two factors, each whole or decomposed (LyCORIS, arXiv:2309.14859).
    """
    method = next(MATRICES[role] for role in tensors if role in MATRICES)
    if method == "difference":
        return tensors["diff"]
    if method == "LoHa":
        first = _factor(tensors["hada_w1_a"], tensors["hada_w1_b"], tensors.get("hada_t1"))
        return first * _factor(tensors["hada_w2_a"], tensors["hada_w2_b"], tensors.get("hada_t2"))
    if method == "LoKr":
        first, second = _whole(tensors, "lokr_w1"), _whole(tensors, "lokr_w2")
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())
    up, core = tensors["lora_up"], tensors.get("lora_mid")
    return _factor(up if core is None else up.flatten(1).T, tensors["lora_down"], core)


def is_nothing(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the change is zero whatever the weight is, as trainers store layers that they didn't train."""
    if not tensors.keys() <= _CAN_BE_ZERO:
        return False
    of_weight = [tensors[role] for role in ("lora_up", "lora_down") if role in tensors]
    of_bias = [tensors[role] for role in ("diff", "diff_b", "lora_bias") if role in tensors]
    zero = [not bool(tensor.float().any()) for tensor in of_weight]
    return (not zero or any(zero)) and not any(bool(tensor.float().any()) for tensor in of_bias) and bool(of_weight or of_bias)


def _whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    return _factor(tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get(name.replace("w", "t")))


def _factor(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b, kernels flattened; with a Tucker core (r, r, ...): a (r, rows), b (r, columns)."""
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    return torch.einsum("ij...,ip,jr->pr...", core, a, b.flatten(1))
