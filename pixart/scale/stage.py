"""What a command has to do, as stages: maps over chunks of items that need nothing of each other.

The chunks are decided by the input alone, never by the workers: which items share a batch changes how their matrix products
are rounded, so that this is what makes a result the same for any number of workers.
"""
from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..training.data.marks import mark_of, model_mark

Row = dict[str, Any]  # what became of one item, as JSON


@dataclass(frozen=True)
class Chunk:
    """Items that one worker does together, a batch. key: names them and all that decides what comes of them."""

    key: str
    items: tuple[Any, ...]


class Worker(Protocol):
    """The loaded models of one stage, on one device."""

    def prepare(self, items: Sequence[Any]) -> None:
        """Loads what these items need, if it isn't loaded; an error ends the run."""

    def work(self, items: Sequence[Any]) -> list[Row]:
        """Rows of the items. An error is this batch's, but an OSError (a full disk) ends the run."""


class Stage(Protocol):
    """One map. It travels to other processes and machines by pickle."""

    name: str  # of its records
    unit: str  # what the progress bar counts
    place: Path  # the folder of the results, the same for all workers
    chunks: Sequence[Chunk]

    def open(self, device: str) -> Worker:
        """Called where there is work, and once for all chunks."""

    def failed(self, item: Any, error: str) -> Row:
        """The row of an item that can't be done; it has a field `error`."""

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """Called after the rows are recorded, again too if a run was killed in between."""

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """Whether all that the rows name is still there."""


def identity(path: Path | None) -> str:
    """Names a model by what is in its files, the same wherever they lie; "" for one that isn't on this machine."""
    return model_mark(path) if path is not None and path.exists() else ""


def cut(items: Iterable[Any], size: int, settings: Mapping[str, Any]) -> list[Chunk]:
    """Chunks of neighbours. settings: whatever else decides the results."""
    items = tuple(items)
    parts = (items[start : start + size] for start in range(0, len(items), size))
    return [Chunk(mark_of(dict(settings), part), part) for part in parts]


def grouped(items: Iterable[Any], group: Any) -> dict[Hashable, list[Any]]:
    """Items by `group(item)`, in the order of the first of each."""
    found: dict[Hashable, list[Any]] = {}
    for item in items:
        found.setdefault(group(item), []).append(item)
    return found
