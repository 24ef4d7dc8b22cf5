"""Dtypes that the loaders offer, by the names in their menus."""
from __future__ import annotations

import torch

DEFAULT = "default"  # as stored, or as the host prefers
DTYPES: dict[str, torch.dtype | None] = {
    DEFAULT: None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
