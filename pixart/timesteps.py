"""Timesteps that few-step models were trained at, and lists of them written by users."""
from __future__ import annotations

import re

import torch
from torch import Tensor

from .errors import InputError

LAST_TIMESTEP = 999
DMD_TIMESTEP = 400  # where PixArt-DMD begins and ends (PixArt-Sigma, supplementary: the start timestep of its student)
FEW_STEP_NAMES = r"dmd|lcm|flash|turbo|hyper|lightning|schnell|distill|one[-_ ]?step|(?<!\d)\d{1,2}[-_ ]?steps?(?![a-z])"


def parse_timesteps(text: str) -> list[int]:
    """Whole timesteps, falling, from "999, 759, 499, 259"; raises InputError naming what is wrong."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    wrong = [word for word in words if not re.fullmatch(r"\d+", word) or int(word) > LAST_TIMESTEP]
    if not words or wrong:
        found = f"{', '.join(map(repr, wrong))} in {text!r}" if wrong else "none"
        raise InputError(f"Timesteps: found {found}; expected whole numbers 0 to {LAST_TIMESTEP}, as in 999, 759, 499, 259.")
    steps = [int(word) for word in words]
    rising = [f"{b} after {a}" for a, b in zip(steps, steps[1:]) if b >= a]
    if rising:
        raise InputError(f"Timesteps must fall from noise to picture; found {', '.join(rising)} in {text!r}.")
    return steps


def unit_variance_start(noise: Tensor, sigma: Tensor | float) -> Tensor:
    """What a one-step model begins with: unit noise in its own scale, for samplers that count x = x0 + sigma * noise.

    PixArt-DMD sees pure noise at every timestep, so its input has variance 1 where a noised picture
    would have it too. Samplers divide x by sqrt(1 + sigma^2) for the model; this is the inverse.
    """
    return noise * (1 + torch.as_tensor(sigma, dtype=noise.dtype, device=noise.device) ** 2).sqrt()


def seems_few_step(name: str) -> bool:
    """Whether a file's name says that its model was distilled to few steps; the weights can't."""
    return re.search(FEW_STEP_NAMES, name.lower()) is not None
