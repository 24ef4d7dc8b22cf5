"""The network is to predict what it predicted before training: how compressed attention is taught by the uncompressed model.

Distillation of outputs ("Distilling the Knowledge in a Neural Network", Hinton and others, 2015), here of noise and
variance at every timestep. Under guidance both predictions are used, so captions are dropped for both alike.

With `prior_only` it keeps what is not to be forgotten while something new is learnt ("Learning without Forgetting", Li and
Hoiem, 2016): the prior's pictures can't be learnt by heart then, as a few of them are when their noise is the target.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..batch import Batch, Source
from ..diffusion import noise_loss
from ..draws import Draws
from ..recipe import Recipe
from ..teacher import Teacher
from . import denoise

NO_PRIOR = (
    "objective.prior_only is true, but no picture shows what to keep, or all that do were left out. Set source.prior_data to a "
    "folder of such pictures with captions, or the source dreambooth's class_prompt; or set prior_only to false."
)


@dataclass(frozen=True)
class Settings(denoise.Settings):
    """Beside those of `denoise`, whose losses stay as a part."""

    imitate_weight: float = 1.0  # of the squared difference from the teacher
    denoise_weight: float = 0.0  # of the usual losses; above 0 the pictures teach as well
    prior_only: bool = False  # only the source's prior (`prior_data`, class pictures) is imitated; the other pictures teach as usual


class Part(denoise.Part):
    """See `objectives.Objective`."""

    def check_run(self, recipe: Recipe, source: Source) -> None:
        chosen = [recipe.part_at("objective", number).settings for number in range(len(recipe.stages))]
        if not any(settings.prior_only for settings in chosen):
            return
        if not recipe.initialize:
            raise ConfigError("objective.prior_only is true, but there is nothing to keep; set initialize to finished weights.")
        if not getattr(source, "expects_prior", False):
            raise ConfigError(NO_PRIOR)

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        self.teacher = Teacher(network)
        return network

    def losses(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy, noise, timestep = self.noised(settings, batch, draws)
        wanted = self.teacher(noisy, timestep, **conditions).float()
        prediction = model(noisy, timestep, **conditions)
        losses = {"imitate_loss": settings.imitate_weight * self._difference(settings, prediction.float(), wanted, timestep)}
        if settings.prior_only:
            usual = self.compared(settings, prediction, batch.latent, noise, timestep)
            prior = prior_of(batch)
            return {name: torch.where(prior, 0.0, loss) for name, loss in usual.items()} | {
                name: torch.where(prior, loss, 0.0) for name, loss in losses.items()
            }
        if settings.denoise_weight:
            usual = self.compared(settings, prediction, batch.latent, noise, timestep)
            losses |= {name: settings.denoise_weight * loss for name, loss in usual.items()}
        return losses

    def _difference(self, settings: Settings, prediction: Tensor, wanted: Tensor, timestep: Tensor) -> Tensor:
        """(B,): mean squared error of noise and variance, the noise weighted by the timestep as its own loss is."""
        (noise, variance), (wanted_noise, wanted_variance) = prediction.chunk(2, dim=1), wanted.chunk(2, dim=1)
        schedule = self.schedule(prediction.device)
        weighted = noise_loss(schedule, noise, wanted_noise, timestep, settings.max_loss_weight, settings.min_snr)
        return (weighted + (variance - wanted_variance).square().mean(dim=(1, 2, 3))) / 2


def prior_of(batch: Batch) -> Tensor:
    """(B,) bool; raises ConfigError where the source has no prior."""
    if batch.prior is None:
        raise ConfigError(NO_PRIOR)
    return batch.prior


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    denoise.check(settings)
    if settings.prior_only and settings.denoise_weight:
        raise ConfigError(
            f"prior_only is true and denoise_weight is {settings.denoise_weight}; with prior_only the other pictures teach at weight 1. "
            "Leave denoise_weight at 0."
        )
    if not settings.imitate_weight > 0 or not settings.denoise_weight >= 0:
        raise ConfigError(
            f"imitate_weight is {settings.imitate_weight} and denoise_weight {settings.denoise_weight}; expected above 0, and 0 or more."
        )
