"""Quantized weights as the host's versions expect them: scaled fp8 files and per-layer formats."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.utils
import torch
from torch import Tensor

try:  # hosts between the two forms have it
    from comfy.model_detection import detect_layer_quantization
except ImportError:
    detect_layer_quantization = None

METADATA_KEY = "_quantization_metadata"


def configure(config: Any, state_dict: dict[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Sets the quantization of a model configuration and returns the state dict in this host's form."""
    metadata = dict(metadata or {})
    if hasattr(comfy.utils, "convert_old_quants"):  # one form for all, marked by `.comfy_quant` keys
        state_dict, _ = comfy.utils.convert_old_quants(state_dict, "", metadata=metadata)
        found = comfy.utils.detect_layer_quantization(state_dict, "")
        if found:
            config.quant_config = found
        return state_dict
    scaled = state_dict.pop("scaled_fp8", None)
    if scaled is not None:
        config.scaled_fp8 = torch.float8_e4m3fn if scaled.dtype == torch.float32 else scaled.dtype
        config.optimizations["fp8"] = scaled.nelement() != 2  # two elements ask for full-precision products
    if METADATA_KEY in metadata and detect_layer_quantization is not None:
        config.layer_quant_config = detect_layer_quantization(metadata)
    return state_dict


def is_quantized(config: Any) -> bool:
    """Whether `configure` found anything: the file's storage dtype then says nothing about computing."""
    return any(vars(config).get(name) for name in ("quant_config", "layer_quant_config", "scaled_fp8"))


def has_layer_formats(config: Any) -> bool:
    """Whether layers carry their own formats; the host then casts without a storage dtype."""
    return any(vars(config).get(name) for name in ("quant_config", "layer_quant_config"))
