"""Adapters as patches of the host's MODEL and CLIP: its own weight adapters for products of matrices, ours for the rest."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ...pixart.adapters import Fit, Layer, Shapes, fit_adapter, load_adapter
from ...pixart.adapters.matrices import MATRICES
from ...pixart.adapters.names import TRANSFORMER, Place
from ...pixart.adapters.rotation import Rotation
from ...pixart.errors import InputError
from .tables import follow_patches

Patches = dict[Any, Any]  # as ModelPatcher.add_patches takes them
# The host's names of the roles that differ from ours.
HOST_ROLES = {"lora_up": "lora_up.weight", "lora_down": "lora_down.weight", "lora_mid": "lora_mid.weight"}
TABLE = "scale_shift_table"  # y_embedding is read before the host has patched anything
MODEL_PREFIX, T5_PREFIX = "diffusion_model.", "t5xxl.transformer."


def apply_lora(model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float) -> tuple[Any, Any, Fit]:
    """Clones of MODEL and CLIP (or None) with the adapter's patches, and what fitted.

    Without CLIP, strength_clip 0 leaves the layers of T5 out. Raises CheckpointError where the file doesn't fit both as a
    whole, InputError for a MODEL that is no PixArt.
    """
    if not isinstance(model.model, comfy.model_base.PixArt):
        raise InputError(f"This MODEL is {type(model.model).__name__}, not a PixArt. Use LoraLoaderModelOnly for it.")
    shapes = _shapes(model.model, MODEL_PREFIX)
    text_shapes = {} if clip is None else _shapes(clip.cond_stage_model, T5_PREFIX)
    fit = fit_adapter(load_adapter(path), shapes, None if clip is None else text_shapes, leave_text=strength_clip == 0)
    patched = model.clone()
    patched.add_patches(_patches(fit.layers, MODEL_PREFIX, shapes), strength_model)
    follow_patches(patched)
    if clip is not None:
        clip = clip.clone()
        clip.add_patches(_patches(fit.text_layers, T5_PREFIX, text_shapes), strength_clip)
    return patched, clip, fit


def _shapes(model: nn.Module, prefix: str) -> Shapes:
    """Native parameter names -> shapes; of linear layers by their sizes, since quantized weights are packed."""
    found = {}
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        foreign = type(module).__module__.startswith("bitsandbytes")  # packed, and out of reach of the host's patches
        if not name.startswith(prefix):
            continue
        name = name[len(prefix) :]
        parameters = {f"{name}.{key}": value for key, value in module.named_parameters(recurse=False)}
        found |= {key: tuple(value.shape) for key, value in parameters.items() if key.endswith(TABLE)}
        if not isinstance(weight, Tensor) or foreign:
            continue
        linear = hasattr(module, "in_features")
        found[f"{name}.weight"] = (module.out_features, module.in_features) if linear else tuple(weight.shape)
        if isinstance(bias, Tensor):
            found[f"{name}.bias"] = tuple(bias.shape)
    return found


def _patches(layers: tuple[Layer, ...], prefix: str, shapes: Shapes) -> Patches:
    patches: Patches = {}
    for layer in layers:
        place = layer.place
        weight = shapes.get(place.weight)
        piece = (weight[0] // place.parts, *weight[1:]) if weight else ()
        if layer.has_weight:
            hosts = layer.is_product and "lokr_t2" not in layer.tensors
            patch = host_patch(layer) if hosts else LayerAdapter.of(layer, of_bias=False)
            patches[_target(layer, prefix + place.weight, piece[0])] = patch
        if layer.touches(shapes.get(place.bias), piece):
            rows = shapes[place.bias][0] // place.parts
            patches[_target(layer, prefix + place.bias, rows)] = LayerAdapter.of(layer, of_bias=True)
    return patches


def _target(layer: Layer, key: str, rows: int) -> Any:
    """Key of a patch; of a fused weight's piece with (axis, start, length)."""
    return key if layer.place.parts == 1 else (key, (0, layer.place.part * rows, rows))


def host_patch(layer: Layer) -> Any:
    """The host's own adapter of a product of matrices."""
    name = "layer"
    matrices = {role: tensor for role, tensor in layer.tensors.items() if role in MATRICES and role != "lora_bias"}
    tensors = {f"{name}.{HOST_ROLES.get(role, role)}": tensor for role, tensor in matrices.items()}
    if layer.rank:
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float64)
    elif layer.scale != 1.0:  # LoKr of two whole factors: the host knows no scale there
        tensors[f"{name}.lokr_w1"] = layer.tensors["lokr_w1"].float() * layer.scale
    return comfy.lora.load_lora(tensors, {name: name}, log_missing=False)[name]


class LayerAdapter(WeightAdapterBase):
    """A layer by the core's formulas, where the host has none, or not the right ones (0.3.64 .. 0.33.0).

    Its DoRA takes the norm of the weight without the change, its OFT takes the strength twice and no factors of rows, and
    it fails at LoKr with a core, which it only logs.
    """

    name = "pixart"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        """weights: parts of `Layer` and its tensors, in a plain tuple: newer hosts make adapters anew of these two."""
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, layer: Layer, of_bias: bool) -> LayerAdapter:
        """The adapter of a layer's weight, or of its bias."""
        roles = {role: tensor for role, tensor in layer.tensors.items() if role != "reshape_weight"}
        return cls(set(layer.keys), (of_bias, layer.scale, tuple(layer.rotation), tuple(roles), *roles.values()))

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
        of_bias, scale, rotation, roles, *tensors = self.weights
        layer = Layer(Place(TRANSFORMER, key), dict(zip(roles, tensors)), scale, (), Rotation(*rotation))
        change = layer.bias_change(weight) if of_bias else layer.change(weight)
        weight += function((strength * change).to(weight.dtype))
        return weight
