"""Pictures of every kind as RGB, and of every size as a bin wants them."""
from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")  # of all that Pillow reads: others start programs, or are no pictures of a data set
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: lying on a side
LANCZOS_FROM = 2048  # the reference's data set resizes to these base sizes by Lanczos, to smaller ones by bicubic
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # grey of 16 bits; Pillow reads deep colour as 8 bits by itself


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width as shown, once it is sure that the picture is whole; raises DataError."""
    with _opened(data) as picture:
        width, height = picture.size
        turned = picture.getexif().get(ORIENTATION) in TURNED
        picture.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth of its size: fast, and what is cut off shows all the same
        picture.load()
    return (width, height) if turned else (height, width)


def read_picture(data: bytes) -> Image:
    """RGB, upright, on white where it is transparent; raises DataError."""
    from PIL import Image, ImageOps

    with _opened(data) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in DEEP:  # Pillow's own conversion would clip at 255
            deep = np.asarray(picture).astype(np.int64)
            return Image.fromarray((deep.clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")


def fitted(picture: Image, height: int, width: int, base_size: int) -> Image:
    """Resized until it covers height x width, then its centre: what the reference's data set does.

    Its extractor squeezes pictures to the bin instead, so that shapes of the cache and of the data set differ.
    """
    from PIL import Image

    old_width, old_height = picture.size
    if height * old_width > width * old_height:
        new_height, new_width = height, old_width * height // old_height
    else:
        new_height, new_width = old_height * width // old_width, width
    method = Image.Resampling.LANCZOS if base_size >= LANCZOS_FROM else Image.Resampling.BICUBIC
    picture = picture.resize((new_width, new_height), method)
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    return picture.crop((left, top, left + width, top + height))


def to_tensor(picture: Image) -> Tensor:
    """(3, H, W) in 0..1."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with."""
    from PIL import Image

    Image.init()
    # Of large pictures and odd EXIF: either they decode or they don't. Once and for all, since threads share the filters
    warnings.filterwarnings("ignore", module="PIL")
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(data: bytes) -> Iterator[Image]:
    """Whatever Pillow raises, as one sentence."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            yield picture
    except UnidentifiedImageError:
        raise DataError("it is not a JPEG, PNG, WebP or AVIF that this Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"it is too large ({error})") from None
    except Exception as error:  # damaged files make decoders raise nearly anything: SyntaxError, struct.error, ...
        raise DataError(f"it is damaged ({error})") from None
