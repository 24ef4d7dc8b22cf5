"""Fresh scenes for every training step: latents from the drawing, captions through the demo's T5."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pixart import load_text_encoder
from pixart.config import get_variant
from pixart.training.batch import Batch
from pixart.training.buckets import bucket_sizes, draw_size
from pixart.training.draws import Draws
from pixart.training.recipe import Recipe, Stage
from pixart.training.sources.scenes import Settings
from pixart.vae import decode_pictures

from ..training.autoencoder import latents_from_rgb
from .captions import caption
from .edges import edge_map
from .layout import FEATURE_COUNT, arrange, token_features
from .scenes import Scene, render, sample_scene

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

LATENT_PIXELS = 8
HELD_OUT = 1_000_000  # a stage that no recipe has: validation draws what no training step drew
DRAWN_PIXELS = 4  # each latent cell is the mean of 4x4 soft-edged pixels: 8x8 differ by under 1 %


class SceneSource:
    """Batches of training scenes."""

    feature_count = FEATURE_COUNT
    settled = True

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        self.settings = settings
        self.variant = get_variant(recipe.variant)
        self.encoder = load_text_encoder(settings.text_encoder)
        self.null_context = self.encoder.encode([""]).states[0].float()

    def report(self) -> list[str]:
        """There is nothing to count: every scene is drawn when it is needed."""
        return ["scenes are drawn anew for every step, and nothing is cached"]

    def check(self) -> None:
        """Nothing can be broken."""

    def prepare(self, prompts: Sequence[str], accelerator: Accelerator) -> None:
        """Nothing is cached: the demo's T5 is so small that it stays."""

    def contents(self) -> list[str]:
        """No pictures are kept."""
        return []

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, M, 128) and mask (B, M) of any prompts."""
        encoded = self.encoder.encode(list(prompts))
        return encoded.states.float(), encoded.mask

    def decode(self, latents: torch.Tensor) -> list[Image]:
        """Pictures of latents (B, 4, H, W)."""
        return decode_pictures(self.settings.vae, self.variant, latents)

    def batch(self, settings: Settings, stage: Stage, draws: Draws) -> Batch:
        """Scenes of one size, drawn by chance; the size too."""
        return self._drawn(settings, stage, draws, "train", stage.batch_size)

    def validation(self, settings: Settings, stage: Stage, rows: range) -> list[Batch]:
        """Held-out combinations, always the same ones, each in a batch of its own."""
        numbers = [row for row in rows if row < settings.validation]
        return [self._drawn(settings, stage, Draws(0, HELD_OUT, row, range(1)), "heldout", 1) for row in numbers]

    def _drawn(self, settings: Settings, stage: Stage, draws: Draws, split: str, total: int) -> Batch:
        sizes = bucket_sizes(self.variant.base_size, stage.base_size)
        height, width = draw_size(sizes, draws.shared("size"), settings.square_share, settings.even_sizes)
        rngs = [draws.of_row(row, "scene") for row in draws.rows]
        scenes = [sample_scene(rng, split) for rng in rngs]
        captions = tuple(caption(scene, rng).text for scene, rng in zip(scenes, rngs))
        context, mask = self.encode(captions)
        scenes = [arrange(scene, width, height) for scene in scenes]
        latents = np.stack([latent_grid(scene, height, width) for scene in scenes])
        features = np.stack([token_features(scene, width, height) for scene in scenes])
        return Batch(
            latent=torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous(),
            context=context,
            mask=mask,
            size=torch.tensor([[height, width]], dtype=torch.float32).expand(len(scenes), 2),
            weight=torch.ones(len(scenes)),
            total=float(total),
            hint=self._hints(scenes, height, width, rngs) if settings.hints else None,
            features=torch.from_numpy(features),
            captions=captions,
        )

    @staticmethod
    def _hints(scenes: list[Scene], height: int, width: int, rngs: list[np.random.Generator]) -> torch.Tensor:
        """Latents (B, 4, height/8, width/8) of the scenes' outlines, in lines of one to three pixels."""
        grids = [edge_grid(scene, height, width, int(rng.integers(1, 4))) for scene, rng in zip(scenes, rngs)]
        return torch.from_numpy(np.stack(grids)).permute(0, 3, 1, 2).contiguous()


def latent_grid(scene: Scene, height: int, width: int) -> np.ndarray:
    """Model latents (height/8, width/8, 4) of a scene; equals the autoencoder's encoder on the picture."""
    rows, columns = height // LATENT_PIXELS, width // LATENT_PIXELS
    picture = render(scene, columns * DRAWN_PIXELS, rows * DRAWN_PIXELS)
    cells = picture.reshape(rows, DRAWN_PIXELS, columns, DRAWN_PIXELS, 3).mean(axis=(1, 3))
    return latents_from_rgb(cells).astype(np.float32)


def edge_grid(scene: Scene, height: int, width: int, line: int) -> np.ndarray:
    """Model latents (height/8, width/8, 4) of the picture of a scene's outlines."""
    rows, columns = height // LATENT_PIXELS, width // LATENT_PIXELS
    edges = edge_map(scene, columns * LATENT_PIXELS, rows * LATENT_PIXELS, line)
    cells = edges.reshape(rows, LATENT_PIXELS, columns, LATENT_PIXELS).mean(axis=(1, 3))
    return latents_from_rgb(np.repeat(cells[..., None], 3, axis=-1)).astype(np.float32)
