"""Fresh scenes for every training step: latents from the drawing, captions through the demo's T5."""
from __future__ import annotations

import numpy as np
import torch

from pixart import load_text_encoder
from pixart.training.data import Batch
from pixart.training.recipe import Recipe

from .autoencoder import latents_from_rgb
from .captions import caption
from .edges import edge_map
from .layout import FEATURE_COUNT, arrange, token_features
from .scenes import Scene, render, sample_scene

LATENT_PIXELS = 8
DRAWN_PIXELS = 4  # each latent cell is the mean of 4x4 soft-edged pixels: 8x8 differ by under 1 %


class SceneSource:
    """Batches of training scenes. Captions are dropped to the empty prompt, as guidance will ask for it."""

    def __init__(self, recipe: Recipe) -> None:
        self.encoder = load_text_encoder(recipe.text_encoder)
        self.dropout = recipe.caption_dropout
        self.feature_count = FEATURE_COUNT
        self.with_hints = recipe.control_blocks > 0

    def batch(self, size: tuple[int, int], count: int, rng: np.random.Generator) -> Batch:
        """`count` scenes drawn at (height, width) pixels."""
        scenes = [sample_scene(rng) for _ in range(count)]
        texts = ["" if rng.random() < self.dropout else caption(scene, rng).text for scene in scenes]
        encoded = self.encoder.encode(texts)
        scenes = [arrange(scene, size[1], size[0]) for scene in scenes]
        latents = np.stack([latent_grid(scene, *size) for scene in scenes])
        features = np.stack([token_features(scene, size[1], size[0]) for scene in scenes])
        return Batch(
            latent=torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous(),
            context=encoded.states.float(),
            mask=encoded.mask,
            size=torch.tensor([size], dtype=torch.float32).expand(count, 2),
            features=torch.from_numpy(features),
            hint=self._hints(scenes, *size, rng) if self.with_hints else None,
        )

    def _hints(self, scenes: list[Scene], height: int, width: int, rng: np.random.Generator) -> torch.Tensor:
        """Latents (B, 4, height/8, width/8) of the scenes' outlines, in lines of one to three pixels."""
        grids = [edge_grid(scene, height, width, int(rng.integers(1, 4))) for scene in scenes]
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
