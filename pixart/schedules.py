"""Which timesteps few steps go through: PixArt's own schedule, and one that was searched for few steps.

The searched one was found by `python -m benchmarks step_search` for DPM-Solver++ 2M under PixArt's noise, with guidance 4.5, and is
measured by `python -m benchmarks steps`: on exact problems it ends nearer to what many steps end at, on the demo from 12 steps on.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import InputError
from .timesteps import LAST_TIMESTEP

FEWEST, MOST = 4, 16  # steps that the search was made and checked for
KNOTS = (0.125, 0.25, 0.5, 0.625, 0.75, 0.875)  # shares of the steps done
CURVE = (859.0, 734.0, 496.0, 371.0, 199.0, 38.0)  # timesteps there; 999 before, 0 after


USUAL, OPTIMIZED = SCHEDULES = ("usual", "optimized")


def timesteps_of(schedule: str, steps: int) -> list[int] | None:
    """Whole timesteps of a schedule by name; None for the usual one, which a scheduler knows itself. Raises InputError."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule is {schedule!r}; expected {' or '.join(SCHEDULES)}.")
    return [round(each) for each in optimized_timesteps(steps)] if schedule == OPTIMIZED else None


def optimized_timesteps(steps: int) -> list[float]:
    """Falling timesteps, 999 first; the last step ends at the picture. Raises InputError outside of 4 to 16 steps."""
    if not FEWEST <= steps <= MOST:
        raise InputError(f"steps is {steps}; the optimized schedule is made for {FEWEST} to {MOST}. Take the usual one for more.")
    return timesteps_of_curve(CURVE, steps)


def timesteps_of_curve(curve: Sequence[float], steps: int) -> list[float]:
    """Timesteps at equal shares of the way along a line that is given at KNOTS."""
    return np.interp(np.arange(steps) / steps, [0.0, *KNOTS, 1.0], [LAST_TIMESTEP, *curve, 0.0]).tolist()
