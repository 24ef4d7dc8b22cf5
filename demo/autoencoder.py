"""The demo's autoencoder in TAESD layout: an encoder built by hand and a trained decoder.

The encoder is exact: it takes the mean colour of every 8x8 block and maps it by a fixed affine map to
four latent channels of mean 0 and variance 1 over random scenes. So training needs no encoder at all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

VAE_SCALE = 0.13025
WEIGHTS = Path(__file__).parent / "weights" / "pixart-demo-vae.safetensors"
# Partly whitened colour statistics of 6,000 scenes, seen along the four axes of a tetrahedron: rows of
# equal weight, |latent| <= 2.5 on scenes and <= 3.2 on any colour, before the decoder's tanh(x / 3) * 3.
LATENT_MATRIX: tuple[tuple[float, float, float], ...] = (
    (-1.741, 3.031, 1.405),
    (3.931, -1.703, -0.753),
    (-1.501, 1.719, -2.726),
    (-0.403, -3.386, 2.176),
)
LATENT_BIAS: tuple[float, float, float, float] = (-1.243, -0.761, 1.155, 0.825)


def latents_from_rgb(mean_rgb: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Map block means (..., 3) in [0, 1] to model latents (..., 4), channels last, numpy or torch."""
    if isinstance(mean_rgb, Tensor):
        matrix, bias = mean_rgb.new_tensor(LATENT_MATRIX), mean_rgb.new_tensor(LATENT_BIAS)
    else:
        matrix, bias = np.asarray(LATENT_MATRIX, mean_rgb.dtype), np.asarray(LATENT_BIAS, mean_rgb.dtype)
    return mean_rgb @ matrix.T + bias


def rgb_from_latents(latents: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Least-squares inverse of latents_from_rgb: (..., 4) to (..., 3), for quick previews."""
    inverse = np.linalg.pinv(np.asarray(LATENT_MATRIX))
    if isinstance(latents, Tensor):
        return (latents - latents.new_tensor(LATENT_BIAS)) @ latents.new_tensor(inverse).T
    return (latents - np.asarray(LATENT_BIAS, latents.dtype)) @ inverse.T.astype(latents.dtype)
