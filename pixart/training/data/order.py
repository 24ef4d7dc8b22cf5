"""Which pictures are in which batch: a function of seed, stage and the batch's number, of nothing else."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..draws import Draws


class Rows(NamedTuple):
    """One batch of a plan."""

    picks: list[int]  # an entry for each row
    weights: list[float]  # 1, or less for entries that are in it several times


class Plan:
    """Epochs of entries that lie in bins; each batch has entries of one bin.

    Every epoch has each entry once. What is left of a bin when its full batches are taken is a batch too: it holds its
    entries several times, with a weight that counts each once, so that no picture is lost and no row computed for nothing.
    """

    def __init__(self, bins: Sequence[int], batch_size: int) -> None:
        """bins: the number of each entry's bin."""
        self.bins, self.batch_size = np.asarray(bins), batch_size
        self.batches = int(sum(-(-count // batch_size) for count in np.unique(self.bins, return_counts=True)[1]))
        self._kept: tuple[tuple[int, int, int], list[np.ndarray]] | None = None

    def rows(self, draws: Draws) -> Rows:
        """The batch of `draws`, all its rows."""
        epoch, number = divmod(draws.batch, self.batches)
        picks = self._epoch(replace(draws, batch=epoch))[number]
        filled = np.resize(picks, self.batch_size)
        times = np.bincount(np.arange(self.batch_size) % len(picks), minlength=len(picks))
        return Rows(filled.tolist(), (1 / np.resize(times, self.batch_size)).tolist())

    def _epoch(self, draws: Draws) -> list[np.ndarray]:
        """The batches of an epoch; that of the last call is kept, since a run asks for one after another."""
        key = (draws.seed, draws.stage, draws.batch)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._shuffled(draws.shared("epoch")))
        return self._kept[1]

    def _shuffled(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = rng.permutation(len(self.bins))
        order = order[np.argsort(self.bins[order], kind="stable")]  # by bin, by chance within one
        borders = np.flatnonzero(np.diff(self.bins[order])) + 1
        size = self.batch_size
        batches = [part[start : start + size] for part in np.split(order, borders) for start in range(0, len(part), size)]
        return [batches[index] for index in rng.permutation(len(batches))]
