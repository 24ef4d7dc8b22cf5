"""Opens weight files and folders, and says in plain words what is wrong with one that won't open."""
from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, PixArtError
from ..json_files import read_json
from .content import SAFETENSORS, content_of, reading_error
from .foreign import PICKLED_BY
from .hints import NOTE_KEY, Hints, hints_from_config, hints_from_note, with_note
from .keys import find_prefixes
from .shards import WEIGHTS_NAME, is_index, weight_files

# Names of the weights in a checkpoint that holds several, the first wins; "" are those that lie beside the others.
WEIGHT_NAMES = (
    "state_dict", "model", "model_state_dict", "module", "", "params", "net", "network", "transformer", "dit", "generator", "student",
)  # fmt: skip
LAST_NAMES = ("teacher", "fake", "critic", "discriminator", "real", "guidance", "optimizer")  # never chosen beside another
ALPHA = ".alpha"  # of an adapter's layer: a number that counts
DEEPEST = 3  # dicts within dicts


@dataclass(frozen=True)
class RawCheckpoint:
    """Tensors as they lie in the file, and what the file says beside them."""

    state_dict: dict[str, Tensor]
    source: str
    container: str
    ema: bool = False
    hints: Hints = field(default_factory=Hints)
    notes: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, ema: bool = False) -> RawCheckpoint:
    """Opens a .pth (weights only), .safetensors, or a diffusers folder (pipeline or transformer).

    ema: take `state_dict_ema` of a .pth. Tensors stay mapped to the file where the format allows.
    Raises CheckpointError naming the file, what was found, and what to do.
    """
    path = Path(path)
    if path.name == "config.json" or is_index(path):
        path = path.parent
    if path.is_dir():
        return _read_folder(path, ema)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check the path.")
    container, tensors, extra = _read_file(path)
    return _unwrap(tensors, str(path), container, ema, _hints_of_file(path, extra))


def read_tensors(path: str | Path) -> RawCheckpoint:
    """Tensors of a file, or of a folder with one; unlike `read_checkpoint` it asks no config.json what they are."""
    path = Path(path)
    if path.is_dir():
        tensors: dict[str, Any] = {}
        for file in weight_files(path)[0]:
            tensors.update(_read_file(file)[1])
        return _unwrap(tensors, str(path), "folder", False, Hints())
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check the path.")
    container, tensors, _ = _read_file(path)
    return _unwrap(tensors, str(path), container, False, Hints())


def _hints_of_file(path: Path, extra: Mapping[str, Any]) -> Hints:
    """Hints from a note in the file, else from a diffusers config.json beside it."""
    hints = hints_from_note(extra.get(NOTE_KEY))
    beside = path.parent / "config.json"
    if hints == Hints() and path.name.startswith(WEIGHTS_NAME) and beside.is_file():
        hints = hints_from_config(read_json(beside), str(beside), path.parent.parent)
    return hints


def _read_file(path: Path) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    if content_of(path) == SAFETENSORS:
        return ("safetensors", *_read_safetensors(path))
    return "pth", *_read_pickle(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, RuntimeError, OSError, MemoryError) as error:
        raise reading_error(path, error, damage="not a readable safetensors file") from error


def safetensors_header(path: Path, error: type[PixArtError] = CheckpointError) -> tuple[dict[str, Any], int]:
    """Key -> dtype, shape and data_offsets, and where in the file the data begin; raises `error` unless the file is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise error(
                f"{path}: truncated or not a safetensors file: {size} bytes, its header alone would need {length + 8}; download it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as reason:
        raise error(f"{path}: its safetensors header is damaged ({reason}); download it again.") from reason
    if size < needed:
        raise error(f"{path}: truncated: {size} of {needed} bytes are there; download it again.")
    return header, 8 + length


def _read_pickle(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    loaded = load_pickle(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected a state dict.")
    return dict(loaded), loaded


def load_pickle(path: Path, error: type[PixArtError] = CheckpointError) -> Any:
    """What a PyTorch file holds: tensors and plain values only. Raises `error`."""
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as reason:
        if "weights" not in str(reason).lower() and "unsupported" not in str(reason).lower():
            raise reading_error(path, reason, error, "truncated or damaged") from reason
        named = re.search(r"GLOBAL ([\w.]+)", str(reason))
        raise error(_unsafe(path, named[1] if named else "")) from reason
    except Exception as reason:  # damaged bytes make the unpickler raise nearly anything
        raise reading_error(path, reason, error, "truncated or not a PyTorch weight file") from reason


def _unsafe(path: Path, name: str) -> str:
    """What to say of a pickle that names Python objects; none is ever made."""
    library = next((library for library in PICKLED_BY if name.startswith(library)), None)
    if library:
        return f"{path}: weights quantized by {PICKLED_BY[library]} ({name}), which can't be read here; get unquantized ones, or fp8."
    return (
        f"{path}: a PyTorch file that holds Python objects beside tensors{f' ({name})' if name else ''}, which could run code, "
        "so it was not loaded. Expected tensors only: get the .safetensors version, or ask whoever made it to save its state_dict alone."
    )


def _unwrap(loaded: dict[str, Any], source: str, container: str, ema: bool, hints: Hints) -> RawCheckpoint:
    """Chooses the weights in a training checkpoint, and notes what else it holds."""
    found = find_weights(loaded, find_prefixes)
    averages = [name for name in found if "ema" in name.lower()]
    notes: tuple[str, ...] = ()
    if ema and not averages:
        others = ", ".join(sorted(name for name in found if name)) or "one plain state dict"
        raise CheckpointError(f"{source}: has no state_dict_ema (found: {others}); load it without ema.")
    if not found:
        return RawCheckpoint(dict(loaded), source, container, hints.ema, hints)
    name = min(averages if ema else found, key=rank_of_weights)
    if ema:
        notes = (f"{name} was asked for.",)
    elif name in averages:
        notes = (f"only {name} is in the file: it is used.",)
    elif averages:
        notes = (f"the file also holds {', '.join(averages)}; ask for ema to use it.",)
    others = [other for other in found if other not in (name, *averages)]
    if others:
        notes += (f"{name or 'the outermost weights'} is used; the file also holds {', '.join(map(repr, others))}.",)
    state = found[name]
    odd = [str(key) for key, value in state.items() if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_quantized)]
    if odd:
        raise CheckpointError(f"{source}: {len(odd)} tensors are sparse or packed by torch ({', '.join(odd[:5])}); save dense ones.")
    return RawCheckpoint(state, source, container, hints.ema or name in averages, hints, notes)


def find_weights(loaded: Mapping[Any, Any], holds_model: Callable[[Iterable[str]], object]) -> dict[str, dict[str, Any]]:
    """State dicts in a training checkpoint by the names that lead to them; where some have the model's keys, those only."""
    found = dict(_candidates(loaded))
    return {name: state for name, state in found.items() if holds_model(map(str, state))} or found


def _candidates(loaded: Mapping[Any, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dict with tensors in it, by the names that lead to it; plain numbers and texts beside tensors are left out."""
    inner = {key: value for key, value in loaded.items() if isinstance(value, Mapping)}
    if any(isinstance(value, Tensor) for value in loaded.values()):
        plain = (int, float, str, bytes, bool, type(None), Mapping) if inner or depth else (int, float, bool, type(None))
        state = {key: value for key, value in loaded.items() if not isinstance(value, plain) or str(key).endswith(ALPHA)}
        yield name, {key: value for key, value in state.items() if key != NOTE_KEY}
    for key, value in inner.items() if depth < DEEPEST else ():
        yield from _candidates(value, f"{name}.{key}" if name else str(key), depth + 1)


def rank_of_weights(name: str) -> tuple[bool, bool, int, int]:
    """The smallest is chosen."""
    parts = name.lower().split(".")
    last = any(part.startswith(LAST_NAMES) for part in parts)
    known = WEIGHT_NAMES.index(name) if name in WEIGHT_NAMES else len(WEIGHT_NAMES)
    return last, "ema" in name.lower(), known, len(parts)


def _read_folder(folder: Path, ema: bool) -> RawCheckpoint:
    """A diffusers pipeline or transformer folder, or a folder with exactly one weight file."""
    pipeline = folder if (folder / "transformer").is_dir() else None
    weights = folder / "transformer" if pipeline else folder
    config = read_json(weights / "config.json", required=False)
    files, note = weight_files(weights)
    tensors: dict[str, Any] = {}
    extra: Mapping[str, Any] = {}
    for file in files:
        _, part, extra = _read_file(file)
        tensors.update(part)
    hints = hints_from_note(extra.get(NOTE_KEY))
    if config:
        hints = with_note(hints_from_config(config, str(weights), pipeline or weights.parent), hints)
    kind = f"folder, {len(files)} shards" if len(files) > 1 else "folder"
    raw = _unwrap(tensors, str(folder), f"diffusers {kind}" if config else kind, ema, hints)
    return replace(raw, notes=(*raw.notes, *note))
