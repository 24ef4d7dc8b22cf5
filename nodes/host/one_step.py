"""One-step models in the host's custom sampling: a SAMPLER whose start is pure noise of unit variance."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...pixart.logs import get_logger
from ...pixart.sampling_note import read_note
from ...pixart.timesteps import seems_few_step, unit_variance_start

log = get_logger(__name__)


def timestep_sigmas(model: Any, timesteps: Sequence[float]) -> Tensor:
    """SIGMAS of a MODEL at these timesteps, with 0 after the last."""
    sampling = model.get_model_object("model_sampling")
    sigmas = [float(sampling.sigma(torch.tensor(float(timestep)))) for timestep in timesteps]
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)


def one_step_sampler() -> comfy.samplers.KSAMPLER:
    """SAMPLER for `timestep_sigmas(model, [400])`."""
    return comfy.samplers.KSAMPLER(_sample)


@torch.no_grad()
def _sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Any = None, disable: Any = None) -> Tensor:
    """x0 = x - sigma * eps, once. The host has scaled the noise by sigma; the model wants unit variance.

    A latent that isn't empty stays as the host noised it: image-to-image from that timestep.
    """
    guider = model.inner_model
    if getattr(guider, "cfg", 1.0) != 1.0:
        log.warning("PixArt: one-step models were distilled without guidance; set cfg to 1 (it is %g).", guider.cfg)
    if len(sigmas) != 2:
        log.warning("PixArt: the one-step sampler runs only the first of these %d steps.", len(sigmas) - 1)
    if not model.latent_image.any():
        x = unit_variance_start(model.noise, sigmas[0])
    denoised = model(x, sigmas[0] * x.new_ones(x.shape[0]), **(extra_args or {}))
    if callback is not None:
        callback({"x": x, "i": 0, "sigma": sigmas[0], "sigma_hat": sigmas[0], "denoised": denoised})
    return denoised


def many_step_warning(model: Any) -> str | None:
    """What to tell a user whose model doesn't look like a one-step one; LoRA may have made it one."""
    source = getattr(getattr(model.model, "detection", None), "source", None)
    if source is None or model.patches or any(seems_few_step(part) for part in Path(source).parts[-3:]) or read_note(source):
        return None
    return (
        f"PixArt: {Path(source).name} looks like a model for many steps; after one step its picture is blurred. "
        "Use a one-step model (PixArt-Alpha-DMD-XL-2-512x512), or KSampler with 20 steps."
    )
