"""`python -m pixart extract --on ...`: the features of a data set, computed by any number of workers into one cache."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DataError, UnsupportedError
from ..training.data.cache import Cache
from ..training.data.features import HINT, LATENT, TEXT, TEXTS_AT_ONCE, Latents, Picture, Text, TextStates
from .book import Book
from .many import forget_failures
from .stage import Chunk, Row, cut
from .where import Where, run

PICTURES_AT_ONCE = 16  # of a chunk; the VAE takes one after the other

Job = TextStates | Latents


@dataclass(frozen=True)
class Over:
    """What `Album.compute` calls with each of its jobs."""

    chosen: Where

    def __call__(self, job: Job, work: Sequence[Any], title: str, device: torch.device) -> list[Any]:
        """The results of all of the work; raises PixArtError and OSError. device: that of `chosen` is used instead."""
        stage = FeatureStage(job, work, title)
        forget_failures(stage)
        run([stage], self.chosen)
        return stage.results()


class FeatureStage:
    """See `stage.Stage`; the items are texts or pictures whose features are missing."""

    unit = "items"

    def __init__(self, job: Job, work: Sequence[Any], title: str) -> None:
        self.job, self.name = job, title
        self.place = job.cache.folder.absolute()
        texts = isinstance(job, TextStates)
        # Neighbours in length share a batch, so that little of it is padding
        ordered = sorted(work, key=lambda each: (len(each.text), each.text)) if texts else list(work)
        self.chunks: list[Chunk] = cut(ordered, TEXTS_AT_ONCE if texts else PICTURES_AT_ONCE, {"job": title})

    def open(self, device: str) -> FeatureWorker:
        """The model is loaded at the first missing feature."""
        return FeatureWorker(self, device)

    def failed(self, item: Any, error: str) -> Row:
        """A picture that can't be encoded is named by its number, as `Latents` does it; a text ends the run."""
        return {"result": [item.number, error]} if isinstance(item, Picture) else {"error": error}

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """The worker has written the features."""

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """Whether the features are in the cache; a picture that is broken has none."""
        broken = {row["result"][0] for row in rows if isinstance(row.get("result"), list) and row["result"][1]}
        return any("error" in row for row in rows) or all(
            getattr(item, "number", None) in broken or is_kept(self.job.cache, item) for item in chunk.items
        )

    def results(self) -> list[Any]:
        """As the job yields them; raises DataError for a text that can't be encoded, UnsupportedError if something is missing."""
        book, found = Book(self), []
        for chunk in self.chunks:
            rows = book.record(chunk)
            if rows is None:
                raise UnsupportedError(f"A batch of {self.name} has no record in {self.place}; run the command again.")
            found += rows
        errors = [row["error"] for row in found if "error" in row]
        if errors:
            raise DataError(errors[0])
        return [tuple(row["result"]) if isinstance(row["result"], list) else row["result"] for row in found]


class FeatureWorker:
    """The job's function, once it is needed."""

    def __init__(self, stage: FeatureStage, device: str) -> None:
        self.stage, self.device = stage, device
        self._function: Any = None

    def prepare(self, items: Sequence[Any]) -> None:
        """Loads the model if a feature is missing."""
        if self._function is None and self._missing(items):
            self._function = self.stage.job.open(torch.device(self.device))

    def work(self, items: Sequence[Any]) -> list[Row]:
        """A batch of texts is computed as a whole, or its rounding would depend on what was there before; pictures one by one."""
        missing = self._missing(items)
        if missing and isinstance(self.stage.job, TextStates):
            missing = list(items)
        rows = [{"result": list(found) if isinstance(found, tuple) else found} for found in (self._function(missing) if missing else ())]
        there = [item for item in items if item not in missing]
        return rows + [{"result": [item.number, ""] if isinstance(item, Picture) else item.key} for item in there]

    def _missing(self, items: Sequence[Any]) -> list[Any]:
        return [item for item in items if not is_kept(self.stage.job.cache, item)]


def is_kept(cache: Cache, item: Text | Picture) -> bool:
    """Whether all of an item's features are in the cache."""
    if isinstance(item, Text):
        return cache.has(TEXT, item.key)
    return all(not key or cache.has(kind, key) for kind, key in ((LATENT, item.latent), (HINT, item.hint)))


def extract_over(chosen: Where) -> Over | None:
    """How `extract` shares its work; None leaves it to the processes of a torchrun that started this command without --on torchrun."""
    return None if chosen.on == "local" and "RANK" in os.environ else Over(chosen)
