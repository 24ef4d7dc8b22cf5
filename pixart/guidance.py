"""Perturbed-attention and skip-layer guidance: which blocks a weakened prediction changes."""
from __future__ import annotations

import re

from .errors import InputError

PERTURBED_ATTENTION, SKIPPED_BLOCKS = "perturbed attention", "skipped blocks"
_ITEM = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def parse_blocks(text: str, depth: int) -> frozenset[int]:
    """Block numbers in a list such as "14" or "3, 10-12". Raises InputError for others than 0 .. depth - 1."""
    found: set[int] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _ITEM.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= depth:
            raise InputError(
                f"blocks has {item!r}; expected numbers from 0 to {depth - 1}, the blocks of this model, or ranges of them: "
                f"{depth // 2}, or {depth // 3}-{depth // 2}."
            )
        found.update(range(first, last + 1))
    if not found:
        raise InputError(f"blocks is empty; expected numbers from 0 to {depth - 1}, such as {depth // 2}.")
    return frozenset(found)
