"""Samplers by name: what each was made for, its own settings, and the scheduler that runs it."""
from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import InputError
from .logs import get_logger
from .sampling import BETAS, clean_estimate, from_diffusers
from .sampling_note import DMD, SamplingNote
from .timesteps import DMD_TIMESTEP, LAST_TIMESTEP

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sampler:
    """A way from noise to a picture. steps and guidance: what it is made for; most_steps: what it can do at all."""

    name: ClassVar[str]
    title: ClassVar[str]
    steps: ClassVar[int]
    guidance: ClassVar[float]
    most_steps: ClassVar[int] = LAST_TIMESTEP + 1

    def scheduler(self) -> Any:
        """A fresh scheduler, as `denoise` takes it; raises UnsupportedError without diffusers."""
        raise NotImplementedError

    def check(self, steps: int, guidance: float) -> None:
        """Raises InputError for more steps than it can do; warns of guidance where the model was distilled without."""
        if steps > self.most_steps:
            expected = "1 step" if self.most_steps == 1 else f"1 to {self.most_steps} steps, usually {self.steps}"
            raise InputError(f"The sampler {self.name} was given {steps} steps; expected {expected}.")
        if self.guidance <= 1 < guidance:
            logger.warning(
                "Models for the sampler %s were distilled without guidance; give guidance=1 (it is %g), or the picture comes out burnt.",
                self.name, guidance,
            )  # fmt: skip


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++ 2M (arXiv:2211.01095), that of the released pipelines."""

    name: ClassVar[str] = "dpm++"
    title: ClassVar[str] = "DPM-Solver++"
    steps: ClassVar[int] = 20
    guidance: ClassVar[float] = 4.5

    def scheduler(self) -> Any:
        """Multistep, of order 2."""
        return from_diffusers("DPMSolverMultistepScheduler")


@dataclass(frozen=True)
class SASolver(Sampler):
    """SA-Solver (arXiv:2309.05019): stochastic, of PixArt's first demo. Raises InputError.

    eta: strength of the noise that is put back, between the timesteps `first` and `last` alone; 0 adds none.
    """

    name: ClassVar[str] = "sa-solver"
    title: ClassVar[str] = "SA-Solver"
    steps: ClassVar[int] = 25
    guidance: ClassVar[float] = 3.0

    predictor_order: int = 2
    corrector_order: int = 2
    eta: float = 1.0
    first: int = 800
    last: int = 200

    def __post_init__(self) -> None:
        for name, least in (("predictor_order", 1), ("corrector_order", 0)):
            order = getattr(self, name)
            if not isinstance(order, int) or not least <= order <= 4:
                raise InputError(f"{name} is {order!r}; expected a whole number, {least} to 4, usually 2.")
        if not 0 <= self.eta <= 2:
            raise InputError(f"eta is {self.eta!r}; expected 0 (no noise) to 2, usually 1.")
        if not 0 <= self.last <= self.first <= LAST_TIMESTEP:
            raise InputError(f"first is {self.first!r} and last {self.last!r}; expected timesteps, {LAST_TIMESTEP} >= first >= last >= 0.")

    def scheduler(self) -> Any:
        """Predictor and corrector on the predicted picture."""
        return from_diffusers(
            "SASolverScheduler",
            algorithm_type="data_prediction",
            predictor_order=self.predictor_order,
            corrector_order=self.corrector_order,
            tau_func=lambda timestep: self.eta if self.last <= timestep <= self.first else 0.0,
        )


@dataclass(frozen=True)
class LCM(Sampler):
    """Multistep consistency sampling (arXiv:2310.04378), for models and LoRAs that were distilled so."""

    name: ClassVar[str] = "lcm"
    title: ClassVar[str] = "LCM"
    steps: ClassVar[int] = 4
    guidance: ClassVar[float] = 1.0
    most_steps: ClassVar[int] = 50  # timesteps of the distillation: every 20th

    def scheduler(self) -> Any:
        """At 4 steps 999, 759, 499, 259."""
        return from_diffusers("LCMScheduler", original_inference_steps=self.most_steps)


@dataclass(frozen=True)
class OneStep(Sampler):
    """PixArt-DMD's one step (arXiv:2311.18828) from pure noise of unit variance. Raises InputError."""

    name: ClassVar[str] = "one-step"
    title: ClassVar[str] = "One step (DMD)"
    steps: ClassVar[int] = 1
    guidance: ClassVar[float] = 1.0
    most_steps: ClassVar[int] = 1

    timestep: int = DMD_TIMESTEP

    def __post_init__(self) -> None:
        if not isinstance(self.timestep, int) or not 1 <= self.timestep <= LAST_TIMESTEP:
            raise InputError(f"timestep is {self.timestep!r}; expected 1 to {LAST_TIMESTEP}: {DMD_TIMESTEP} for PixArt-DMD.")

    def scheduler(self) -> Any:
        """Our own: diffusers has none that begins with unit noise at a timestep within."""
        return OneStepScheduler(self.timestep)


class OneStepScheduler:
    """What `denoise` asks of diffusers' schedulers, for one step: x0 from unit noise at `timestep`."""

    init_noise_sigma = 1.0

    def __init__(self, timestep: int) -> None:
        self.timestep = timestep
        self.timesteps = torch.tensor([timestep])
        self.config = {**BETAS, "prediction_type": "epsilon"}

    def set_timesteps(self, steps: int, device: torch.device | str | None = None) -> None:
        """One step alone; `Sampler.check` has refused others."""
        self.timesteps = torch.tensor([self.timestep], device=device)

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The model sees the noise as it is."""
        return latents

    def step(self, predicted: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False) -> tuple[Tensor] | SimpleNamespace:
        """The picture's latents that the noise stands for."""
        found = clean_estimate(latents, predicted, self.timestep)
        return SimpleNamespace(prev_sample=found) if return_dict else (found,)


SAMPLERS: dict[str, type[Sampler]] = {kind.name: kind for kind in (DPMSolver, SASolver, LCM, OneStep)}


def find_sampler(given: Sampler | str, note: SamplingNote | None = None) -> Sampler:
    """A sampler by its name, or one with settings of its own; raises InputError.

    note: of the loaded weights. The sampler that they were distilled for has their settings, others the usual ones.
    """
    if isinstance(given, Sampler):
        return given
    if note is not None and given == sampler_for(note).name:
        return sampler_for(note)
    if given in SAMPLERS:
        return SAMPLERS[given]()
    raise InputError(f"sampler is {given!r}; expected {', '.join(SAMPLERS)}, or one of pixart.samplers with settings of its own.")


def sampler_for(note: SamplingNote | None) -> Sampler:
    """The sampler of a model whose file says how it was distilled; DPM-Solver++ for others."""
    if note is None:
        return DPMSolver()
    return OneStep(note.timestep) if note.method == DMD else LCM()
