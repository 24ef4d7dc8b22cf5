"""Pictures with their settings inside: written to the output folder, read from what users drop."""
from __future__ import annotations

import secrets
import time
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from .. import __version__
from ..errors import InputError
from ..training.write import replace_file
from .settings import Settings, from_text

KEY = "pixart"  # of the text inside the PNG


def save_picture(folder: Path, picture: Image.Image, settings: Settings, model: str) -> Path:
    """Writes a PNG with `settings` inside, whole or not at all. Its name can't be guessed: others use the same page."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(KEY, settings.to_text(model=model, version=__version__))
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.seed}-{secrets.token_hex(8)}.png"
    replace_file(path, lambda partial: picture.save(partial, format="PNG", pnginfo=text))
    return path


def read_settings(path: Path) -> tuple[Settings, str]:
    """(settings, name of the model) inside a PNG; raises InputError for a file that has none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:  # reads what stands before the pixels, and these never
            text = picture.info.get(KEY)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise InputError("This file is not a PNG picture; drop one that this page has drawn.") from None
    if not isinstance(text, str):
        raise InputError("This picture has no settings inside; drop one that this page has drawn, as it was downloaded.")
    return from_text(text)
