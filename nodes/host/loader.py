"""From a weight file or folder to the host's MODEL."""
from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...pixart.checkpoints import QUANTIZATION_SUFFIXES, Detection, prepare, read_checkpoint
from ...pixart.checkpoints.shards import SAFE_SUFFIXES
from ...pixart.logs import get_logger
from ...pixart.sampling_note import read_note
from . import quantized
from .dtypes import DTYPES, on_cpu
from .noise_levels import watch_noise_levels
from .paging import SAMPLED, pages_weights
from .supported import model_config
from .tables import follow_patches

log = get_logger(__name__)
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {**DTYPES, "fp8_e5m2": torch.float8_e5m2}


def load_model(path: str, variant: str, weight_dtype: str, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher; raises CheckpointError for anything but a whole, sound PixArt transformer.

    disable_dynamic: asked for by the host when it rebuilds the model without dynamic VRAM.
    """
    load_device = management.get_torch_device()
    paged = pages_weights() and not disable_dynamic and not management.is_device_cpu(load_device)
    state_dict, detection, metadata = _read(Path(path), variant, SAMPLED if paged else None)
    log.info("PixArt model:\n%s", detection.describe())
    note = read_note(path)
    if note is not None:
        log.info("PixArt model: %s", note.describe())
    config = model_config(detection)
    state_dict = quantized.configure(config, state_dict, metadata)
    _set_dtype(config, WEIGHT_DTYPES[weight_dtype], state_dict, load_device)
    model = config.get_model(state_dict)
    patcher = _patcher_class(disable_dynamic)(
        model, load_device=load_device, offload_device=management.unet_offload_device()
    )
    if not management.is_device_cpu(patcher.offload_device):
        model.to(patcher.offload_device)
    # With dynamic VRAM the tensors stay mapped to the file, so they become the parameters.
    assign = {"assign": True} if hasattr(patcher, "is_dynamic") and patcher.is_dynamic() else {}
    model.load_model_weights(state_dict, "", **assign)
    watch_noise_levels(patcher)
    follow_patches(patcher)
    patcher.cached_patcher_init = (load_model, (path, variant, weight_dtype))
    return patcher


def _read(path: Path, variant: str, sampled: int | None) -> tuple[dict[str, Tensor], Detection, Mapping[str, str] | None]:
    """Native tensors with their quantization extras, what they are, and the file's metadata."""
    raw = read_checkpoint(path)  # says in plain words what is wrong with a file
    tensors, metadata = raw.state_dict, None
    if path.is_file() and raw.container == "safetensors" and path.suffix.lower() in SAFE_SUFFIXES:  # the host goes by the suffix
        # Read by the host too: with dynamic VRAM its tensors know their place in the file.
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    prepared = prepare(
        tensors,
        source=raw.source,
        variant=variant,
        ema=raw.ema,
        passthrough_suffixes=QUANTIZATION_SUFFIXES,
        container=raw.container,
        hints=raw.hints,
        notes=raw.notes,
        sampled=sampled,
    )
    return {**prepared.state_dict, **prepared.extras}, prepared.detection, metadata


def _set_dtype(config: Any, wanted: torch.dtype | None, state_dict: Mapping[str, Tensor], device: torch.device) -> None:
    """Storage and computing dtype, chosen as the host's UNETLoader does it."""
    supported = list(config.supported_inference_dtypes)
    chosen = wanted is not None
    stored = None if quantized.is_quantized(config) else comfy.utils.weight_dtype(state_dict)
    if not chosen:
        parameters = comfy.utils.calculate_parameters(state_dict)
        wanted = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast_from = None if quantized.has_layer_formats(config) else wanted
    cast = management.unet_manual_cast(cast_from, device, supported)
    if management.is_device_cpu(device):
        wanted, cast = on_cpu(wanted, cast, stored, chosen)
        log.info("PixArt model: computes in %s on this CPU.", str(cast or wanted).removeprefix("torch."))
    takes_device = "device" in inspect.signature(config.set_inference_dtype).parameters
    config.set_inference_dtype(wanted, cast, **({"device": device} if takes_device else {}))


def _patcher_class(disable_dynamic: bool) -> type:
    """Looked up at each call: the host replaces CoreModelPatcher when dynamic VRAM is on."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
