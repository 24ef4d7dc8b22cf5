"""Opens weight files and folders, and says in plain words what is wrong with one that won't open."""
from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..json_files import read_json, shard_files
from .hints import NOTE_KEY, Hints, hints_from_config, hints_from_note

WEIGHTS_NAME = "diffusion_pytorch_model"
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt")
_KNOWN_STARTS = (
    (b"GGUF", "a GGUF file", "load it with ComfyUI-GGUF's own loader nodes; here expected .safetensors or .pth"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull`, or download the file itself"),
    (b"<!DOCTYPE", "a web page", "the download failed or needs a login; download the file itself"),
    (b"<html", "a web page", "the download failed or needs a login; download the file itself"),
    (b"\x89HDF", "an HDF5 file", "expected .safetensors or .pth"),
)


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
    if path.name.endswith(".index.json") or path.name == "config.json":
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
        found = _weight_files(path)
        tensors: dict[str, Any] = {}
        for file in found:
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
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error}).") from error
    for magic, kind, advice in _KNOWN_STARTS:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: this is {kind}; {advice}.")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return ("safetensors", *_read_safetensors(path, start, size))
    if start.startswith((b"PK", b"\x80")):
        return "pth", *_read_pickle(path)
    raise CheckpointError(
        f"{path}: neither safetensors nor a PyTorch file (it begins with {start[:8]!r}); "
        "expected a PixArt transformer as .safetensors or .pth. If it should be one, download it again."
    )


def _read_safetensors(path: Path, start: bytes, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file: {size} bytes, its header alone would need {length + 8}; download it again."
        )
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        needed = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is damaged ({error}); download it again.") from error
    if size < needed:
        raise CheckpointError(f"{path}: truncated: {size} of {needed} bytes are there; download it again.")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again.") from error


def _read_pickle(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    try:
        mapped = zipfile.is_zipfile(path)
        loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "weights" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); download it again.") from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path}: holds Python objects beside tensors{f' ({named[1]})' if named else ''}, which could run code, "
            "so it was not loaded. Expected tensors only: get the .safetensors version, or, if you trust its "
            "origin, load it once elsewhere and save only its state_dict."
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise CheckpointError(
            f"{path}: truncated or not a PyTorch weight file ({_first_line(error)}); download it again."
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; expected a state dict.")
    return dict(loaded), loaded


def _unwrap(loaded: dict[str, Any], source: str, container: str, ema: bool, hints: Hints) -> RawCheckpoint:
    """Chooses the state dict in a training checkpoint: `state_dict`, or `state_dict_ema` on request."""
    inner = {name: dict(value) for name, value in loaded.items() if isinstance(value, Mapping) and _has_tensors(value)}
    notes: tuple[str, ...] = ()
    if ema and "state_dict_ema" not in inner:
        found = ", ".join(sorted(map(str, inner))) or "one plain state dict"
        raise CheckpointError(f"{source}: has no state_dict_ema (found: {found}); load it without ema.")
    if not inner:
        state, ema = {name: value for name, value in loaded.items() if name != NOTE_KEY}, hints.ema
    elif ema:
        state, notes = inner["state_dict_ema"], ("state_dict_ema was asked for.",)
    else:
        name = next((n for n in ("state_dict", "model", "module", "state_dict_ema") if n in inner), None)
        if name is None:
            raise CheckpointError(f"{source}: holds {', '.join(sorted(map(str, inner)))}; expected a `state_dict`.")
        state, ema = inner[name], hints.ema or name == "state_dict_ema"
        if name == "state_dict_ema":
            notes = ("only state_dict_ema is in the file: it is used.",)
        elif "state_dict_ema" in inner:
            notes = ("the file also holds state_dict_ema; ask for ema to use it.",)
    odd = [str(key) for key, value in state.items() if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_quantized)]
    if odd:
        raise CheckpointError(f"{source}: {len(odd)} tensors are sparse or packed by torch ({', '.join(odd[:5])}); save dense ones.")
    return RawCheckpoint(state, source, container, ema, hints, notes)


def _has_tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _read_folder(folder: Path, ema: bool) -> RawCheckpoint:
    """A diffusers pipeline or transformer folder, or a folder with exactly one weight file."""
    pipeline = folder if (folder / "transformer").is_dir() else None
    weights = folder / "transformer" if pipeline else folder
    config = read_json(weights / "config.json", required=False)
    files = _weight_files(weights)
    tensors: dict[str, Any] = {}
    extra: Mapping[str, Any] = {}
    for file in files:
        _, part, extra = _read_file(file)
        tensors.update(part)
    hints = hints_from_config(config, str(weights), pipeline or weights.parent) if config else hints_from_note(extra.get(NOTE_KEY))
    kind = f"folder, {len(files)} shards" if len(files) > 1 else "folder"
    return _unwrap(tensors, str(folder), f"diffusers {kind}" if config else kind, ema, hints)


def _weight_files(weights: Path) -> list[Path]:
    """The shards of a folder, or its one weight file."""
    indexes = sorted(weights.glob("*.index.json"))
    if indexes:
        return shard_files(indexes[0])
    found = sorted(f for f in weights.iterdir() if f.suffix in WEIGHT_SUFFIXES)
    preferred = [f for f in found if f.name.startswith(WEIGHTS_NAME)] or found
    preferred = [f for f in preferred if f.suffix in (".safetensors", ".sft")] or preferred
    if len(preferred) > 1:
        preferred = [f for f in preferred if f.stem == WEIGHTS_NAME] or preferred
    if len(preferred) != 1:
        names = ", ".join(f.name for f in preferred) or ", ".join(sorted(f.name for f in weights.iterdir())) or "nothing"
        raise CheckpointError(
            f"{weights}: found {names}; expected one weight file, {WEIGHTS_NAME}.safetensors (with config.json). "
            "Choose the file itself, or the folder of a PixArt pipeline or transformer."
        )
    return preferred


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
