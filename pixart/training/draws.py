"""Random numbers of a run, each a function of what it is for: seed, stage, batch, row and purpose.

Nothing is kept between steps, so a run that goes on draws what an unbroken one would have drawn, and a batch that
several processes share is the batch that one would have.
"""
from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random numbers of some rows of one batch; `batch` counts from 0 within the stage."""

    seed: int
    stage: int
    batch: int
    rows: range

    def shared(self, purpose: str) -> np.random.Generator:
        """The same for every row and process."""
        return np.random.default_rng(self._key(purpose))

    def of_row(self, row: int, purpose: str) -> np.random.Generator:
        """One row's own."""
        return np.random.default_rng([*self._key(purpose), row])

    def uniform(self, purpose: str) -> Tensor:
        """(B,) in [0, 1), fp64."""
        return torch.tensor([self.of_row(row, purpose).random() for row in self.rows], dtype=torch.float64)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape), fp32 on the CPU."""
        return torch.stack([torch.randn(tuple(shape), generator=self._generator(row, purpose)) for row in self.rows])

    def _generator(self, row: int, purpose: str) -> torch.Generator:
        low, high = np.random.SeedSequence([*self._key(purpose), row]).generate_state(2)
        return torch.Generator().manual_seed(int(low) | int(high) << 32)

    def _key(self, purpose: str) -> list[int]:
        return [self.seed, self.stage, self.batch, zlib.crc32(purpose.encode())]


def share(count: int, rank: int, processes: int) -> range:
    """The rows of a batch of `count` that one process takes; `count` divides by `processes`."""
    each = count // processes
    return range(rank * each, (rank + 1) * each)
