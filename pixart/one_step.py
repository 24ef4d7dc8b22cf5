"""The scheduler of models that were distilled to one step, with the interface of diffusers' schedulers."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

TRAINED_STEPS = 1000


class OneStepScheduler:
    """From noise of unit variance at one timestep straight to the picture, as PixArt-DMD draws (see timesteps.unit_variance_start)."""

    init_noise_sigma = 1.0

    def __init__(self, timestep: int, betas: Mapping[str, Any]) -> None:
        """betas: beta_start, beta_end and a linear beta_schedule, of training."""
        self.config = {"prediction_type": "epsilon", **betas}
        self.timesteps = torch.tensor([timestep])
        table = torch.linspace(betas["beta_start"], betas["beta_end"], TRAINED_STEPS, dtype=torch.float64)
        self.signal = float((1 - table).cumprod(0)[timestep])

    def set_timesteps(self, steps: int, device: torch.device | str | None = None) -> None:
        """Raises InputError for more than one."""
        if steps != 1:
            raise InputError(f"steps is {steps}; this model was distilled to one: draw with steps=1, guidance=1 (--steps 1 --cfg 1).")
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """As they are."""
        return latents

    def step(self, predicted: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The picture that the predicted noise leaves."""
        return ((latents - (1 - self.signal) ** 0.5 * predicted) / self.signal**0.5,)
