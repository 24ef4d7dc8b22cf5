"""Sizes of batches: every bin of a base size, scaled to the stage's and rounded to whole tokens."""
from __future__ import annotations

import numpy as np

from ..bins import bin_table

TOKEN_PIXELS = 16


def bucket_sizes(bin_base: int, base_size: int) -> list[tuple[int, int]]:
    """(height, width) of every bin of `bin_base`, scaled to `base_size` and rounded to whole tokens."""
    scale = base_size / bin_base

    def side(pixels: int) -> int:
        return max(TOKEN_PIXELS, round(pixels * scale / TOKEN_PIXELS) * TOKEN_PIXELS)

    return sorted({(side(height), side(width)) for height, width in bin_table(bin_base).values()})


def draw_size(sizes: list[tuple[int, int]], rng: np.random.Generator, square_share: float = 0.0) -> tuple[int, int]:
    """One of the sizes; squarer ones more often (in proportion to short side / long side, and squares by `square_share`)."""
    weights = np.array([min(size) / max(size) for size in sizes])
    squares = weights == 1
    weights *= (1 - square_share) / weights.sum()
    weights[squares] += square_share / max(1, squares.sum())
    return sizes[int(rng.choice(len(sizes), p=weights / weights.sum()))]
