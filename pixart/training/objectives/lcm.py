"""Consistency distillation of a guided teacher: the student's jump from x_t to the picture is to be that from one DDIM step on.

Latent Consistency Models (Luo and others, 2023), as PixArt-delta trains them (train_scripts/train_pixart_lcm.py): one DDIM step of
the teacher on 50 timesteps, its guidance folded into the student, which is then sampled in a few steps with cfg 1. Nothing but
latents and captions is needed.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...sampling_note import LCM, note_metadata
from ..average import Average
from ..batch import Batch, Source
from ..diffusion import STEPS, NoiseSchedule
from ..draws import Draws
from ..guided import check_guidance, draw_guidance, guided_noise
from ..teachers import make_teacher, networks_of
from ..trained import trained_parameters, twin
from . import denoise

LOSSES = ("pseudo_huber", "l2")
NEEDS_TEACHER = True  # random first weights have nothing to teach
WHOLE_RUN = ("teacher",)  # no stage has another


@dataclass(frozen=True)
class Settings:
    """The defaults are the reference's."""

    guidance: float | tuple[float, float] = 5.5  # cfg of the result, or [least, most], drawn for each picture; see `check`
    loss: str = "pseudo_huber"  # or "l2"
    huber_c: float = 0.001  # below which pseudo-Huber is quadratic
    solver_steps: int = 50  # timesteps of the teacher's solver, evenly spaced up to 999
    target_decay: float = 0.95  # of the average that is the target; 0 takes the student itself
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0
    teacher: str | None = None  # weights to learn from; null is what the run begins with


class Part(denoise.Part):
    """See `objectives.Objective`. In memory beside the network: what it trains twice more, for teacher and target.

    A whole model of 0.6 billion weights takes 2.4 GB for each; of a LoRA both share the frozen weights.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._schedule: NoiseSchedule | None = None

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        self.teacher = make_teacher(network, self.settings.teacher, "lcm")
        self.network, self.target, self.source = network, twin(network), source
        return network

    def losses(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        self.settings = settings  # of the stage
        device, latent = batch.latent.device, batch.latent.float()
        start, end = solver_interval(settings.solver_steps, draws.uniform("timestep").to(device))
        noise = draws.normal("noise", latent.shape[1:]).to(device)
        guidance = draw_guidance(settings.guidance, draws).to(device)
        schedule = self.schedule(device)
        noisy = schedule.add_noise(latent, noise, start)
        with torch.no_grad():
            found = guided_noise(self.teacher, noisy, start, conditions, self.source.null_context, guidance)
            earlier = schedule.add_noise(schedule.predicted_latent(noisy, found, start), found, end)  # DDIM, eta 0
            wanted = self._picture(settings, self.target, earlier, end, conditions)
        difference = self._picture(settings, model, noisy, start, conditions) - wanted
        return {"consistency_loss": distance(settings, difference)}

    def _picture(self, settings: Settings, model: nn.Module, noisy: Tensor, timestep: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The consistency function: the picture at the end of the path through x_t, and x_t itself at t = 0."""
        predicted = model(noisy, timestep, **conditions)[:, : noisy.shape[1]].float()
        skip, out = boundary(settings, timestep)
        return skip * noisy + out * self.schedule(noisy.device).predicted_latent(noisy, predicted, timestep)

    @torch.no_grad()
    def after_update(self, average: Average) -> None:
        targets = list(self._targets().values())
        torch._foreach_lerp_(targets, list(trained_parameters(self.network).values()), 1 - self.settings.target_decay)

    def state(self) -> dict[str, Tensor]:
        return {f"target.{name}": value for name, value in self._targets().items()}

    def _targets(self) -> dict[str, Tensor]:
        own = dict(self.target.named_parameters())
        return {name: own[name] for name in trained_parameters(self.network)}

    def companions(self) -> Mapping[str, nn.Module]:
        return {**networks_of(self.teacher), "target": self.target}

    def metadata(self, settings: Settings) -> dict[str, str]:
        return note_metadata(LCM)


def solver_interval(steps: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) from and to which a step of the solver leads: 19, 39 ... 999 with 50, and 20 below, 0 at least."""
    skip = STEPS // steps
    start = ((uniform * steps).long().clamp(0, steps - 1) + 1) * skip - 1
    return start, (start - skip).clamp(min=0)


def boundary(settings: Settings, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1), which make the student the identity at t = 0 (Luo and others, section 4.1)."""
    scaled, data = timestep.float() * settings.timestep_scaling, settings.sigma_data
    scaled = scaled[:, None, None, None]
    return data**2 / (scaled**2 + data**2), scaled / (scaled**2 + data**2).sqrt()


def distance(settings: Settings, difference: Tensor) -> Tensor:
    """(B,): the mean of pseudo-Huber, sqrt(d^2 + c^2) - c, or of squares."""
    square = difference.square()
    if settings.loss == "pseudo_huber":
        square = (square + settings.huber_c**2).sqrt() - settings.huber_c
    return square.mean(dim=(1, 2, 3))


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have.

    guidance is cfg as everywhere here, uncond + cfg * (cond - uncond). The reference writes cond + w * (cond - uncond): its w = 4.5 is
    cfg 5.5.
    """
    check_guidance(settings.guidance)
    if settings.loss not in LOSSES:
        raise ConfigError(f"loss is {settings.loss!r}; expected one of {', '.join(LOSSES)}.")
    if not 1 <= settings.solver_steps <= STEPS or STEPS % settings.solver_steps:
        raise ConfigError(f"solver_steps is {settings.solver_steps}; expected a number that divides {STEPS}, such as 50.")
    if not 0 <= settings.target_decay < 1:
        raise ConfigError(f"target_decay is {settings.target_decay}; expected 0 to below 1.")
    for name in ("huber_c", "sigma_data", "timestep_scaling"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"{name} is {getattr(settings, name)}; expected a number above 0.")
