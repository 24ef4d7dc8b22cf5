"""The size that is drawn for a wanted size, and the way back from it."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .bins import Bin, check_size, nearest_bin, resize_and_crop
from .logs import get_logger

logger = get_logger(__name__)


class Canvas(NamedTuple):
    """Sizes of one run, in pixels: what was wanted, and what the model draws."""

    width: int
    height: int
    drawn_width: int
    drawn_height: int
    binned: bool


def choose_canvas(width: int, height: int, base: int, use_bins: bool, step: int) -> Canvas:
    """The nearest bin of `base`, or the wanted size in whole latents of `step` pixels; raises InputError for no size."""
    width, height = check_size(width, height)
    size = nearest_bin(base, width, height)
    _warn_if_far(width, height, size, use_bins)
    if use_bins:
        return Canvas(width, height, size.width, size.height, binned=True)
    return Canvas(width, height, -(-width // step) * step, -(-height // step) * step, binned=False)


def canvas_of_latents(latents: Tensor, step: int) -> Canvas:
    """The size that latents (B, C, h, w) stand for."""
    height, width = (side * step for side in latents.shape[-2:])
    return Canvas(width, height, width, height, binned=False)


def crop_to_wanted(images: Tensor, canvas: Canvas) -> Tensor:
    """Drawn pictures (B, C, H, W) at the wanted size: a bin's are scaled first, others lose only what fills whole latents."""
    if canvas.binned:
        return resize_and_crop(images, canvas.width, canvas.height)
    top, left = (images.shape[-2] - canvas.height) // 2, (images.shape[-1] - canvas.width) // 2
    return images[..., top : top + canvas.height, left : left + canvas.width]


def _warn_if_far(width: int, height: int, size: Bin, use_bins: bool) -> None:
    """Says so when a wanted size is far from all the model was trained on."""
    area = width * height / (size.width * size.height)
    ratio = height / width / size.ratio
    if 0.8 <= ratio <= 1.25 and (0.5 <= area or use_bins) and area <= (4 if use_bins else 2):
        return
    if use_bins:
        remedy = "it is drawn at that size, enlarged and cropped; ask for a size closer to it to keep the picture whole and sharp."
    else:
        remedy = "use_bins=True draws it at that size."
    logger.warning(
        "%dx%d is far from the sizes this model was trained at. The nearest is %dx%d: %s",
        width, height, size.width, size.height, remedy,
    )  # fmt: skip
