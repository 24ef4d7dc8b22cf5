"""Merging an adapter's layers into the parameters of a torch module."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .fit import Fit, fit_adapter
from .layer import Layer
from .load import load_adapter


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters (and tables kept as buffers) that take a sum: floating-point ones of at least 16 bits."""
    return {name: tuple(p.shape) for name, p in _tensors(model).items() if p.is_floating_point() and p.dtype.itemsize > 1}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Not by state_dict(), which repacks weights of bitsandbytes on some processors."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers themselves, no copies, for `restore_weights`: merging replaces them and never writes into them."""
    return _tensors(model)


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts back what `weights_of` had found, and so takes off exactly whatever was merged since."""
    now = _tensors(model)
    for key, value in weights.items():
        if now.get(key) is not value:
            module, _, name = key.rpartition(".")
            setattr(model.get_submodule(module), name, value)


def merge_layers(model: nn.Module, layers: Iterable[Layer], strength: float) -> None:
    """Replaces parameters by their sums with the layers' changes; sums are in fp32, results in the parameter's dtype.

    Parameters are replaced at the end and never written into: those of a mapped file stay as they are.
    """
    _replace(model, _merged(model, layers, strength))


@torch.no_grad()
def _merged(model: nn.Module, layers: Iterable[Layer], strength: float) -> dict[str, Tensor]:
    """Parameter name -> its sum with the changes, rounded once."""
    state = _tensors(model)
    by_parameter: dict[str, list[tuple[Layer, bool]]] = {}
    for layer in layers:
        place = layer.place
        if layer.has_weight:
            by_parameter.setdefault(place.weight, []).append((layer, False))
        bias, weight = state.get(place.bias), state.get(place.weight)
        if layer.touches(None if bias is None else bias.shape, _piece_shape(weight, layer)):
            by_parameter.setdefault(place.bias, []).append((layer, True))
    merged = {}
    for key, changes in by_parameter.items():
        whole = state[key].detach().to(torch.float32, copy=True)
        for layer, of_bias in changes:
            piece = whole.chunk(layer.place.parts, dim=0)[layer.place.part]  # a view
            piece += strength * (layer.bias_change(piece) if of_bias else layer.change(piece))
        merged[key] = whole.to(state[key].dtype)
    return merged


def _piece_shape(weight: Tensor | None, layer: Layer) -> tuple[int, ...]:
    return () if weight is None else (weight.shape[0] // layer.place.parts, *weight.shape[1:])


def _replace(model: nn.Module, merged: dict[str, Tensor]) -> None:
    for key, value in merged.items():
        module, _, name = key.rpartition(".")
        owner = model.get_submodule(module)
        old = getattr(owner, name)
        setattr(owner, name, nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value)


def merge_file(
    path: str | Path, strength: float, transformer: nn.Module, text_encoder: nn.Module | None, text_strength: float | None = None
) -> Fit:
    """Merges an adapter file or PEFT folder into a transformer, and into T5 where one is given; the errors are fit_adapter's.

    text_strength: of the changes of T5, as `strength` if None; 0 leaves them out. Both models are changed, or neither.
    """
    text_strength = strength if text_strength is None else text_strength
    text = None if text_encoder is None else parameter_shapes(text_encoder)
    fit = fit_adapter(load_adapter(path), parameter_shapes(transformer), text, leave_text=text_strength == 0)
    merged = _merged(transformer, fit.layers, strength)
    of_text = {} if text_encoder is None or text_strength == 0 else _merged(text_encoder, fit.text_layers, text_strength)
    _replace(transformer, merged)
    if text_encoder is not None:
        _replace(text_encoder, of_text)
    return fit
