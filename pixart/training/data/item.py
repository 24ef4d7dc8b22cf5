"""What a reader finds: pictures that are not read yet, with their captions and the features that lie ready."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif")  # in any case


class Content(Protocol):
    """Where the bytes of a picture are; small, and can be sent to another process."""

    def read(self) -> bytes:
        """All of them; raises OSError."""

    def stamp(self) -> str:
        """Changes when the bytes may have changed; raises OSError if they are gone."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of its own."""

    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()

    def stamp(self) -> str:
        return file_stamp(self.path)


class Caption(NamedTuple):
    """One text of a picture; drawn as often as its weight says."""

    text: str
    weight: float = 1.0
    states: Path | None = None  # npz with its T5 states, as the reference's tools write them


class StoredLatent(NamedTuple):
    """Latents as the reference's tools write them: root / folder of a base size / name."""

    root: Path
    folder: str  # with {size}
    name: str

    def path(self, base_size: int) -> Path:
        """The npy of a base size, whether it is there or not."""
        return self.root / self.folder.format(size=base_size) / self.name


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a data set."""

    name: str  # as messages call it
    content: Content
    captions: tuple[Caption, ...] = ()
    repeats: int = 1  # how often an epoch has it
    weight: float = 1.0  # how much its rows count in the loss
    size: tuple[int, int] | None = None  # height and width, where the data set says
    square: StoredLatent | None = None  # latents of its middle square
    binned: StoredLatent | None = None  # latents in its bin
    inside: str = ""  # its path within a shard
    prior: bool = False  # shows what the model is to draw as before


@dataclass
class Listing:
    """A data set as far as its files tell."""

    layout: str  # in words
    items: list[Item] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # name -> what is wrong, of pictures that can't take part
    left_out: dict[str, int] = field(default_factory=dict)  # why -> how many, of pictures that the layout's own rules leave out

    def leave_out(self, why: str, count: int = 1) -> None:
        """Counts what takes no part."""
        if count:
            self.left_out[why] = self.left_out.get(why, 0) + count


def file_stamp(path: Path) -> str:
    """Path, length and time of a file."""
    found = path.stat()
    return f"{path}|{found.st_size}|{found.st_mtime_ns}"
