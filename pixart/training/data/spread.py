"""One function over many items: here, or shared by the processes of a torchrun."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

T, R = TypeVar("T"), TypeVar("R")


class Job(Protocol):
    """A function that needs a model; small, and can be sent to another process."""

    def open(self, device: torch.device) -> Callable[[Sequence[Any]], Iterable[Any]]:
        """Loads the model; the function takes some of the work and yields a result for each of it, in any order."""


def spread(job: Job, work: Sequence[T], title: str, device: torch.device) -> list[Any]:
    """The results of all of `work` in every process, in any order; each process loads the model for its share."""
    return shared(lambda mine: job.open(device)(mine), work, title)


def shared(function: Callable[[Sequence[T]], Iterable[R]], work: Sequence[T], title: str, shown_from: int = 1) -> list[R]:
    """The same for a function itself; the progress bar comes from `shown_from` items on."""
    rank, count = _place()
    mine = work[rank::count]
    hidden = rank > 0 or len(work) < shown_from
    found = list(tqdm(function(mine), total=len(mine), desc=title, disable=hidden, mininterval=2)) if mine else []
    if count == 1:
        return found
    parts: list[list[R]] = [[] for _ in range(count)]
    dist.all_gather_object(parts, found)
    return [each for part in parts for each in part]


def same_everywhere(work: Sequence[T]) -> list[T]:
    """The first process's list in all of them: others may have looked a moment later, when some of it was done already."""
    agreed = [list(work)]
    if dist.is_initialized():
        dist.broadcast_object_list(agreed)
    return agreed[0]


def is_first() -> bool:
    """Whether this process speaks for all."""
    return _place()[0] == 0


def _place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
