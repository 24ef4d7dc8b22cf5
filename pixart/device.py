"""The device a command asks for."""
from __future__ import annotations

from .errors import UnsupportedError


def check_device(name: str) -> str:
    """The device to use; raises UnsupportedError if this machine lacks it."""
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in has.items() if available)
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UnsupportedError(f"--device is {name!r}; expected auto, cpu, cuda, cuda:1 or mps.") from None
    if not has.get(kind, True):
        raise UnsupportedError(f"--device is {name!r}, but torch finds no {kind} here; use --device cpu.")
    return name
