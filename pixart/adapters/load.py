"""From a LoRA file or PEFT folder to layers with native names; nothing is fitted to a model yet."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints.read import read_checkpoint
from ..errors import CheckpointError
from ..json_files import read_json
from .foreign import no_adapter
from .layer import Layer, rank_of
from .names import TEXT, TRANSFORMER, Place, find_place, is_text, split_key, whole_key
from .settings import CONFIG_NAME, METADATA_KEY, Settings, settings_from_config, settings_from_metadata

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
# Why a key is not applied.
NOT_PIXART, OTHER_TEXT, UNKNOWN = "no layer of PixArt", "for another text encoder than T5", "of no supported kind"


@dataclass(frozen=True)
class Adapter:
    """Everything a file says: layers of the transformer and of T5, and the keys that are neither."""

    source: str
    layers: tuple[Layer, ...]
    total: int  # keys in the file
    left: Mapping[str, str] = field(default_factory=dict)  # key -> why it can't be applied


def load_adapter(path: str | Path) -> Adapter:
    """Reads LoRA, LoHa, LoKr, OFT, BOFT or DoRA from a file (.safetensors, or .pt weights only) or a PEFT folder.

    Raises CheckpointError naming the file, what was found and what to do; UnsupportedError for other PEFT methods.
    """
    path = Path(path)
    file, config = path, None
    if path.is_dir():
        file = next((path / name for name in WEIGHT_NAMES if (path / name).is_file()), None)
        if file is None or not (path / CONFIG_NAME).is_file():
            found = ", ".join(sorted(child.name for child in path.iterdir())) or "nothing"
            raise CheckpointError(f"{path}: found {found}; expected a PEFT folder, {CONFIG_NAME} with {WEIGHT_NAMES[0]}.")
    if file.name in WEIGHT_NAMES[:2] and (file.parent / CONFIG_NAME).is_file():
        config = read_json(file.parent / CONFIG_NAME)
    raw = read_checkpoint(file)
    if config is not None:
        settings = dict.fromkeys((TRANSFORMER, TEXT), settings_from_config(config, str(file.parent / CONFIG_NAME)))
    else:
        settings = settings_from_metadata(_metadata(file, raw.container).get(METADATA_KEY), str(file))
    return build_adapter(raw.state_dict, str(path), settings)


def _metadata(file: Path, container: str) -> Mapping[str, str]:
    if container != "safetensors":
        return {}
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata() or {}


def build_adapter(tensors: Mapping[str, Any], source: str, settings: Mapping[str, Settings] | None = None) -> Adapter:
    """Groups tensors into layers. settings: of TRANSFORMER and TEXT, where alpha is not among the tensors."""
    modules, left, problems = _group(tensors)
    if all(set(entries) <= {"set", "set_b"} for entries in modules.values()):
        raise CheckpointError(no_adapter(source, list(map(str, tensors))))
    layers = []
    for module, entries in modules.items():
        place = find_place(module)
        if place is None:
            left.update({key: OTHER_TEXT if is_text(module) else NOT_PIXART for key, _ in entries.values()})
            continue
        of_model = (settings or {}).get(place.model)
        layer = _layer(module, place, entries, of_model)
        layers.append(layer)
        problems += _problems(module, layer)
        if of_model is not None and of_model.dora and layer.rank and not layer.is_dora:
            problems.append(f"{module}: its settings say DoRA, but the magnitude is missing")
    problems += _twice(layers)
    if problems:
        raise CheckpointError(f"{source}: damaged, {len(problems)} problem(s); download it again:\n  " + "\n  ".join(problems))
    return Adapter(source, tuple(layers), len(tensors), left)


def _group(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], dict[str, str], list[str]]:
    """Module -> role -> (key, tensor); keys of no known algorithm; and roles that two keys claim, as of two adapters in a file."""
    modules: dict[str, dict[str, tuple[str, Tensor]]] = {}
    left: dict[str, str] = {}
    twice: list[str] = []
    for key, tensor in tensors.items():
        found = (split_key(str(key)) or whole_key(str(key))) if isinstance(tensor, Tensor) else None
        if found is None:
            left[str(key)] = UNKNOWN
            continue
        module, role = found
        first, _ = modules.setdefault(module, {}).setdefault(role, (key, tensor))
        if first != key:
            twice.append(f"{first} and {key} are the same matrix; expected one adapter in a file")
    strange = {key.rpartition(".")[0] for key in left}
    for module in [module for module, roles in modules.items() if set(roles) == {"alpha"} and module in strange]:
        left[modules.pop(module)["alpha"][0]] = UNKNOWN  # of an algorithm that isn't known
    return modules, left, twice


def _layer(module: str, place: Place, entries: Mapping[str, tuple[str, Tensor]], settings: Settings | None) -> Layer:
    tensors = {role: tensor for role, (_, tensor) in entries.items()}
    alpha, rank = tensors.pop("alpha", None), rank_of(tensors)
    if "oft_blocks" in tensors:
        scale = float(alpha.flatten()[0]) if alpha is not None and alpha.numel() else 0.0
    elif alpha is not None:
        scale = (float(alpha.flatten()[0]) if alpha.numel() else math.nan) / rank if rank else 1.0
    else:
        scale = settings.scale(module, rank) if settings else 1.0
    return Layer(place, tensors, scale, tuple(key for key, _ in entries.values()))


def _problems(module: str, layer: Layer) -> list[str]:
    """What makes a layer unusable by itself, whatever the model."""
    broken = [key for key in layer.tensors if not bool(torch.isfinite(layer.tensors[key].float()).all())]
    if broken:
        return [f"{module}: NaN or infinite values in {', '.join(broken)}"]
    empty = [f"{role} {tuple(tensor.shape)}" for role, tensor in layer.tensors.items() if not tensor.numel()]
    if empty:
        return [f"{module}: rank 0, or no values: {', '.join(empty)}; it would change nothing"]
    if not math.isfinite(layer.scale):
        return [f"{module}: alpha is no finite number"]
    if not layer.has_weight:
        return [] if layer.of_bias() is not None else [f"{module}: only {', '.join(layer.tensors) or 'alpha'} is there"]
    try:
        layer.shape()
    except KeyError as error:
        return [f"{module}: {error.args[0]} is missing"]
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in layer.tensors.items())
        return [f"{module}: its matrices don't fit each other ({shapes}): {str(error).splitlines()[0]}"]
    return []


def _twice(layers: list[Layer]) -> list[str]:
    """Weights that two sets of matrices change: which of them was meant can't be known."""
    keys: dict[Place, str] = {}
    return [
        f"{layer.keys[0]} and {keys[layer.place]} change the same weight"
        for layer in layers
        if keys.setdefault(layer.place, layer.keys[0]) != layer.keys[0]
    ]
