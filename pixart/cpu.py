"""What a CPU computes fastest in: bf16 where it has instructions for it, else fp32."""
from __future__ import annotations

from functools import cache

import torch

AMX = "amx_bf16"
X86 = (AMX, "avx512_bf16")
# Names of torch.cpu.get_capabilities: x86 (Zen 4, Cooper Lake; Sapphire Rapids' AMX), then Arm
BF16_INSTRUCTIONS = (*X86, "sve_bf16", "bf16")
HALF = (torch.float16, torch.bfloat16)


@cache
def bf16_instructions() -> str:
    """Which of BF16_INSTRUCTIONS this CPU has; "" without any, where bf16 is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return next((name for name in BF16_INSTRUCTIONS if found.get(name)), "")
    # Before torch 2.11 (no names for Arm)
    older = {AMX: "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return next((name for name, question in older.items() if getattr(torch.cpu, question, bool)()), "")


def fastest_dtype(stored: torch.dtype) -> torch.dtype:
    """Of a transformer on a CPU when nobody chose one: bf16 for 16-bit weights where that is fast.

    On others fp16 is widened to fp32 and bf16 stays, as does everything else. fp32 files are never narrowed.
    """
    if stored in HALF and bf16_instructions():
        return torch.bfloat16
    return torch.float32 if stored == torch.float16 else stored
