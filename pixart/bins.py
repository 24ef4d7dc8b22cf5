"""Aspect-ratio bins: the sizes PixArt was trained at, and the way back to the size that was wanted."""
from __future__ import annotations

import json
import operator
from functools import cache
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .config import CONFIG_DIR
from .errors import InputError

MAX_SIDE = 16384  # pixels; a longer side is a typing error, not a wish
# No table was published for 4K: PixArt's 2048 bins, twice as large.
DERIVED_BASES = {4096: (2048, 2)}


class Bin(NamedTuple):
    """One trained size, in pixels; ratio is height / width."""

    height: int
    width: int
    ratio: float


@cache
def bin_table(base: int) -> dict[str, tuple[int, int]]:
    """Ratio label -> (height, width) for a base size; raises InputError for a base without bins."""
    tables = _published_tables()
    if base in DERIVED_BASES:
        source, factor = DERIVED_BASES[base]
        return {label: (height * factor, width * factor) for label, (height, width) in tables[source].items()}
    if base not in tables:
        raise InputError(f"No bins for base size {base!r}; expected one of {', '.join(map(str, base_sizes()))}.")
    return tables[base]


def base_sizes() -> tuple[int, ...]:
    """Base sizes that have bins, ascending."""
    return tuple(sorted({*_published_tables(), *DERIVED_BASES}))


def nearest_bin(base: int, width: int, height: int) -> Bin:
    """The bin of `base` whose ratio is nearest to height / width (in pixels).

    The distance is measured to the rounded label, as in the reference, not to the bin's exact ratio.
    Raises InputError for a base without bins or a size outside 1..16384.
    """
    table = bin_table(base)
    width, height = check_size(width, height)
    wanted = height / width
    label = min(table, key=lambda key: abs(float(key) - wanted))
    bin_height, bin_width = table[label]
    return Bin(bin_height, bin_width, bin_height / bin_width)


def check_size(width: int, height: int) -> tuple[int, int]:
    """Returns (width, height) as ints; raises InputError unless both are whole numbers in 1..16384."""
    sides = []
    for name, value in (("width", width), ("height", height)):
        try:
            side = operator.index(value)
        except TypeError:
            raise InputError(f"{name} is {value!r}; expected a whole number of pixels, 1 to {MAX_SIDE}.") from None
        if not 1 <= side <= MAX_SIDE:
            raise InputError(f"{name} is {side}; expected 1 to {MAX_SIDE} pixels.")
        sides.append(side)
    return sides[0], sides[1]


def resize_and_crop(images: Tensor, width: int, height: int) -> Tensor:
    """Scales images (B, C, H, W) until they cover width x height, then crops the centre.

    Bilinear without antialiasing, and truncating, as diffusers' PixArt pipelines do it.
    """
    width, height = check_size(width, height)
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    scale = max(height / old_height, width / old_width)
    # The product can fall a hair below the wanted side (e.g. 999.9999), which would crop one pixel too many.
    new_height = max(int(old_height * scale), height)
    new_width = max(int(old_width * scale), width)
    images = F.interpolate(images, size=(new_height, new_width), mode="bilinear", align_corners=False)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return images[..., top : top + height, left : left + width]


@cache
def _published_tables() -> dict[int, dict[str, tuple[int, int]]]:
    values = json.loads((CONFIG_DIR / "aspect_ratio_bins.json").read_text(encoding="utf-8"))
    return {
        int(base): {label: (height, width) for label, (height, width) in table.items()}
        for base, table in values.items()
        if base.isdigit()
    }
