"""`python -m pixart generate --prompts FILE --output FOLDER`: from a list of prompts to a pile of pictures and an index."""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..training.data.marks import mark_of
from .book import FOLDER, Book, locked, write_text
from .draw_stage import DRAWN, FAILED, DrawStage, key_in
from .encode_stage import EncodeStage
from .prompt_rows import Picture
from .stage import Row, Stage
from .where import Where, leads, run

INDEX = "index.jsonl"
MISSING = "missing"  # status of what a run that ended early has not come to
SHOWN = 3
WORTH_A_WORD = 100_000_000  # bytes of T5 states


def generate_many(encode: EncodeStage, draw: DrawStage, chosen: Where, overwrite: bool = False) -> list[Row]:
    """Draws what isn't drawn yet; the rows of the index, in the order of the prompts file.

    The index is written whenever the run ends, also by an error. Raises PixArtError and OSError.
    """
    if leads():
        prepare(draw, overwrite)
        for stage in (encode, draw):
            forget_failures(stage)
    return indexed(draw, lambda: run([encode, draw], chosen))


def indexed(draw: DrawStage, work: object) -> list[Row]:
    """Runs `work` and writes the index, whatever happens."""
    try:
        work()
    finally:
        if leads():
            rows = write_index(draw)
    return rows if leads() else []


def prepare(draw: DrawStage, overwrite: bool) -> None:
    """Refuses, or with `overwrite` deletes, pictures in the folder that are not what the prompts file asks for."""
    place = draw.place
    if place.exists() and not place.is_dir():
        raise InputError(f"--output is {place}, which is a file; expected a folder.")
    there = (item for item in unproven(draw) if (place / item.file).exists())
    others = sorted(item.file for item in there if key_in(place / item.file) != draw.key_of(item))
    if others and not overwrite:
        more = "" if len(others) <= SHOWN else f" and {len(others) - SHOWN} more"
        raise InputError(
            f"{place} holds {', '.join(others[:SHOWN])}{more}, drawn from other prompts, settings or models. Choose another --output, or "
            "add --overwrite to redraw them."
        )
    if others:
        shutil.rmtree(place / FOLDER / draw.name, ignore_errors=True)  # records of pictures that are overwritten
    for name in others:
        (place / name).unlink()
    write_text(_asked_file(draw), _asked(draw))


def unproven(draw: DrawStage) -> list[Picture]:
    """Pictures whose files may be of another run: those without a record, and all if the last run here drew something else."""
    if not _asked_file(draw).is_file() or _asked_file(draw).read_text(encoding="utf-8") != _asked(draw):
        return [item for chunk in draw.chunks for item in chunk.items]
    book = Book(draw)
    return [item for chunk in draw.chunks if book.record(chunk) is None for item in chunk.items]


def _asked(draw: DrawStage) -> str:
    return mark_of(*((item.file, draw.key_of(item)) for chunk in draw.chunks for item in chunk.items))


def _asked_file(draw: DrawStage) -> Path:
    return draw.place / FOLDER / f"{draw.name}-asked"


def forget_failures(stage: Stage) -> None:
    """A new run tries again what failed in an earlier one, or was being done when it was killed."""
    book = Book(stage)
    for chunk in stage.chunks:
        rows = book.record(chunk)
        if rows is None:
            book.forget_deaths(chunk)  # alone: another run may be writing the record just now
        elif any("error" in row for row in rows):
            book.forget(chunk)


def write_index(draw: DrawStage) -> list[Row]:
    """`index.jsonl`, a line a picture; its rows."""
    book = Book(draw)
    found: dict[str, Row] = {}
    for chunk in draw.chunks:
        rows = book.record(chunk) or [draw.row(item, MISSING) for item in chunk.items]
        found.update((row["file"], row) for row in rows)
    rows = sorted(found.values(), key=lambda row: (row["row"], len(row["file"]), row["file"]))
    with locked(draw.place / FOLDER / "index.lock"):
        write_text(draw.place / INDEX, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return rows


def summary(rows: Sequence[Row], place: Path, encode: EncodeStage | None = None) -> str:
    """What the command says at its end; with `encode` also what its states take of the disk, if that is much."""
    failed = [row for row in rows if row["status"] == FAILED]
    lines = [f"{sum(row['status'] == DRAWN for row in rows)} of {len(rows)} pictures are in {place}; {INDEX} lists them."]
    lines += [f"failed: {row['file']}, row {row['row']}: {row['error']}" for row in failed]
    cut = sum("cut" in row for row in rows)
    if cut:
        lines.append(f"{cut} prompts were longer than the model reads; the index says what was left out.")
    size = encode.kept_bytes() if encode else 0
    if size >= WORTH_A_WORD:
        lines.append(
            f"T5 states for further pictures of these prompts take {size / 1e9:.1f} GB in {encode.folder}; delete it when you are done."
        )
    return "\n".join(lines)
