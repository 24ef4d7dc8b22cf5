"""Empty latents as the host's own EmptyLatentImage makes them."""
from __future__ import annotations

import comfy.model_management as management
import torch

from ...pixart.model import PIXELS_PER_LATENT

CHANNELS = 4  # SD1 and SDXL VAEs


def empty_latent(width: int, height: int, batch_size: int) -> dict[str, torch.Tensor | int]:
    """LATENT of zeros, (batch, 4, height/8, width/8)."""
    dtype = management.intermediate_dtype() if hasattr(management, "intermediate_dtype") else torch.float32
    samples = torch.zeros(
        batch_size, CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT,
        device=management.intermediate_device(), dtype=dtype,
    )  # fmt: skip
    # The last key lets newer hosts fit the latent to a model with another VAE; older ones don't read it.
    return {"samples": samples, "downscale_ratio_spacial": PIXELS_PER_LATENT}
