"""Which layout a data set has, told by the files that are there."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import DataError
from .folder import read_folder, visible_files
from .item import PICTURES, Listing
from .reference import info_files, is_sa, read_info, read_sa
from .tables import read_parquet, read_saved, read_tars

EXPECTED = (
    "a folder of pictures with captions in name.txt or metadata.jsonl, a folder with data_info.json, SA-1B's, one saved by "
    "Hugging Face's datasets, parquet files or tar shards"
)


def read_place(place: str | Path, family: str, fields: Mapping[str, float] | None = None) -> Listing:
    """The pictures of a data set in any known layout, none of them read; raises DataError.

    family: "alpha" or "sigma", whose names of features hold. fields: of captions, with weights.
    """
    root = Path(place).expanduser().absolute()
    if not root.exists():
        raise DataError(f"{root} does not exist; expected {EXPECTED}.")
    listing = _read(root, family, fields)
    if not listing.items and not listing.broken:
        left_out = "".join(f"; left out: {count} {why}" for why, count in listing.left_out.items())
        raise DataError(f"{root} ({listing.layout}) holds no picture{left_out}; expected {EXPECTED}.")
    return listing


def _read(root: Path, family: str, fields: Mapping[str, float] | None) -> Listing:
    if root.is_file():
        if root.suffix == ".json":
            return read_info([root], family, fields)
        if root.suffix not in TABLES:
            raise DataError(f"{root} is a file; expected {EXPECTED}.")
        return TABLES[root.suffix]([root], fields)
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return read_saved(root, fields)
    if is_sa(root):
        return read_sa(root)
    if found := info_files(root):
        return read_info(found, family, fields)
    files = visible_files(root)
    tables = {suffix: [path for path in files if path.suffix == suffix] for suffix in TABLES}
    if not any(path.suffix.lower() in PICTURES for path in files):
        for suffix, found in tables.items():
            if found:
                return TABLES[suffix](found, fields)
    listing = read_folder(root, fields)
    for suffix, found in tables.items():
        listing.leave_out(f"{suffix} files, since there are loose pictures beside them", len(found))
    return listing


TABLES = {".parquet": read_parquet, ".tar": read_tars}
