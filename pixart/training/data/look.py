"""A first look at every picture: what its bytes are, how large it is, whether it is whole. Once seen, it is remembered."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from ..write import replace_file
from .item import Content
from .marks import mark_of
from .picture import picture_size
from .spread import shared

FILE = "pictures.jsonl"
LOOKING, SHOWN_FROM = "looking at pictures", 500  # pictures; fewer are looked at in a moment
MOST_THREADS, AT_ONCE = 16, 1024


class Seen(NamedTuple):
    """What a look found."""

    content: str  # a mark of the bytes
    height: int
    width: int
    problem: str = ""  # what is wrong with the picture, "" if it is whole


class Memory:
    """What was seen before, by stamp: a file of the cache, so that a large data set is read through only once."""

    def __init__(self, cache: Path) -> None:
        self.path = cache / FILE
        self.seen: dict[str, Seen] = {}
        self.new = False
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").split("\n"):
                self._read(line)

    def _read(self, line: str) -> None:
        """A line that is damaged is forgotten, and the picture looked at again."""
        try:
            stamp, content, height, width, problem = json.loads(line)
            self.seen[str(stamp)] = Seen(str(content), int(height), int(width), str(problem))
        except (ValueError, TypeError):
            return

    def look(self, contents: Sequence[Content]) -> list[Seen]:
        """What is to be known of each, in order; several processes share the work."""
        found = {number: (stamp, seen) for number, stamp, seen in shared(self._look_at, list(enumerate(contents)), LOOKING, SHOWN_FROM)}
        new = {stamp: seen for stamp, seen in found.values() if stamp and stamp not in self.seen}
        self.new = self.new or bool(new)
        self.seen.update(new)
        return [found[number][1] for number in range(len(contents))]

    def _look_at(self, work: Sequence[tuple[int, Content]]) -> Iterator[tuple[int, str, Seen]]:
        with ThreadPoolExecutor(min(MOST_THREADS, cpu_count() or 1)) as pool:
            for start in range(0, len(work), AT_ONCE):
                part = work[start : start + AT_ONCE]
                for (number, _), (stamp, seen) in zip(part, pool.map(self._look, (content for _, content in part))):
                    yield number, stamp, seen

    def _look(self, content: Content) -> tuple[str, Seen]:
        try:
            stamp = content.stamp()
        except (OSError, DataError) as error:
            return "", Seen("", 0, 0, f"it can't be read ({error})")
        return stamp, self.seen.get(stamp) or look_at(content)

    def save(self) -> None:
        """Keeps what was seen; one process calls it."""
        if self.new:
            rows = "".join(json.dumps([stamp, *seen]) + "\n" for stamp, seen in self.seen.items())
            replace_file(self.path, lambda partial: partial.write_text(rows, encoding="utf-8"))
            self.new = False


def look_at(content: Content) -> Seen:
    """Reads and decodes one picture."""
    try:
        data = content.read()
        return Seen(mark_of(data), *picture_size(data))
    except (OSError, DataError) as error:
        return Seen("", 0, 0, str(error))
