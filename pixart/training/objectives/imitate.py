"""The network is to predict what it predicted before training: how compressed attention is taught by the uncompressed model.

Distillation of outputs ("Distilling the Knowledge in a Neural Network", Hinton and others, 2015), here of noise and
variance at every timestep. Under guidance both predictions are used, so captions are dropped for both alike.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ..batch import Batch, Source
from ..draws import Draws
from ..teacher import Teacher
from . import denoise


@dataclass(frozen=True)
class Settings(denoise.Settings):
    """Beside those of `denoise`, whose losses stay as a part."""

    imitate_weight: float = 1.0  # of the squared difference from the teacher
    denoise_weight: float = 0.0  # of the usual losses; above 0 the pictures teach as well


class Part(denoise.Part):
    """See `objectives.Objective`."""

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        self.teacher = Teacher(network)
        return network

    def losses(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy, noise, timestep = self.noised(settings, batch, draws)
        wanted = self.teacher(noisy, timestep, **conditions).float()
        prediction = model(noisy, timestep, **conditions)
        error = (prediction.float() - wanted).square().mean(dim=(1, 2, 3))
        losses = {"imitate_loss": settings.imitate_weight * error}
        if settings.denoise_weight:
            usual = self.compared(settings, prediction, batch.latent, noise, timestep)
            losses |= {name: settings.denoise_weight * loss for name, loss in usual.items()}
        return losses


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    denoise.check(settings)
    if not settings.imitate_weight > 0 or not settings.denoise_weight >= 0:
        raise ConfigError(
            f"imitate_weight is {settings.imitate_weight} and denoise_weight {settings.denoise_weight}; expected above 0, and 0 or more."
        )
