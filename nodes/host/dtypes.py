"""Dtypes that the loaders offer, by the names in their menus, and the one that a model computes in."""
from __future__ import annotations

from typing import Any

import torch

DEFAULT = "default"  # as stored, or as the host prefers
DTYPES: dict[str, torch.dtype | None] = {
    DEFAULT: None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


def computing_dtype(model: Any) -> torch.dtype:
    """Of the host's model: what its weights are cast to at use, if anything."""
    return getattr(model, "manual_cast_dtype", None) or model.get_dtype()
