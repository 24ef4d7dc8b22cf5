"""A contact sheet: some pictures with their captions, to look at before thousands are made."""
from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..training.data.picture import read_picture

SIDE, TEXT_WIDTH, MARGIN, SIZE = 256, 560, 12, 15  # pixels
LETTERS = TEXT_WIDTH // 8  # in a line


def draw_sheet(folder: Path, captions: Mapping[str, Sequence[str]]) -> Image.Image:
    """Each picture with its name and what is said of it."""
    font = ImageFont.load_default(SIZE)
    rows = [_row(folder / name, f"{name}\n" + "\n".join(_lines(texts)), font) for name, texts in captions.items()]
    sheet = Image.new("RGB", (SIDE + TEXT_WIDTH + 3 * MARGIN, sum(row.height for row in rows) + MARGIN), "white")
    top = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height
    return sheet


def _row(path: Path, text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    picture = read_picture(path.read_bytes())
    picture.thumbnail((SIDE, SIDE))
    height = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)[3]
    row = Image.new("RGB", (SIDE + TEXT_WIDTH + MARGIN, int(max(picture.height, height)) + MARGIN), "white")
    row.paste(picture, (0, 0))
    ImageDraw.Draw(row).multiline_text((SIDE + MARGIN, 0), text, "black", font=font)
    return row


def _lines(texts: Sequence[str]) -> list[str]:
    """Wrapped; signs that the font lacks come out as boxes, but none breaks the line."""
    shown = ["".join(letter if letter.isprintable() else "?" for letter in text) for text in texts]
    return [line for text in shown for line in [*textwrap.wrap(text, LETTERS), ""]]
