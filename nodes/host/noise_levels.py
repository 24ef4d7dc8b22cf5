"""A word on runs that begin with too little noise: schedulers made for Stable Diffusion stop at a tenth of PixArt's."""
from __future__ import annotations

from typing import Any

import comfy.patcher_extension
from torch import Tensor

from ...pixart.logs import get_logger

log = get_logger(__name__)
KEY = "pixart_noise_levels"
FAR = 4.0  # factor below the model's highest noise level; at Stable Diffusion's 14.6 pictures are grey or washed out


def watch_noise_levels(patcher: Any) -> None:
    """Has each run of this model checked once, before its first step."""
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, KEY, _check)


def _check(
    executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, latent_image: Tensor | None = None,
    *others: Any, **named: Any,
) -> Tensor:  # fmt: skip
    """Warns, and samples. The arguments are those of the host's Sampler.sample."""
    highest = float(guider.inner_model.model_sampling.sigma_max)
    text = noise_warning(sigmas, latent_image, highest)
    if text:
        log.warning("PixArt: %s", text)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, *others, **named)


def noise_warning(sigmas: Tensor, latent: Tensor | None, highest: float) -> str | None:
    """What to tell the user, if anything; highest: the model's own noise level at the start.

    A latent that holds something (img2img, inpainting, a second pass or stage) may begin anywhere, and so may one-step models.
    """
    if len(sigmas) <= 2 or (latent is not None and bool(latent.any())):
        return None
    first = float(sigmas[0])
    if first * FAR >= highest:
        return None
    return (
        f"this run starts from an empty latent at noise level {first:.4g}, but the model's noise begins at {highest:.4g}: expect grey "
        f"or washed-out pictures. Set sigma_max of KarrasScheduler, ExponentialScheduler and the like to {highest:.4g}, or denoise to "
        "1; AlignYourSteps, GITS and OptimalSteps are made for other models: use BasicScheduler."
    )
