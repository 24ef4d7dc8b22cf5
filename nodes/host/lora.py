"""Adapters as patches of the host's MODEL and CLIP: its own weight adapters where they compute the right sum, ours elsewhere."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ...pixart.adapters import Fit, Layer, fit_adapter, load_adapter
from ...pixart.adapters.names import TABLES, TRANSFORMER, Place
from ...pixart.errors import InputError

Patches = dict[Any, Any]  # as ModelPatcher.add_patches takes them
# The host's names of the roles that differ from ours.
HOST_ROLES = {"lora_up": "lora_up.weight", "lora_down": "lora_down.weight", "lora_mid": "lora_mid.weight"}
TUCKER = {"lokr_t2", "hada_t1", "hada_t2"}  # kernels in three factors, which not every host puts together as LyCORIS does
MODEL_PREFIX, T5_PREFIX = "diffusion_model.", "t5xxl.transformer."


def apply_lora(model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float) -> tuple[Any, Any, Fit]:
    """Clones of MODEL and CLIP (or None) with the adapter's patches, and what fitted.

    Raises CheckpointError where the file fits neither, InputError for a MODEL that is no PixArt.
    """
    if not isinstance(model.model, comfy.model_base.PixArt):
        raise InputError(f"This MODEL is {type(model.model).__name__}, no PixArt. Use LoraLoaderModelOnly for it.")
    text_shapes = None if clip is None else _shapes(clip.cond_stage_model, T5_PREFIX)
    fit = fit_adapter(load_adapter(path), _shapes(model.model, MODEL_PREFIX), text_shapes)
    patched = model.clone()
    patched.add_patches(_patches(fit.layers, MODEL_PREFIX), strength_model)
    if clip is not None:
        clip = clip.clone()
        clip.add_patches(_patches(fit.text_layers, T5_PREFIX), strength_clip)
    return patched, clip, fit


def _shapes(model: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Native parameter names -> shapes; of linear layers by their sizes, since quantized weights are packed."""
    found = {}
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        foreign = type(module).__module__.startswith("bitsandbytes")  # packed, and out of reach of the host's patches
        if not name.startswith(prefix):
            continue
        name = name[len(prefix) :]
        tables = {key: value for key, value in module.named_parameters(recurse=False) if f"{name}.{key}".endswith(TABLES)}
        found |= {f"{name}.{key}": tuple(value.shape) for key, value in tables.items()}
        if not isinstance(weight, Tensor) or foreign:
            continue
        linear = hasattr(module, "in_features")
        found[f"{name}.weight"] = (module.out_features, module.in_features) if linear else tuple(weight.shape)
        if isinstance(bias, Tensor):
            found[f"{name}.bias"] = tuple(bias.shape)
    return found


def _patches(layers: tuple[Layer, ...], prefix: str) -> Patches:
    patches: Patches = {}
    for layer in layers:
        bias = layer.of_bias()
        if layer.has_weight:
            by_host = layer.is_sum and not TUCKER & set(layer.tensors)
            patches[_target(layer, prefix + layer.place.weight)] = host_patch(layer) if by_host else OwnAdapter.of(layer)
        if bias is not None:
            key = _target(bias, f"{prefix}{layer.place.module}.bias")
            patches[key] = ("diff", (bias.tensors["diff"].float(),)) if bias.is_sum else OwnAdapter.of(bias)
    return patches


def _target(layer: Layer, key: str) -> Any:
    """Key of a patch; of a fused weight's piece with (axis, start, length)."""
    if layer.place.parts == 1:
        return key
    rows = layer.shape()[0]
    return key, (0, layer.place.part * rows, rows)


def host_patch(layer: Layer) -> Any:
    """The host's own adapter of a layer without DoRA."""
    name = "layer"
    tensors = {f"{name}.{HOST_ROLES.get(role, role)}": tensor for role, tensor in layer.tensors.items()}
    if layer.rank:
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float64)
    elif layer.scale != 1.0:  # LoKr of two whole factors: the host knows no scale there
        tensors[f"{name}.lokr_w1"] = layer.tensors["lokr_w1"].float() * layer.scale
    return comfy.lora.load_lora(tensors, {name: name}, log_missing=False)[name]


class OwnAdapter(WeightAdapterBase):
    """What looks at the weight that it changes, by the core's formulas: DoRA, of which the host takes the norm of the weight without
    the change (0.3.64 .. 0.33.0), OFT and BOFT, which it turns by the square of the strength, and whole weights."""

    name = "pixart"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        """weights: scale, roles and the tensors of `Layer`, in a plain tuple: newer hosts make adapters anew of these two."""
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, layer: Layer) -> OwnAdapter:
        """The adapter of one layer."""
        return cls(set(layer.keys), (layer.scale, tuple(layer.tensors), *layer.tensors.values()))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Adds to `weight`, in place, as the host's adapters do; it may be a piece of a fused weight."""
        scale, roles, *tensors = self.weights
        layer = Layer(Place(TRANSFORMER, key), dict(zip(roles, tensors)), scale, ())
        weight += function((strength * layer.change(weight)).to(weight.dtype))
        return weight
