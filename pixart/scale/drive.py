"""One worker's way through a stage: what isn't done and isn't another's is done; at the end it waits for the others."""
from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..logs import get_logger
from .book import Book
from .stage import Chunk, Row, Stage, Worker

logger = get_logger(__name__)

PAUSE = 0.2  # seconds between looks at what others are at
DEATHS = 3  # of workers at one chunk, before it is left
SCANS = 20  # the bar's own looks at the disk take at most a twentieth of the time


class Opened:
    """A worker that loads its models at the first chunk it has to do."""

    def __init__(self, stage: Stage, device: str) -> None:
        self.stage, self.device = stage, device
        self.book = Book(stage)
        self._worker: Worker | None = None

    def finish(self, chunk: Chunk, wait: bool = False) -> bool:
        """Does a chunk unless it is done; False if another worker is at it. Raises PixArtError and OSError: the run can't go on."""
        if self.book.is_done(chunk):
            return True
        with self.book.claim(chunk, wait) as ours:
            if not ours:
                return False
            if not self.book.is_done(chunk):
                self._do(chunk)
        return True

    def _do(self, chunk: Chunk) -> None:
        rows = self.book.record(chunk)
        if rows is not None:  # a run was killed before all was published, or a result was deleted
            self.stage.publish(chunk, rows)
            if self.stage.is_whole(chunk, rows):
                return
        if self._worker is None:
            self._worker = self.stage.open(self.device)
        self._worker.prepare(chunk.items)
        if self.book.begin(chunk) > DEATHS:
            rows = [self.stage.failed(item, f"{DEATHS} workers died on its batch; was memory short?") for item in chunk.items]
        else:
            rows = attempt(self.stage, self._worker, chunk.items)
        self.book.write(chunk, rows)
        self.stage.publish(chunk, rows)

    def close(self) -> None:
        """Releases the models before the next stage loads its own."""
        if self._worker is not None:
            self._worker = None
            release_memory()


def attempt(stage: Stage, worker: Worker, items: Sequence[Any]) -> list[Row]:
    """Rows of a chunk; if that fails, every item once more by itself, and those that fail again become rows that say why."""
    try:
        return worker.work(items)
    except OSError:
        raise
    except Exception as error:  # of models that users choose, whose code raises anything
        logger.info("A batch of %d %s failed and is tried one by one: %s", len(items), stage.unit, error)
    release_memory()  # outside of the except block, whose error still holds the batch
    rows: list[Row] = []
    for item in items:
        try:
            rows += worker.work([item])
        except OSError:
            raise
        except Exception as error:
            rows.append(stage.failed(item, one_line(error)))
    return rows


def drive(stages: Sequence[Stage], device: str, first: int = 0, of: int = 1, shown: bool = True) -> None:
    """Takes part in stages, one after the other, until every chunk is done by someone.

    first, of: this worker's number and how many there are; they only choose where it begins to look for work.
    """
    for stage in stages:
        start = len(stage.chunks) * first // of
        left = [*stage.chunks[start:], *stage.chunks[:start]]
        opened = Opened(stage, device)
        with progress(stage, shown) as show:
            while left:
                others = []
                for chunk in left:
                    if not opened.finish(chunk):
                        others.append(chunk)
                    show()
                left = others
                if left:
                    time.sleep(PAUSE)
        opened.close()


@contextlib.contextmanager
def progress(stage: Stage, shown: bool) -> Iterator[Any]:
    """A bar of all items, whoever does them; the function it gives brings it up to date."""
    from tqdm import tqdm

    book, left = Book(stage), list(stage.chunks)
    due = 0.0
    with tqdm(total=sum(len(chunk.items) for chunk in left), desc=stage.name, unit=f" {stage.unit}", disable=not shown) as bar:

        def show(now: bool = False) -> None:
            nonlocal left, due
            begin = time.monotonic()
            if not shown or (begin < due and not now):
                return
            missing = [chunk for chunk in left if not book.is_done(chunk)]
            bar.update(sum(len(chunk.items) for chunk in left) - sum(len(chunk.items) for chunk in missing))
            left, due = missing, begin + max(1.0, SCANS * (time.monotonic() - begin))

        show(now=True)
        yield show
        show(now=True)


def release_memory() -> None:
    """Gives back what models and failed batches held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """An error as a row keeps it."""
    return " ".join(str(error).split())[:500] or type(error).__name__
