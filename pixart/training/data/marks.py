"""Short names of contents: of bytes, of weight files, of how something was prepared."""
from __future__ import annotations

import hashlib
from pathlib import Path

ENDS = 1 << 20  # bytes of each end of a file that are read: headers and the last weights
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".model", ".json")


def mark_of(*parts: object) -> str:
    """Names a combination of values and bytes, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        found = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(found).to_bytes(8, "big") + found)
    return digest.hexdigest()


def file_mark(path: Path) -> str:
    """Tells one file's content from another's: its length, and both its ends."""
    with path.open("rb") as file:
        first = file.read(ENDS)
        file.seek(max(0, path.stat().st_size - ENDS))
        return mark_of(path.stat().st_size, first, file.read(ENDS))


def model_mark(place: str | Path, parts: tuple[str, ...] = ()) -> str:
    """The same of a model's file, or of every weight and config in its folder, or in those of a pipeline's `parts`."""
    place = Path(place)
    if place.is_file():
        return file_mark(place)
    folders = [place / part for part in parts if (place / part).is_dir()] or [place]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in WEIGHTS and path.is_file())
    return mark_of(*((path.relative_to(place).as_posix(), file_mark(path)) for path in files))
