"""Which weights a run starts from: a short hash by which a changed file is noticed."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

HASHED_BYTES = 1 << 20  # from each end of a file
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def file_mark(path: Any) -> str | None:
    """Tells one file's content from another's: its size, and a hash of both ends; of a folder, of all weights in it."""
    if path is None or not Path(path).exists():
        return None
    place = Path(path)
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in WEIGHTS)
    digest, size = hashlib.sha256(), 0
    for file in files:
        length = file.stat().st_size
        size += length
        with file.open("rb") as opened:
            digest.update(opened.read(HASHED_BYTES))
            opened.seek(max(0, length - HASHED_BYTES))
            digest.update(opened.read())
    return f"{size}-{digest.hexdigest()[:16]}" if files else None
