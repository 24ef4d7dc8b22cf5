"""Merging an adapter's layers into the parameters of a torch module."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .fit import Fit, fit_adapter
from .layer import Layer
from .load import load_adapter


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that take a sum: floating-point ones of at least 16 bits."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize > 1}


@torch.no_grad()
def merge_layers(model: nn.Module, layers: Iterable[Layer], strength: float) -> None:
    """Replaces parameters by their sums with the layers' changes; sums are in fp32, results in the parameter's dtype.

    Parameters are replaced at the end and never written into: those of a mapped file stay as they are.
    """
    merged: dict[str, Tensor] = {}
    for layer in layers:
        for key, change in ((layer.place.weight, layer if layer.has_weight else None), (f"{layer.place.module}.bias", layer.of_bias())):
            if change is None:
                continue
            whole = merged[key] if key in merged else model.get_parameter(key).detach().to(torch.float32, copy=True)
            piece = whole.chunk(layer.place.parts, dim=0)[layer.place.part]  # a view
            piece += strength * change.change(piece)
            merged[key] = whole
    for key, value in merged.items():
        module, _, name = key.rpartition(".")
        old = model.get_parameter(key)
        setattr(model.get_submodule(module), name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def merge_file(path: str | Path, strength: float, transformer: nn.Module, text_encoder: nn.Module | None) -> Fit:
    """Merges an adapter file or PEFT folder into a transformer, and into T5 where one is given; the errors are fit_adapter's."""
    text = None if text_encoder is None else parameter_shapes(text_encoder)
    fit = fit_adapter(load_adapter(path), parameter_shapes(transformer), text)
    merge_layers(transformer, fit.layers, strength)
    if text_encoder is not None:
        merge_layers(text_encoder, fit.text_layers, strength)
    return fit
