"""Data laid out as the PixArt repositories have it: data_info.json with features beside it, and SA-1B's folders.

Facts: diffusion/data/datasets/{InternalData,InternalData_ms,SA}.py of PixArt-alpha and PixArt-sigma.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from .captions import captions_of_file, captions_of_row, check_fields
from .folder import inside, text_of
from .item import PICTURES, Caption, File, Item, Listing, StoredLatent

INFO, DATA, IMAGES = "data_info.json", "InternData", "InternImgs"
JSON_FOLDERS = (".", "partition", "partition_filter")
LONG_CAPTIONS = "sharegpt4v"
SIGMA_CAPTIONS = {"prompt": 0.5, LONG_CAPTIONS: 0.5}  # real_prompt_ratio of its configs


@dataclass(frozen=True)
class Family:
    """Where one of the two repositories keeps things."""

    widest: float  # height / width up to which its data set takes pictures
    states: Mapping[str, tuple[str, ...]]  # field of captions -> folders of their T5 states
    square: str  # folder of latents
    binned: str
    base_names: bool = False  # features of squares are named without the picture's folder, which others have in front


FAMILIES = {
    "alpha": Family(
        4.0, {"prompt": ("caption_feature_wmask", "caption_features")},
        "img_vae_features_{size}resolution/noflip", "img_vae_fatures_{size}_multiscale/ms",  # as it is spelt there
    ),
    "sigma": Family(
        4.5, {"prompt": ("caption_features_new", "caption_features"), LONG_CAPTIONS: ("sharegpt4v_caption_features_new",)},
        "img_sdxl_vae_features_{size}resolution_new", "img_sdxl_vae_features_{size}resolution_ms_new", base_names=True,
    ),
}  # fmt: skip
SA_STATES, SA_LATENTS = "caption_feature_wmask", "img_vae_feature/train_vae_{size}/noflip"


def info_files(root: Path) -> list[Path]:
    """The lists of pictures of a data_info.json layout, also if `root` is the folder above; empty if it is none."""
    for place in (root, root / DATA):
        for folder in JSON_FOLDERS:
            found = [place / folder / INFO] if folder == "." else sorted((place / folder).glob("*.json"))
            if found and found[0].is_file():
                return found
    return []


def is_sa(root: Path) -> bool:
    """Whether a folder is laid out as SA-1B is for PixArt-alpha."""
    return (root / "images").is_dir() and any((root / "partition").glob("*.txt"))


def read_info(files: list[Path], family: str, fields: Mapping[str, float] | None = None) -> Listing:
    """Every picture of data_info.json files; raises DataError for what can't be right. family: "alpha" or "sigma", whose names hold."""
    rules = FAMILIES[family]
    root = files[0].parent.parent if files[0].parent.name in JSON_FOLDERS else files[0].parent
    listing = Listing(f"data_info.json of {family}")
    known: set[str] = set()
    rows = [(f"{file}, picture {number},", row) for file in files for number, row in enumerate(_rows(file))]
    own_names = Counter(_stem(row.get("path")).rsplit("/", 1)[-1] for _, row in rows)
    for source, row in rows:
        known |= row.keys()
        item = _item(root, row, rules, fields or _fields(row, family), source, own_names)
        if item.size[0] / item.size[1] > rules.widest:
            reason = f"of height / width above {rules.widest}"
            listing.leave_out(reason)
        else:
            listing.items.append(item)
    check_fields(fields, known, files[0])
    return listing


def read_sa(root: Path) -> Listing:
    """Every picture that SA-1B's partition/*.txt name."""
    listing = Listing("SA-1B")
    for file in sorted((root / "partition").glob("*.txt")):
        for line in text_of(file).split("\n"):
            if not line.strip():
                continue
            name = inside(root / "images", line.strip(), str(file)).relative_to(root / "images").as_posix()
            picture, text = root / "images" / f"{name}.jpg", root / "captions" / f"{name}.txt"
            states = root / SA_STATES / f"{name}.npz"
            try:
                captions = captions_of_file(text) if text.is_file() else (Caption(""),) if states.is_file() else ()
            except DataError as error:
                listing.broken[name] = str(error)
                continue
            if states.is_file():  # of one caption, whatever the lines of the text
                captions = (Caption(" ".join(caption.text for caption in captions), states=states),)
            listing.items.append(Item(name, File(picture), captions, square=StoredLatent(root, SA_LATENTS, f"{name}.npy")))
    return listing


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} can't be read as JSON ({error}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} holds {type(rows).__name__}; expected a list of objects with path, width, height, ratio, prompt.")
    return rows


def _fields(row: Mapping[str, Any], family: str) -> Mapping[str, float]:
    """The fields that the reference draws from; an empty long caption, as its own tool writes it, leaves the short one."""
    return SIGMA_CAPTIONS if family == "sigma" and row.get(LONG_CAPTIONS) else {"prompt": 1.0}


def _stem(path: Any) -> str:
    """A picture's path without its suffix."""
    return str(path).rsplit(".", 1)[0] if str(path).lower().endswith(PICTURES) else str(path)


def _item(
    root: Path, row: Mapping[str, Any], rules: Family, fields: Mapping[str, float], source: str, own_names: Counter[str]
) -> Item:
    height, width = (row.get(side) for side in ("height", "width"))
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise DataError(f"{source} has height {height!r} and width {width!r}; expected whole numbers of pixels.")
    images = Path(str(root).replace(DATA, IMAGES))
    images = images if images.is_dir() else root  # pictures beside the list, in a folder of any name
    path = inside(images, row.get("path"), source)
    name = path.relative_to(images).as_posix()
    stem = _stem(name)
    with_folder, alone = "_".join(stem.rsplit("/", 1)), stem.rsplit("/", 1)[-1]
    names = [with_folder]
    if rules.base_names and own_names[alone] == 1:  # of two pictures with one name the file would be either's
        names.append(alone)
    captions: list[Caption] = []
    try:
        for field, weight in fields.items():
            states = _states(root, rules, field, names)
            captions += [caption._replace(states=states) for caption in captions_of_row(row, {field: weight})]
    except DataError as error:
        raise DataError(f"{source} {error}.") from None
    square = StoredLatent(root, rules.square, f"{names[-1]}.npy")
    binned = StoredLatent(root, rules.binned, f"{with_folder}.npy")
    return Item(name, File(path), tuple(captions), size=(height, width), square=square, binned=binned)


def _states(root: Path, rules: Family, field: str, names: list[str]) -> Path | None:
    """The npz of a caption, if it is there."""
    found = (root / folder / f"{name}.npz" for folder in rules.states.get(field, ()) for name in names)
    return next((path for path in found if path.is_file()), None)
