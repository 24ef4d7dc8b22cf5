"""A stage without models, whose worker can be told to fail, to find the disk full, or to be killed."""
from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from pixart.errors import InputError
from pixart.scale.stage import Chunk, Row, cut


class CountedStage:
    """Writes `n.txt` for each number n, and a file of every time that it worked at one."""

    name, unit = "numbers", "numbers"

    def __init__(self, place: Path, count: int = 12, size: int = 2, trouble: dict[int, str] | None = None, times: int = 1) -> None:
        """trouble: number -> "batch" (fails beside others), "always", "disk" or "kill", that often (killed and full disks)."""
        self.place, self.trouble, self.times = place, trouble or {}, times
        self.chunks: list[Chunk] = cut(range(count), size, {})

    def open(self, device: str) -> CountedStage:
        """The worker is the stage itself."""
        return self

    def prepare(self, items: Sequence[int]) -> None:
        """There is nothing to load."""

    def work(self, items: Sequence[int]) -> list[Row]:
        for item in items:
            self._meet(self.trouble.get(item, ""), item, len(items))
            (self.place / f"{item}.txt").write_text(str(item), encoding="utf-8")
            with (self.place / "worked").open("a", encoding="utf-8") as file:
                file.write(f"{item}\n")
        return [{"file": f"{item}.txt", "pid": os.getpid()} for item in items]

    def failed(self, item: int, error: str) -> Row:
        return {"file": f"{item}.txt", "error": error}

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """Nothing more to do."""

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        return all("error" in row or (self.place / row["file"]).is_file() for row in rows)

    def worked(self) -> list[int]:
        """Every number as often as it was worked at."""
        path = self.place / "worked"
        return sorted(map(int, path.read_text(encoding="utf-8").split())) if path.exists() else []

    def files(self) -> set[int]:
        """Numbers whose files are there."""
        return {int(path.stem) for path in self.place.glob("*.txt")}

    def _meet(self, trouble: str, item: int, others: int) -> None:
        if trouble == "always" or (trouble == "batch" and others > 1):
            raise InputError(f"{item} fails")
        seen = self.place / f"{trouble}-{item}"
        if trouble in ("disk", "kill") and (count := len(seen.read_text() if seen.exists() else "")) < self.times:
            seen.write_text("x" * (count + 1))
            if trouble == "disk":
                raise OSError(errno.ENOSPC, "No space left on device", str(seen))
            os.kill(os.getpid(), signal.SIGKILL)
