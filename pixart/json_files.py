"""JSON files beside weights: configs, and the indexes that name shards."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError, PixArtError

LARGEST = 1_000_000  # beyond this a size or scale is no measure of a model but damage


def read_json(path: Path, *, required: bool = True, error: type[PixArtError] = CheckpointError) -> dict[str, Any]:
    """A JSON object; an absent file is {} unless required. Raises `error`."""
    if not path.is_file():
        if required:
            raise error(f"{path}: no such file; expected a JSON file of a diffusers folder.")
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as reason:
        raise error(f"{path}: not readable as JSON ({reason}); download it again.") from reason
    if not isinstance(values, dict):
        raise error(f"{path}: holds a {type(values).__name__}; expected a JSON object.")
    return values


def shard_files(index: Path, *, error: type[PixArtError] = CheckpointError) -> list[Path]:
    """The weight files that an index names, all of them there and in its folder. Raises `error`."""
    weight_map = read_json(index, error=error).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise error(f"{index}: has no weight_map; download it again.")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise error(f"{index}: names shards outside its folder: {', '.join(outside)}; download it again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise error(f"{index.parent}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}; download them too.")
    return [index.parent / name for name in names]


def is_count(value: Any) -> bool:
    """A whole number above 0; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def is_number(value: Any) -> bool:
    """A number that later arithmetic can't overflow; NaN compares false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_measure(value: Any) -> bool:
    """A number above 0."""
    return is_number(value) and value >= 1 / LARGEST


def shown(value: Any) -> str:
    """A value as messages show it: as it stands in the file, and not too long."""
    found = json.dumps(value)
    return found if len(found) <= 40 else found[:37] + "..."
