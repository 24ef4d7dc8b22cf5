"""What a network predicts under guidance, for objectives that learn from a guided teacher."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .batch import lengthened
from .draws import Draws

Network = Callable[..., Tensor]


def guided_noise(
    network: Network, noisy: Tensor, timestep: Tensor, conditions: dict[str, Any], null: Tensor | None, guidance: Tensor
) -> Tensor:
    """Predicted noise (B, C, H, W), fp32: uncond + guidance * (cond - uncond).

    null: (M0, C'), the empty caption, which is seen by its own mask, as pictures are drawn. guidance: (B,); 1 is the caption alone,
    and where all are 1 the empty caption is spared. Raises ConfigError where it is needed and the source has none.
    """
    channels = noisy.shape[1]
    if bool((guidance == 1).all()):
        return network(noisy, timestep, **conditions)[:, :channels].float()
    if null is None:
        raise ConfigError("No text encoder was given, which makes the empty caption of guidance; give --text-encoder, or guidance 1.")
    both = {name: torch.cat([value, value]) if isinstance(value, Tensor) else value for name, value in conditions.items()}
    both |= captions_beside(conditions["context"], conditions["context_mask"], null)
    predicted = network(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), **both)[:, :channels].float()
    caption, empty = predicted.chunk(2)
    return empty + guidance.to(caption)[:, None, None, None] * (caption - empty)


def captions_beside(context: Tensor, mask: Tensor, null: Tensor) -> dict[str, Tensor]:
    """Contexts (2B, M, C') and masks of the captions, then of as many empty ones."""
    count, length = len(context), max(context.shape[1], len(null))
    empty = lengthened(null[None].to(context).expand(count, -1, -1), length)
    real = (torch.arange(length, device=mask.device) < len(null)).expand(count, -1)
    return {"context": torch.cat([lengthened(context, length), empty]), "context_mask": torch.cat([lengthened(mask.bool(), length), real])}


def draw_guidance(guidance: float | tuple[float, float], draws: Draws) -> Tensor:
    """(B,), each picture's own."""
    least, most = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    return (least + (most - least) * draws.uniform("guidance")).float()


def check_guidance(guidance: float | tuple[float, float]) -> None:
    """Raises ConfigError for guidance by which a student would learn to ignore captions, or nothing."""
    least, most = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    if not 1 <= least <= most < 1e3:
        shown = list(guidance) if isinstance(guidance, tuple) else guidance
        raise ConfigError(
            f"guidance is {shown}; expected a cfg of 1 or more, or [least, most]. 1 is the teacher without guidance, 0 would leave the "
            "caption out; 4.5 is what PixArt is drawn with."
        )
