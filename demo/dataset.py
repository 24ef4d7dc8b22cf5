"""Fresh scenes for every training step: latents from the drawing, captions through the demo's T5."""
from __future__ import annotations

import numpy as np
import torch

from pixart import load_text_encoder
from pixart.config import get_variant
from pixart.training.batch import Batch
from pixart.training.buckets import bucket_sizes, draw_size
from pixart.training.draws import Draws
from pixart.training.recipe import Recipe, Stage
from pixart.training.sources.scenes import Settings

from .autoencoder import latents_from_rgb
from .captions import caption
from .edges import edge_map
from .layout import FEATURE_COUNT, arrange, token_features
from .scenes import Scene, render, sample_scene

LATENT_PIXELS = 8
DRAWN_PIXELS = 4  # each latent cell is the mean of 4x4 soft-edged pixels: 8x8 differ by under 1 %


class SceneSource:
    """Batches of training scenes."""

    feature_count = FEATURE_COUNT

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        self.encoder = load_text_encoder(settings.text_encoder)
        self.bin_base = get_variant(recipe.variant).base_size
        self.null_context = self.encoder.encode([""]).states[0].float()

    def batch(self, settings: Settings, stage: Stage, draws: Draws) -> Batch:
        """Scenes of one size, drawn by chance; the size too."""
        sizes = bucket_sizes(self.bin_base, stage.base_size)
        height, width = draw_size(sizes, draws.shared("size"), settings.square_share)
        rngs = [draws.of_row(row, "scene") for row in draws.rows]
        scenes = [sample_scene(rng) for rng in rngs]
        encoded = self.encoder.encode([caption(scene, rng).text for scene, rng in zip(scenes, rngs)])
        scenes = [arrange(scene, width, height) for scene in scenes]
        latents = np.stack([latent_grid(scene, height, width) for scene in scenes])
        features = np.stack([token_features(scene, width, height) for scene in scenes])
        return Batch(
            latent=torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous(),
            context=encoded.states.float(),
            mask=encoded.mask,
            size=torch.tensor([[height, width]], dtype=torch.float32).expand(len(scenes), 2),
            weight=torch.ones(len(scenes)),
            total=float(stage.batch_size),
            hint=self._hints(scenes, height, width, rngs) if settings.hints else None,
            features=torch.from_numpy(features),
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
