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
from ..errors import CheckpointError, UnsupportedError
from ..json_files import read_json
from .foreign import name_method, no_adapter
from .layer import Layer
from .matrices import is_nothing, rank_of
from .names import BOOKKEEPING, TEXT, TRANSFORMER, Place, find_place, is_bookkeeping, is_text, split_key, without_effect
from .rotation import Rotation, generator_norm, rows_of
from .settings import CONFIG_NAME, METADATA_KEY, Settings, settings_from_config, settings_from_metadata

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
# Why a key is not applied.
NOT_PIXART, OTHER_TEXT, UNKNOWN = "no layer of PixArt", "for another text encoder than T5", "of no supported kind"
NOTHING = "for layers that this model doesn't have, all zero"
CONVOLUTIONS = ("x_embedder.proj", "attn.sr")  # layers of PixArt with kernels
WHOLE = ("whole", "whole_bias")  # what whole checkpoints have too
Entries = Mapping[str, tuple[str, Tensor]]  # role -> key in the file, tensor


@dataclass(frozen=True)
class Adapter:
    """Everything a file says: layers of the transformer and of T5, and the keys that are neither."""

    source: str
    layers: tuple[Layer, ...]
    total: int  # keys in the file
    unfit: Mapping[str, str] = field(default_factory=dict)  # key -> why it can't be applied
    left: Mapping[str, str] = field(default_factory=dict)  # key -> why nothing is lost without it


def load_adapter(path: str | Path) -> Adapter:
    """Reads an adapter of any of `layer.METHODS` from a file (.safetensors, or .pt weights only) or a PEFT folder.

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
    modules, unfit, left, problems = _group(tensors)
    if not settings and all(split_key(key) is None or split_key(key)[1] in WHOLE for key in map(str, tensors)):
        raise CheckpointError(no_adapter(source, list(map(str, tensors))))
    layers, unclear = [], []
    for module, entries in modules.items():
        place = find_place(module)
        if place is None:
            found = dict.fromkeys((key for key, _ in entries.values()), OTHER_TEXT if is_text(module) else NOT_PIXART)
            nothing = is_nothing({role: tensor for role, (_, tensor) in entries.items()})
            (left if nothing else unfit).update(dict.fromkeys(found, NOTHING) if nothing else found)
            continue
        of_model = (settings or {}).get(place.model)
        layer = _layer(module, place, entries, of_model)
        layers.append(layer)
        unclear += _unclear(module, layer, entries, of_model)
        problems += _problems(module, layer, of_model)
    problems += _twice(layers)
    if unclear:
        raise UnsupportedError(
            f"{source}: what {len(unclear)} layer(s) mean is not clear, so nothing was applied:\n  " + "\n  ".join(unclear[:5]) + "\n"
            "Merge it with the program that trained it, or save it again from there."
        )
    if problems:
        raise CheckpointError(f"{source}: damaged, {len(problems)} problem(s); download it again:\n  " + "\n  ".join(problems))
    return Adapter(source, tuple(layers), len(tensors), unfit, left)


def _group(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], dict[str, str], dict[str, str], list[str]]:
    """Module -> role -> (key, tensor); keys of no known method; keys without effect; and roles that two keys claim.

    PEFT stores the biases of layers that it saves whole twice: copies are one.
    """
    modules: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unfit: dict[str, str] = {}
    left: dict[str, str] = {}
    twice: list[str] = []
    for key, tensor in tensors.items():
        key = str(key)
        if without_effect(key):
            left[key] = without_effect(key)
            continue
        if isinstance(tensor, (int, float)) and not isinstance(tensor, bool):
            tensor = torch.tensor(float(tensor))
        method = name_method(key)
        found = split_key(key) if isinstance(tensor, Tensor) and not method else None
        if found is None and not method and is_bookkeeping(key, tensor.numel() if isinstance(tensor, Tensor) else None):
            left[key] = BOOKKEEPING
            continue
        if found is None:
            unfit[key] = f"of {method}, which is not supported" if method else UNKNOWN
            continue
        module, role = found
        first, known = modules.setdefault(module, {}).setdefault(role, (key, tensor))
        if first != key and not _is_copy(tensor, known):
            twice.append(f"{first} and {key} are the same matrix; expected one adapter in a file")
    strange = {key.rpartition(".")[0]: reason for key, reason in unfit.items()}
    strange |= {module.rpartition(".")[0]: reason for module, reason in strange.items()}
    for module in [module for module, roles in modules.items() if set(roles) == {"alpha"} and module in strange]:
        unfit[modules.pop(module)["alpha"][0]] = strange[module]  # beside matrices of a method that isn't known
    return modules, unfit, left, twice


def _is_copy(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(tensor.float(), other.float())


def _layer(module: str, place: Place, entries: Entries, settings: Settings | None) -> Layer:
    tensors = {role: tensor for role, (_, tensor) in entries.items()}
    keys = tuple(key for key, _ in entries.values())
    alpha, rank = tensors.pop("alpha", None), rank_of(tensors)
    number = None if alpha is None else _alpha(alpha)
    if number is not None:
        scale = number / rank if rank else number if not math.isfinite(number) else 1.0
    else:
        scale = settings.scale(module, rank) if settings else 1.0
    if "on_input" in tensors and "whole" in tensors:  # LyCORIS' (IA)^3
        on_input, change = bool(tensors.pop("on_input").any()), tensors.pop("whole").float().flatten()
        tensors["ia3_weight"] = 1 + (change[None] if on_input else change[:, None])
    rotation = settings.rotation if settings else Rotation()
    if "set" in tensors:
        tensors["whole"] = tensors.pop("set")
    if number and "oft_blocks" in tensors and tensors["oft_blocks"].ndim in (3, 4):
        rotation = Rotation(number if _is_norm(module, tensors["oft_blocks"]) else number * rows_of(tensors["oft_blocks"]))
    return Layer(place, tensors, scale, keys, rotation)


def _alpha(alpha: Tensor) -> float:
    return float(alpha.flatten()[0]) if alpha.numel() else math.nan


def _is_norm(module: str, blocks: Tensor) -> bool:
    """Whether alpha of OFT bounds the norm itself, as ComfyUI's trainer means it, and not the norm for each row, as LyCORIS and kohya do.

    ComfyUI's trainer writes names with dots; LyCORIS and kohya write names without.
    """
    return "." in module and blocks.ndim == 3


def _unclear(module: str, layer: Layer, entries: Entries, settings: Settings | None) -> list[str]:
    """Layers that can be read in two ways."""
    if "oft_R" in layer.tensors and settings is None:
        return [f"{module}: OFT of PEFT or OneTrainer without its {CONFIG_NAME}, which tells how it is made; expected both in one folder"]
    if "oft_R" in layer.tensors and layer.place.module.endswith(CONVOLUTIONS):
        return [f"{module}: OFT of PEFT on a convolution, where PEFT itself draws one picture while it trains and another when merged"]
    packed = [f"{role} {t.dtype}" for role, t in layer.tensors.items() if role != "reshape_weight" and not t.is_floating_point()]
    if packed:
        return [f"{module}: stored as integers ({', '.join(packed)}); expected floating-point numbers"]
    blocks = layer.tensors.get("oft_blocks")
    if blocks is None or "alpha" not in entries or not _is_norm(module, blocks) or blocks.shape[-1] <= blocks.shape[0]:
        return []
    alpha, norm = _alpha(entries["alpha"][1]), generator_norm(blocks)
    if not 0 < alpha < norm:
        return []
    return [
        f"{module}: OFT whose alpha of {alpha:g} limits either the whole norm, here {norm:.3g}, as in ComfyUI's trainer, or the norm per "
        f"row, as in LyCORIS and kohya. ComfyUI's trainer never makes {blocks.shape[0]} blocks of {blocks.shape[-1]} rows, the others "
        "never use such names"
    ]


def _problems(module: str, layer: Layer, settings: Settings | None) -> list[str]:
    """What makes a layer unusable by itself, whatever the model."""
    broken = [role for role, tensor in layer.tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if broken:
        return [f"{module}: NaN or infinite values in {', '.join(broken)}"]
    empty = [f"{role} {tuple(tensor.shape)}" for role, tensor in layer.tensors.items() if not tensor.numel()]
    if empty:
        return [f"{module}: rank 0, or no values: {', '.join(empty)}; it would change nothing"]
    if not math.isfinite(layer.scale):
        return [f"{module}: alpha is not a finite number"]
    if settings is not None and settings.dora and layer.rank and not layer.is_dora:
        return [f"{module}: its settings say DoRA, but the magnitude is missing"]
    if not layer.has_weight and not layer.has_bias:
        return [f"{module}: only {', '.join(layer.tensors) or 'alpha'} is there"]
    if len(layer.methods) > 1:
        return [f"{module}: matrices of {' and '.join(layer.methods)} together; expected one adapter in a file"]
    try:
        if layer.is_matrices:
            layer.shape()
    except KeyError as error:
        return [f"{module}: {error.args[0]} is missing"]
    except (RuntimeError, IndexError) as error:
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
