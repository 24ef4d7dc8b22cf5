"""Which weights a run starts from: a mark by which a changed file is noticed."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from .data.marks import model_mark


def file_mark(path: Any) -> str | None:
    """Tells one model's content from another's; None where there is none."""
    return model_mark(path) if path is not None and Path(path).exists() else None
