"""A folder of pictures: captions in `name.txt`, or in metadata.jsonl or metadata.csv as Hugging Face's imagefolder has them.

Folders named `N_something` count their pictures N times, and `something` is the caption of those that have no other, as
kohya's trainers read them.
"""
from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from ...errors import DataError
from .captions import captions_of_file, captions_of_row, check_fields
from .item import PICTURES, Caption, File, Item, Listing

LAYOUT = "folder of pictures"
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_FIELDS = ("file_name", "image_file_name", "image")
HIDDEN = (".", "__MACOSX")
TRAIN, OTHERS = "train", ("test", "validation", "valid", "val", "dev", "eval")  # names of splits
OTHER_FORMATS = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".psd")  # of pictures that aren't read
REPEATS = re.compile(r"(\d+)_(.*)")


def read_folder(root: Path, fields: Mapping[str, float] | None = None) -> Listing:
    """Every picture below `root`, in the order of names; raises DataError for metadata that can't be right."""
    listing, files = Listing(LAYOUT), visible_files(root)
    if (root / TRAIN).is_dir() and any((root / name).is_dir() for name in OTHERS):  # Hugging Face's splits
        listing.layout += f", of its splits {TRAIN}"
        files = [path for path in files if path.relative_to(root).parts[0] not in OTHERS]
    told: dict[Path, tuple[Caption, ...]] = {}
    for folder in sorted({path.parent for path in files if path.name in METADATA}):
        for path, captions in _metadata(folder, root, fields, listing):
            told[path] = (*told.get(path, ()), *captions)  # several rows of one picture are several captions
    listing.leave_out(f"of other formats than {', '.join(PICTURES)}", sum(path.suffix.lower() in OTHER_FORMATS for path in files))
    for path in (path for path in files if path.suffix.lower() in PICTURES):
        name = path.relative_to(root).as_posix()
        repeats, words = repeats_of(path.relative_to(root).parent)
        try:
            captions = told.get(path) or _beside(path) or ((Caption(words),) if words else ())
        except DataError as error:
            listing.broken[name] = str(error)
            continue
        if repeats:
            listing.items.append(Item(name, File(path), captions, repeats))
        else:
            listing.leave_out("in folders that count 0 times")
    return listing


def visible_files(root: Path) -> list[Path]:
    """Files below a folder and below the folders that it links to, without hidden ones and what macOS leaves in archives."""
    found, been = [], set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in been else [name for name in folders if not name.startswith(HIDDEN)]
        found += [] if real in been else [Path(place, name) for name in names if not name.startswith(HIDDEN)]
        been.add(real)  # links can run in a circle
    return sorted(path for path in found if path.is_file())


def inside(root: Path, name: Any, source: str) -> Path:
    """A file that a data set names, which must lie below its root; raises DataError."""
    path = Path(str(name))
    if not isinstance(name, str) or not name or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{source} names the file {name!r:.80}; expected a path inside {root}.")
    return root / path


def _beside(path: Path) -> tuple[Caption, ...]:
    text = path.with_suffix(".txt")
    return captions_of_file(text) if text.is_file() else ()


def repeats_of(folder: PurePath) -> tuple[int, str]:
    """What the innermost folder named N_something says; 1 and no words if none is."""
    found = next((match for part in reversed(folder.parts) if (match := REPEATS.fullmatch(part))), None)
    return (int(found[1]), found[2].strip()) if found else (1, "")


def _metadata(folder: Path, root: Path, fields: Mapping[str, float] | None, listing: Listing) -> Iterable[tuple[Path, tuple[Caption, ...]]]:
    """Picture and captions of every row of a folder's metadata; what is wrong with single pictures goes into `listing`."""
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} holds both {' and '.join(METADATA)}; keep the one that is right.")
    file = found[0]
    rows = _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file)
    known: set[str] = set()
    for source, row in rows:
        known |= row.keys()
        key = next((name for name in FILE_FIELDS if row.get(name)), None)
        if key is None:
            raise DataError(f"{source} has no file_name; expected the name of a picture in each row, and its caption in text.")
        path = inside(folder, row[key], source)
        name = path.relative_to(root).as_posix()
        if not path.is_file():
            listing.broken[name] = f"{source} names it, but it is not there"
            continue
        try:
            yield path, captions_of_row(row, fields)
        except DataError as error:
            raise DataError(f"{source}: {error}.") from None
    check_fields(fields, known, file)


def _json_rows(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}, is not JSON ({error}); expected one object a line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}, is {row!r:.60}; expected an object.")
        yield f"{file}, line {number},", row


def _csv_rows(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text_of(file), newline=""), strict=True), start=2):
            if None in row:  # more cells than columns
                raise DataError(
                    f"{file}, row {number}, has more cells than the first line has columns: {', '.join(row[None])!r:.80} is left over. Put "
                    "captions with a comma into double quotes."
                )
            yield f"{file}, row {number},", row
    except csv.Error as error:
        raise DataError(f"{file} is not CSV ({error}); expected a first line like file_name,text.") from None


def text_of(file: Path) -> str:
    """A file's text, with or without a mark of its byte order; raises DataError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read as UTF-8 text ({error}).") from None
