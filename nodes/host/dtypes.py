"""Dtypes that the loaders offer, by the names in their menus, and the one that a model computes in."""
from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch
from comfy.cli_args import args

from ...pixart.cpu import HALF, bf16_instructions

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


def on_cpu(
    wanted: torch.dtype, cast: torch.dtype | None, stored: torch.dtype | None, chosen: bool
) -> tuple[torch.dtype, torch.dtype | None]:
    """Storage and computing dtype where the host, which takes bf16 on a CPU for slow, would compute 16-bit files in fp32.

    chosen: whether the user chose the storage dtype. The host's --fp32-unet and --force-fp32 hold, and fp32 files stay fp32.
    """
    if not bf16_instructions() or args.fp32_unet or args.force_fp32:
        return wanted, cast
    if not chosen and wanted == torch.float32 and stored in HALF:
        return torch.bfloat16, None
    narrow = wanted.itemsize < torch.float32.itemsize
    return wanted, (None if wanted == torch.bfloat16 else torch.bfloat16) if narrow else cast


def control_dtype(wanted: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """What a ControlNet is kept in: as a model stored so."""
    return on_cpu(wanted, None, stored, False)[0] if management.is_device_cpu(management.get_torch_device()) else wanted
