"""Pictures side by side, each with its prompt below and a frame in the colour of its verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FRAME = {True: (38, 150, 70), False: (200, 40, 40)}
_FONT_SIZE, _LINES, _LINE_HEIGHT, _MARGIN, _BORDER = 13, 3, 16, 10, 3


@dataclass(frozen=True)
class Entry:
    """One picture (H, W, 3) uint8, what was asked for, and whether it shows it."""

    picture: np.ndarray
    prompt: str
    correct: bool


def make_contact_sheet(entries: Sequence[Entry], columns: int = 6, cell: int = 176) -> Image.Image:
    """Lay the entries out in rows; pictures are scaled to fit squares of `cell` pixels."""
    if not entries:
        raise ValueError("no pictures were given; expected at least one")
    rows = -(-len(entries) // columns)
    column_width, row_height = cell + _MARGIN, cell + _LINES * _LINE_HEIGHT + _MARGIN + 6
    sheet = Image.new("RGB", (columns * column_width + _MARGIN, rows * row_height + _MARGIN), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for index, entry in enumerate(entries):
        left = _MARGIN + index % columns * column_width
        top = _MARGIN + index // columns * row_height
        picture = Image.fromarray(entry.picture)
        picture.thumbnail((cell - 2 * _BORDER, cell - 2 * _BORDER), Image.Resampling.LANCZOS)
        x = left + (cell - picture.width) // 2
        y = top + (cell - picture.height) // 2
        box = (x - _BORDER, y - _BORDER, x + picture.width + _BORDER - 1, y + picture.height + _BORDER - 1)
        draw.rectangle(box, fill=_FRAME[entry.correct])
        sheet.paste(picture, (x, y))
        for line, text in enumerate(textwrap.wrap(entry.prompt, cell // 7)[:_LINES]):
            draw.text((left, top + cell + 4 + line * _LINE_HEIGHT), text, fill=(30, 30, 30), font=font)
    return sheet
