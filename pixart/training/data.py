"""What a training loop eats: batches of one size each, drawn from buckets."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from torch import Tensor

from ..bins import bin_table
from ..errors import ConfigError
from .recipe import Recipe

SOURCES = {"scenes": "demo.dataset:SceneSource"}  # the one table; a recipe can only name what stands here
TOKEN_PIXELS = 16


@dataclass(frozen=True)
class Batch:
    """latent: (B, C, H, W), in the model's space; context: (B, M, C'); mask: (B, M); size: (B, 2) pixels.

    features: (B, N, F), what is known of every token's picture, for sources with `feature_count` F.
    hint: (B, C, H, W), the edge map's latent, for recipes with `control_blocks`.
    """

    latent: Tensor
    context: Tensor
    mask: Tensor
    size: Tensor
    features: Tensor | None = None
    hint: Tensor | None = None


class Source(Protocol):
    """Endless batches for one process; `size` is (height, width) in pixels."""

    feature_count: int

    def batch(self, size: tuple[int, int], count: int, rng: np.random.Generator) -> Batch: ...


def make_source(recipe: Recipe) -> Source:
    """The recipe's data source."""
    if recipe.source not in SOURCES:
        raise ConfigError(f"Unknown data source {recipe.source!r}; expected one of {sorted(SOURCES)}.")
    module, name = SOURCES[recipe.source].split(":")
    return getattr(import_module(module), name)(recipe)


def bucket_sizes(bin_base: int, base_size: int) -> list[tuple[int, int]]:
    """(height, width) of every bin of `bin_base`, scaled to `base_size` and rounded to whole tokens."""
    scale = base_size / bin_base

    def side(pixels: int) -> int:
        return max(TOKEN_PIXELS, round(pixels * scale / TOKEN_PIXELS) * TOKEN_PIXELS)

    return sorted({(side(height), side(width)) for height, width in bin_table(bin_base).values()})


def draw_buckets(
    sizes: list[tuple[int, int]], rng: np.random.Generator, square_share: float = 0.0
) -> Iterator[tuple[int, int]]:
    """Endless sizes; squarer ones more often (in proportion to short side / long side, and squares by `square_share`)."""
    weights = np.array([min(size) / max(size) for size in sizes])
    squares = weights == 1
    weights *= (1 - square_share) / weights.sum()
    weights[squares] += square_share / max(1, squares.sum())
    while True:
        yield sizes[int(rng.choice(len(sizes), p=weights / weights.sum()))]
