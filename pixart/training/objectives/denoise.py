"""The reference's objective: the squared error of the noise, and the variational bound of the variance."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ..average import Average
from ..batch import Batch, Source
from ..diffusion import NoiseSchedule, logit_normal_timesteps, noise_loss, uniform_timesteps, variance_loss
from ..draws import Draws
from ..recipe import Recipe
from . import Turn

LEAST = {"timestep_std": 0, "max_loss_weight": 1, "variance_weight": 0}


@dataclass(frozen=True)
class Settings:
    """The defaults are the reference's: uniform timesteps, and every timestep weighs the same."""

    timesteps: str = "uniform"  # or "logit_normal", which draws 1000 * sigmoid(normal(mean, std)), as Stable Diffusion 3
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    max_loss_weight: float = 1.0  # noise loss is weighted by min(1/alpha_bar, this); 1 is the plain loss
    min_snr: float | None = None  # noise loss is weighted by min(SNR, this) / SNR; 5 is usual
    variance_weight: float = 1.0  # of the variational bound; 0 trains the noise alone, as diffusers' scripts do


class Part:
    """See `objectives.Objective`."""

    def __init__(self, settings: Settings) -> None:
        self._schedule: NoiseSchedule | None = None

    def check_run(self, recipe: Recipe, source: Source) -> None:
        """Pictures are enough."""

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        return network

    def losses(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy, noise, timestep = self.noised(settings, batch, draws)
        return self.compared(settings, model(noisy, timestep, **conditions), batch.latent, noise, timestep)

    def noised(self, settings: Settings, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their noise and timesteps (B,)."""
        device = batch.latent.device
        timestep = draw_timesteps(settings, draws).to(device)
        noise = draws.normal("noise", batch.latent.shape[1:]).to(device)
        return self.schedule(device).add_noise(batch.latent, noise, timestep), noise, timestep

    def compared(self, settings: Settings, prediction: Tensor, latent: Tensor, noise: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """The losses of a prediction (B, 2C, H, W)."""
        schedule, prediction = self.schedule(latent.device), prediction.float()
        predicted, fraction = prediction.chunk(2, dim=1)
        bound = variance_loss(schedule, predicted.detach(), fraction, latent, noise, timestep)
        return {
            "noise_loss": noise_loss(schedule, predicted, noise, timestep, settings.max_loss_weight, settings.min_snr),
            "variance_loss": settings.variance_weight * bound,
        }

    def schedule(self, device: Any) -> NoiseSchedule:
        """Constants of the forward process there."""
        if self._schedule is None or self._schedule.alphas_cumprod.device != device:
            self._schedule = NoiseSchedule(device)
        return self._schedule

    def after_update(self, average: Average) -> None:
        """Nothing follows."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def companions(self) -> dict[str, nn.Module]:
        return {}

    def turns(self, settings: Settings) -> Sequence[Turn]:
        return ()

    def companion_losses(self, turn: Turn, *inputs: Any) -> dict[str, Tensor]:
        raise NotImplementedError(f"no companion {turn.companion}")

    def metadata(self, settings: Settings) -> dict[str, str]:
        return {}


def draw_timesteps(settings: Settings, draws: Draws) -> Tensor:
    """(B,) integers in 0..999."""
    if settings.timesteps == "uniform":
        return uniform_timesteps(draws.uniform("timestep"))
    return logit_normal_timesteps(draws.normal("timestep"), settings.timestep_mean, settings.timestep_std)


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    if settings.timesteps not in ("uniform", "logit_normal"):
        raise ConfigError(f"timesteps is {settings.timesteps!r}; expected 'uniform' or 'logit_normal'.")
    for name, least in LEAST.items():
        if not getattr(settings, name) >= least:  # NaN too
            raise ConfigError(f"{name} is {getattr(settings, name)}; expected {least} or more.")
    if settings.min_snr is not None and not settings.min_snr > 0:
        raise ConfigError(f"min_snr is {settings.min_snr}; expected a number above 0, such as 5, or null.")
