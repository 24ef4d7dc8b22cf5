"""Small random PixArt transformers as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixart.config import get_variant
from pixart.model import PixArtTransformer


def random_weights(depth: int = 2, seed: int = 0, **changes: object) -> dict[str, torch.Tensor]:
    """Native state dict of the demo's architecture with other sizes; every tensor random, so that no path is dead."""
    config = replace(get_variant("demo").transformer, depth=depth, **changes)
    model = PixArtTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in model.state_dict().items()}


def save_random(path: Path, depth: int = 2, seed: int = 0, **changes: object) -> Path:
    """Write `random_weights` as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(depth, seed, **changes), path)
    return path
