"""Small pictures of latents while they are sampled, by one linear map that is fitted to the VAE at hand."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .vae import Vae

SIDE = 32  # latents of the picture the map is fitted to
SPOTS = 8  # colours along its side


class LatentPreview:
    """Colours of latents: an affine map from channels to RGB. weights: (C + 1, 3), the last row the constant."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, latents: Tensor) -> Tensor:
        """Model latents (B, C, h, w) -> pictures (B, 3, h, w) in 0..1, on the CPU."""
        rows = latents.detach().float().cpu().movedim(1, -1)  # (B, h, w, C)
        return (rows @ self.weights[:-1] + self.weights[-1]).clamp(0, 1).movedim(-1, 1)


@torch.no_grad()
def fit_preview(vae: Vae) -> LatentPreview:
    """Least squares between soft spots of random colours and their latents; the same VAE gives the same map.

    A VAE's first-order colours are all that a preview shows, so no table of known VAEs is needed.
    """
    spots = torch.rand(1, 3, SPOTS, SPOTS, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(spots, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    side = SIDE * vae.pixels_per_latent
    picture = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    latents = vae.encode(picture).float().cpu()  # (1, C, SIDE, SIDE)
    known = latents[0].flatten(1).T  # (SIDE^2, C)
    known = torch.cat([known, torch.ones(len(known), 1)], 1)
    return LatentPreview(torch.linalg.lstsq(known, small[0].flatten(1).T).solution)
