"""Features on disk, each in a safetensors file named by all that it depends on; so it can be shared by runs and never be stale."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import DataError
from ..write import replace_file

STATES, MEAN, STD = "states", "mean", "std"


class Cache:
    """A folder of features by kind ("text", "latent", "hint") and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        """Where a feature is or would be."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether it is there."""
        return self.path(kind, key).is_file()

    def save(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors, in half the bytes where that holds them; raises OSError where it can't be written."""
        stored = {name: _smaller(value).cpu().contiguous() for name, value in tensors.items()}
        replace_file(self.path(kind, key), lambda partial: save_file(stored, partial))

    def load(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors, fp32; raises DataError for a file that is gone or damaged."""
        path = self.path(kind, key)
        try:
            return {name: value.float() for name, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"The feature {path} can't be read ({error}). Remove it and start again to recompute it.") from None


def _smaller(value: Tensor) -> Tensor:
    """As fp16, unless it is of 16 bits already or too large."""
    if value.dtype in (torch.bfloat16, torch.float16):
        return value
    half = value.half()
    return half if half.isfinite().all() else value.float()
