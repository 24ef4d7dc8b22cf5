"""What is done, and who is at what: files in a hidden folder beside the results, which all workers and runs share.

A chunk's record is written when the chunk is done. While a worker is at a chunk, it holds the lock of a file. The system frees
the lock when its process ends, however it ends, so that another worker can take the chunk over.
"""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import UnsupportedError
from ..training.write import replace_file
from .stage import Chunk, Row, Stage

FOLDER = ".pixart-work"


class Book:
    """Records and locks of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.folder = stage.place / FOLDER / stage.name

    def record(self, chunk: Chunk) -> list[Row] | None:
        """Rows of a chunk; None if it isn't done, or if its record was damaged."""
        try:
            rows = json.loads(self._path(chunk).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None

    def is_done(self, chunk: Chunk) -> bool:
        """Whether a chunk is recorded and its results are still there."""
        rows = self.record(chunk)
        return rows is not None and self.stage.is_whole(chunk, rows)

    def write(self, chunk: Chunk, rows: list[Row]) -> None:
        """Records a chunk. Raises OSError."""
        write_text(self._path(chunk), json.dumps(rows, ensure_ascii=False))
        self.forget_deaths(chunk)

    def forget(self, chunk: Chunk) -> None:
        """Takes a record away, so that the chunk is done again."""
        self._path(chunk).unlink(missing_ok=True)
        self.forget_deaths(chunk)

    def forget_deaths(self, chunk: Chunk) -> None:
        """Counts anew how often work on a chunk begins; a record stays."""
        self._beginnings(chunk).unlink(missing_ok=True)

    def begin(self, chunk: Chunk) -> int:
        """Notes that work on a claimed chunk begins; how often it has begun. More than once means that a worker died at it."""
        path = self._beginnings(chunk)
        try:
            count = int(path.read_text(encoding="utf-8")) + 1
        except (FileNotFoundError, ValueError):
            count = 1
        write_text(path, str(count))
        return count

    @contextlib.contextmanager
    def claim(self, chunk: Chunk, wait: bool) -> Iterator[bool]:
        """Whether the chunk is ours inside the block; with `wait` it always is, after a while."""
        with locked(self.folder / "claims" / f"{chunk.key}.lock", wait) as ours:
            yield ours
            # Whoever waits for this file finds the chunk done; a chunk that isn't keeps its file
            if ours and self.record(chunk) is not None:
                with contextlib.suppress(OSError):
                    (self.folder / "claims" / f"{chunk.key}.lock").unlink()

    def _beginnings(self, chunk: Chunk) -> Path:
        return self.folder / "claims" / f"{chunk.key}.begun"

    def _path(self, chunk: Chunk) -> Path:
        return self.folder / chunk.key[:2] / f"{chunk.key}.json"


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file, which is made; False inside the block if another holds it and `wait` is False."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=-1 if wait else 0, poll_interval=0.1)
    except Timeout:
        yield False
        return
    except NotImplementedError:
        raise UnsupportedError(f"{path.parent} is on a file system without locks; choose a folder on a local disk or on NFS.") from None
    try:
        yield True
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file that appears whole or not at all. Raises OSError."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
