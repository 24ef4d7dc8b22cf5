"""Schedules of few steps."""
from __future__ import annotations

import pytest

from pixart.errors import InputError
from pixart.schedules import CURVE, FEWEST, KNOTS, MOST, optimized_timesteps, timesteps_of_curve


@pytest.mark.parametrize("steps", range(FEWEST, MOST + 1))
def test_falls_from_pure_noise(steps: int) -> None:
    found = optimized_timesteps(steps)
    assert len(found) == steps and found[0] == 999 and found[-1] > 0
    assert all(above - below > 1 for above, below in zip(found, found[1:]))


def test_goes_through_the_knots() -> None:
    found = optimized_timesteps(8)
    assert KNOTS[1] == 2 / 8 and found[2] == pytest.approx(CURVE[1])


def test_a_straight_curve_is_the_usual_schedule() -> None:
    straight = [999 * (1 - knot) for knot in KNOTS]
    assert timesteps_of_curve(straight, 5) == pytest.approx([999, 799.2, 599.4, 399.6, 199.8])


@pytest.mark.parametrize("steps", [0, FEWEST - 1, MOST + 1])
def test_other_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"{FEWEST} to {MOST}"):
        optimized_timesteps(steps)
