"""Sizes of batches: every bin of a base size, scaled to the stage's and rounded to whole tokens."""
from __future__ import annotations

from functools import cache

import numpy as np

from ..bins import base_sizes, bin_table

TOKEN_PIXELS = 16


def bucket_sizes(bin_base: int, base_size: int) -> list[tuple[int, int]]:
    """(height, width) of every bin of `bin_base`, scaled to `base_size` and rounded to whole tokens."""
    return sorted({_scaled(size, base_size / bin_base) for size in bin_table(bin_base).values()})


def draw_size(
    sizes: list[tuple[int, int]], rng: np.random.Generator, square_share: float = 0.0, even: bool = False
) -> tuple[int, int]:
    """One of the sizes; squarer ones more often (in proportion to short side / long side) or all alike, and squares by `square_share`."""
    weights = np.array([1.0 if even else min(size) / max(size) for size in sizes])
    squares = np.array([height == width for height, width in sizes])
    weights *= (1 - square_share) / weights.sum()
    weights[squares] += square_share / max(1, squares.sum())
    return sizes[int(rng.choice(len(sizes), p=weights / weights.sum()))]


@cache
def bins_at(bin_base: int, base_size: int, squares: bool = False) -> dict[str, tuple[int, int]]:
    """Ratio label -> (height, width): the bins published for a base size, else those of `bin_base` scaled to it; or its square."""
    if squares:
        side = max(TOKEN_PIXELS, round(base_size / TOKEN_PIXELS) * TOKEN_PIXELS)
        return {"1.0": (side, side)}
    if base_size in base_sizes():
        return bin_table(base_size)
    return {label: _scaled(size, base_size / bin_base) for label, size in bin_table(bin_base).items()}


def nearest_bins(heights: np.ndarray, widths: np.ndarray, bins: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """The bin of each picture: that whose label is nearest to height / width, the first of equals, as in the reference."""
    labels, sizes = np.array([float(label) for label in bins]), list(bins.values())
    ratios = heights / widths
    return [sizes[index] for start in range(0, len(ratios), 65536) for index in _nearest(ratios[start : start + 65536], labels)]


def _nearest(ratios: np.ndarray, labels: np.ndarray) -> list[int]:
    return np.abs(labels[None] - ratios[:, None]).argmin(axis=1).tolist()


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """In whole tokens."""
    height, width = (max(TOKEN_PIXELS, round(side * scale / TOKEN_PIXELS) * TOKEN_PIXELS) for side in size)
    return height, width
