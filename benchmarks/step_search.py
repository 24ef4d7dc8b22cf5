"""Searches the optimised schedule of `pixart.schedules`: `python -m benchmarks step_search`.

As optimised time steps (Xue and others, "Accelerating Diffusion Sampling with Optimized Time Steps", 2024) and Align Your Steps (Sabour
and others, 2024) do, timesteps are moved until few steps end near where many do. Unlike them no bound is minimised but that distance
itself, of the very solver and guidance, since here it can be measured: on mixtures whose denoiser is exact, and on the demo. One curve
serves every number of steps, so that there are six numbers to find and little to fit by chance. Prompts, noise and mixtures are others
than those of `benchmarks steps`.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.step_problems import DemoPictures, Mixture, Problem, Way
from benchmarks.step_ways import BASELINE, sigmas_at, sigmas_of, solver
from pixart.schedules import KNOTS, timesteps_of_curve
from tests.support import host

SEARCHED = (6, 8, 12)  # steps, all by the same curve
SHAPES = ((8, 64, 2.0, 0.1), (16, 64, 2.0, 0.05), (32, 256, 2.0, 0.03), (16, 64, 3.0, 0.05), (32, 64, 3.0, 0.01), (16, 256, 2.5, 0.01))
SEED = 7000
CONVERGED = 100


class Distances:
    """Mean decibels of a curve, of the mixtures and of the demo, each beside what the baseline has."""

    def __init__(self, prompts: int) -> None:
        self.demo = DemoPictures(prompts, SEED)
        self.mixtures = [Mixture(self.demo.model, *shape, count=24, seed=SEED + number) for number, shape in enumerate(SHAPES)]
        self.sampler = solver(BASELINE[0])
        self.converged = {problem.name + str(number): self._latents(problem, sigmas_of(self.demo.model, BASELINE[1], CONVERGED))
                          for number, problem in enumerate(self._problems)}  # fmt: skip
        self.plain = self._all(lambda steps: sigmas_of(self.demo.model, BASELINE[1], steps))

    @property
    def _problems(self) -> list[Problem]:
        return [*self.mixtures, self.demo]

    def gains(self, curve: Sequence[float]) -> tuple[float, float]:
        """Decibels nearer than the baseline at the same number of steps: mean of mixtures, and demo."""
        found = self._all(lambda steps: sigmas_at(self.demo.model, torch.tensor(timesteps_of_curve(curve, steps))))
        gained = np.asarray(found) - np.asarray(self.plain)  # (steps, problems)
        return float(gained[:, :-1].mean()), float(gained[:, -1].mean())

    def _all(self, sigmas: Callable[[int], Tensor]) -> list[list[float]]:
        rows = []
        for steps in SEARCHED:
            levels = sigmas(steps)
            rows.append([self._decibels(problem, number, levels) for number, problem in enumerate(self._problems)])
        return rows

    def _decibels(self, problem: Problem, number: int, sigmas: Tensor) -> float:
        found, converged = self._latents(problem, sigmas), self.converged[problem.name + str(number)]
        error = (found - converged).square().mean(1).clamp_min(1e-12)
        return float((10 * (converged.var(1) / error).log10()).mean())

    def _latents(self, problem: Problem, sigmas: Tensor) -> Tensor:
        found = problem.solve(Way(self.sampler, sigmas))[0] if isinstance(problem, Mixture) else problem.latents_of(Way(self.sampler, sigmas))
        return found.flatten(1)


def search(score: Callable[[Sequence[float]], float], curve: Sequence[float], sweeps: int) -> list[float]:
    """Coordinate search: each knot in turn goes where the score rises; steps grow after success and halve after failure."""
    curve, best, reach = list(curve), score(curve), [30.0] * len(curve)
    for sweep in range(sweeps):
        for knot in range(len(curve)):
            for way in (1, -1):
                moved = [*curve[:knot], curve[knot] + way * reach[knot], *curve[knot + 1 :]]
                ends = [999.0, *moved, 0.0]
                if any(below >= above for above, below in zip(ends, ends[1:])):
                    continue
                value = score(moved)
                if value > best:
                    best, curve, reach[knot] = value, moved, reach[knot] * 1.4
                    break
            else:
                reach[knot] /= 2
        sys.stderr.write(f"sweep {sweep}: {best:+.2f} dB, {[round(each, 1) for each in curve]}\n")
    return curve


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; prints the curve for pixart/schedules.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step_search", description=__doc__)
    parser.add_argument("--prompts", type=int, default=4, help="of the demo, of each kind")
    parser.add_argument("--sweeps", type=int, default=6)
    parser.add_argument("--demo-weight", type=float, default=0.5, help="of the demo beside the mixtures' mean; 0 leaves it out, 1 them")
    chosen = parser.parse_args(arguments)
    host.start_host()
    host.quiet_host()
    distances = Distances(chosen.prompts)

    def score(curve: Sequence[float]) -> float:
        mixed, demo = distances.gains(curve)
        return (1 - chosen.demo_weight) * mixed + chosen.demo_weight * demo

    curve = search(score, [999.0 * (1 - knot) for knot in KNOTS], chosen.sweeps)
    mixed, demo = distances.gains(curve)
    print(json.dumps({"knots": KNOTS, "curve": [round(each, 1) for each in curve], "mixtures_gain": mixed, "demo_gain": demo}))


if __name__ == "__main__":
    main()
