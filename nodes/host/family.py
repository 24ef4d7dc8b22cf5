"""What a MODEL of the host says about captions: this pack's own models, and those of the host's loader."""
from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.supported_models
from torch import Tensor

from ...pixart.checkpoints.detect import TOKENS_OF_FAMILY
from ...pixart.errors import InputError

SIGMA_TOKENS = TOKENS_OF_FAMILY["sigma"]


def max_tokens_of(model: Any) -> int:
    """Tokens the model was trained with; raises InputError for one that is no PixArt."""
    inner = _pixart(model)
    config = getattr(inner.diffusion_model, "config", None)
    if config is not None:
        return config.max_tokens
    family = "sigma" if isinstance(inner.model_config, comfy.supported_models.PixArtSigma) else "alpha"  # Sigma derives from alpha
    return TOKENS_OF_FAMILY[family]


def caption_width_of(model: Any) -> int:
    """Channels of the T5 states that the model reads."""
    return _pixart(model).diffusion_model.y_embedder.y_proj.fc1.in_features


def null_caption_of(model: Any) -> Tensor:
    """The model's embedding of a dropped caption, (tokens, channels) in fp32; raises InputError if the file had none."""
    network = _pixart(model).diffusion_model
    table = getattr(network.y_embedder, "y_embedding", None)
    # The host's own model has a table of random numbers where the file had none
    if table is None or not hasattr(network, "config"):
        raise InputError(
            "This model has no null embedding (y_embedding): files in diffusers format leave it out, and UNETLoader doesn't "
            "say whether it was there. Load the original file with PixArtModelLoader, or choose another convention."
        )
    return table.detach().float().cpu()


def _pixart(model: Any) -> Any:
    inner = getattr(model, "model", None)
    if not isinstance(inner, comfy.model_base.PixArt):
        raise InputError(f"The model is a {type(inner).__name__}; expected a PixArt, from PixArtModelLoader.")
    return inner
