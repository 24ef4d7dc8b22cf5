"""What a run computes its products in: autocast, and for fp16 a scale that keeps small gradients from vanishing."""
from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import autocast as torch_autocast

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Products in the precision, sums and norms in fp32, whatever the weights are.

    Without autocast's cache: it would keep a second copy of all weights until the forward ends, and each is used once.
    """
    return torch_autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=False)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Of the loss; does nothing but in fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
