"""Data sets in few large files: Hugging Face `datasets` saved on disk, parquet, and tar shards.

Nothing of them is copied, and no more than one picture, or one group of rows, is in memory at a time.
"""
from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from ...errors import DataError, UnsupportedError
from .captions import captions_of_row, captions_of_text, check_fields
from .folder import TRAIN
from .item import PICTURES, Item, Listing, file_stamp

USUAL_COLUMNS = ("image", "jpg", "png", "webp", "picture", "img")
ADVICE = '`pip install ".[training]"` in the repository, or `pip install datasets`'
_one_reader = Lock()


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a file: a member of a tar."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def stamp(self) -> str:
        return f"{file_stamp(self.path)}|{self.offset}"


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """A picture in a parquet file."""

    path: Path
    group: int
    row: int  # within the group
    column: str

    def read(self) -> bytes:
        return _bytes(_column(self.path, self.group, self.column)[self.row].as_py())

    def stamp(self) -> str:
        return f"{file_stamp(self.path)}|{self.group}|{self.row}"


@dataclass(frozen=True, slots=True)
class ArrowRow:
    """A picture in a data set of `datasets`, whose fingerprint names its content."""

    folder: Path
    row: int
    column: str

    def read(self) -> bytes:
        return _bytes(_pictures(self.folder, self.column)[self.row][self.column])

    def stamp(self) -> str:
        return f"{self.folder}|{_pictures(self.folder, self.column)._fingerprint}|{self.row}"


def read_parquet(files: list[Path], fields: Mapping[str, float] | None = None) -> Listing:
    """Every row of parquet files; raises DataError for what can't be right."""
    parquet = _library("pyarrow.parquet")
    files = of_train(files)
    listing, names_of = Listing(f"parquet, {len(files)} files"), _names(files)
    for path in files:
        try:
            opened = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} can't be read as parquet ({error}); download it again.") from None
        names = opened.schema_arrow.names
        column = _picture_column(names, str(path))
        check_fields(fields, set(names), path)
        texts = [name for name in names if name != column]
        for group in range(opened.num_row_groups):
            for row, values in enumerate(opened.read_row_group(group, columns=texts).to_pylist()):
                _add(listing, f"{names_of[path]}, group {group}, row {row}", ParquetRow(path, group, row, column), values, fields)
    return listing


def read_saved(root: Path, fields: Mapping[str, float] | None = None) -> Listing:
    """A data set that `datasets` has saved on disk; of several splits the one called train."""
    root = _train_split(root)
    data = _saved(root)
    column = _picture_column(data.column_names, str(root))
    check_fields(fields, set(data.column_names), root)
    texts = data.remove_columns([column])
    listing = Listing("datasets saved on disk")
    for row in range(len(data)):
        _add(listing, f"row {row}", ArrowRow(root, row, column), texts[row], fields)
    return listing


def read_tars(files: list[Path], fields: Mapping[str, float] | None = None) -> Listing:
    """Tar shards: members of one name up to the first dot belong together, a picture with its .txt or .json."""
    files = of_train(files)
    listing, names_of = Listing(f"tar, {len(files)} shards"), _names(files)
    known: set[str] = set()
    for path in files:
        for name, parts in _members(path).items():
            picture = next((suffix for suffix in parts if suffix.lower() in PICTURES), None)
            if picture is None:
                continue
            try:
                row = json.loads(parts[".json"].read()) if ".json" in parts else {}
                row = row if isinstance(row, dict) else {}
                known |= row.keys()
                captions = captions_of_text(parts[".txt"].read().decode("utf-8-sig")) if ".txt" in parts and not fields else ()
                captions = captions or captions_of_row(row, fields)
            except (DataError, ValueError, RecursionError) as error:
                listing.broken[f"{names_of[path]}, {name}"] = str(error)
                continue
            listing.items.append(Item(f"{names_of[path]}, {name}{picture}", parts[picture], captions, inside=f"{name}{picture}"))
    check_fields(fields, known, files[0].parent)
    return listing


def of_train(files: list[Path]) -> list[Path]:
    """Those of the split called train, by the name of file or folder, if some are; else all."""
    return [path for path in files if any(part.startswith(TRAIN) for part in (path.name, path.parent.name))] or files


def _names(files: list[Path]) -> dict[Path, str]:
    """Paths as far as they differ."""
    root = Path(os.path.commonpath([path.parent for path in files]))
    return {path: path.relative_to(root).as_posix() for path in files}


def _members(path: Path) -> dict[str, dict[str, Slice]]:
    """Name up to the first dot -> suffix -> member, in the order of the tar."""
    found: dict[str, dict[str, Slice]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isfile() and not name.name.startswith("."):
                    stem, _, suffix = name.name.partition(".")
                    found.setdefault(str(name.with_name(stem)), {})[f".{suffix}"] = Slice(path, member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} can't be read as an uncompressed tar ({error}); download it again, or unpack it with gunzip.") from None
    if path.stat().st_size < end:
        raise DataError(f"{path} is cut off: its last member ends behind the file's end. Download it again.")
    return found


def _add(listing: Listing, name: str, content: Any, row: Mapping[str, Any], fields: Mapping[str, float] | None) -> None:
    try:
        listing.items.append(Item(name, content, captions_of_row(row, fields)))
    except DataError as error:
        listing.broken[name] = str(error)


def _picture_column(names: Iterable[str], source: str) -> str:
    names = list(names)
    found = next((name for name in USUAL_COLUMNS if name in names), None)
    if found is None:
        wanted = " or ".join(USUAL_COLUMNS)
        raise DataError(f"{source} has the columns {', '.join(names) or 'none'}; expected pictures in one called {wanted}.")
    return found


def _bytes(value: Any) -> bytes:
    """Of a picture as `datasets` keeps it: bytes, or a struct of bytes and path; a path alone is not followed."""
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise DataError("its row holds no picture")
    return value


def _column(path: Path, group: int, column: str) -> Any:
    """The pictures of one group of rows; neighbours are read one after another, and the group is kept for them."""
    with _one_reader:  # threads that miss at once would each hold a group
        return _group(path, group, column)


@lru_cache(maxsize=1)
def _group(path: Path, group: int, column: str) -> Any:
    return _library("pyarrow.parquet").ParquetFile(path).read_row_group(group, columns=[column])[column]


@lru_cache(maxsize=4)
def _saved(root: Path) -> Any:
    datasets = _library("datasets")
    try:
        return datasets.load_from_disk(str(root))
    except Exception as error:  # arrow and json raise what they like about damaged files
        raise DataError(f"{root} can't be read as a data set of `datasets` ({error}); save it again.") from None


@lru_cache(maxsize=4)
def _pictures(root: Path, column: str) -> Any:
    """The column alone, as bytes that are not decoded."""
    data, datasets = _saved(root).select_columns([column]), _library("datasets")
    return data.cast_column(column, datasets.Image(decode=False)) if isinstance(data.features[column], datasets.Image) else data


def _train_split(root: Path) -> Path:
    """The folder of the data itself."""
    if not (root / "dataset_dict.json").is_file():
        return root
    splits = sorted(path.name for path in root.iterdir() if (path / "dataset_info.json").is_file())
    if TRAIN in splits or len(splits) == 1:
        return root / (TRAIN if TRAIN in splits else splits[0])
    raise DataError(f"{root} holds the splits {', '.join(splits) or 'none'}; give the folder of one as source.data.")


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"This data set needs {name.partition('.')[0]} ({error}): {ADVICE}.") from None
