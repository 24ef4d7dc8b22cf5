"""Names for weight files by what is in them, the same on every machine, without reading gigabytes."""
from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLE = 2**20  # bytes at both ends of a file


def identity(path: Path | None) -> str:
    """Of a file, or of a folder's files, by sizes and samples; "" for None or where nothing is. Raises OSError."""
    if path is None or not path.exists():
        return ""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        size = file.stat().st_size
        found.update(f"{name}:{size}:".encode())
        with file.open("rb") as content:
            found.update(content.read(SAMPLE))
            if size > SAMPLE:
                content.seek(max(size - SAMPLE, SAMPLE))
                found.update(content.read(SAMPLE))
    return found.hexdigest()[:16]
