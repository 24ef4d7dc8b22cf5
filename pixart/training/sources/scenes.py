"""The demo's scenes, drawn anew for every step; they lie in the repository's demo folder."""
from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """Of drawn scenes."""

    text_encoder: str  # the demo's T5
    square_share: float = 0.0  # of the batches, on top of what the square gets as one bin among the others
    even_sizes: bool = False  # all bins alike; else squarer ones more often
    vae: str = "demo/weights/vae/pixart-demo-vae.safetensors"  # shows what is drawn in training
    validation: int = 0  # held-out scenes
    hints: bool = False  # the latent of each scene's outlines, for a ControlNet


def Part(settings: Settings, recipe: Recipe) -> Any:
    """See `batch.Source`."""
    return import_module("demo.data.dataset").SceneSource(settings, recipe)
