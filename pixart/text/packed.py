"""Quantized layers in files, as bitsandbytes and transformers write them: names, sizes, and checks on untrusted parts."""
from __future__ import annotations

import json
import re
from math import ceil, isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import TextEncoderError, UnsupportedError
from .names import FP4, INT8, NF4

if TYPE_CHECKING:
    from .files import StoredTensor

FORMAT_KEY, FORMAT = "pixart_quantization", 1  # in config.json of folders written here
WEIGHT, SCALES, STATE = "packed", "scales", "quant_state"
# part -> how its name goes on after the layer's: in files of bitsandbytes, and in a state dict of ours (CLIPSave)
PARTS = {
    WEIGHT: (r"packed",),
    SCALES: (r"SCB", r"scales"),
    "absmax": (r"weight\.absmax", r"absmax"),
    "quant_map": (r"weight\.quant_map", r"quant_map"),
    "nested_absmax": (r"weight\.nested_absmax", r"nested_absmax"),
    "nested_quant_map": (r"weight\.nested_quant_map", r"nested_quant_map"),
    STATE: (r"weight\.quant_state\.bitsandbytes__(?:nf4|fp4)", r"quant_state"),
}
_PATTERNS = {part: re.compile(rf"(.+?)\.(?:{'|'.join(names)})") for part, names in PARTS.items()}
_FORMAT_MARK = ".weight_format"  # of int8 layers; there is one layout only
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes knows
_NESTED = ("nested_blocksize", "nested_offset")
_STATE_KEYS = ("quant_type", "blocksize", "shape", *_NESTED)  # of bitsandbytes' state; the others name dtypes, which tensors show


def spellings(weight: str) -> tuple[str, str]:
    """The names under which a weight may lie in a file."""
    return weight, f"{weight.removesuffix('.weight')}.{WEIGHT}"


def split(
    stored: dict[str, StoredTensor], path: Path
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """(plain tensors, parts of each quantized layer)."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    plain: dict[str, StoredTensor] = {}
    for name, each in stored.items():
        found = next(((m[1], part) for part, pattern in _PATTERNS.items() if (m := pattern.fullmatch(name))), None)
        if found:
            layers.setdefault(found[0], {})[found[1]] = each
        elif not name.endswith(_FORMAT_MARK):
            plain[name] = each
    for layer, parts in layers.items():
        if WEIGHT not in parts:
            if f"{layer}.weight" not in plain:
                raise TextEncoderError(f"{path}: {layer} has {', '.join(parts)} but no weight. Download or write it again.")
            parts[WEIGHT] = plain.pop(f"{layer}.weight")
    return plain, layers


def precision_of(parts: dict[str, StoredTensor]) -> str | None:
    """int8, nf4, fp4, or None for a layer that is not quantized."""
    if STATE in parts:
        return read_state(parts[STATE].read(), parts[STATE].key)["quant_type"]
    return INT8 if SCALES in parts else None


def shape_of(parts: dict[str, StoredTensor], where: str) -> tuple[int, ...]:
    """(out, in) of the layer: 4-bit weights lie in one row."""
    if STATE in parts:
        return tuple(read_state(parts[STATE].read(), where)["shape"])
    return parts[WEIGHT].shape


def read_state(blob: Tensor, where: str) -> dict:
    """What bitsandbytes packs into a tensor as JSON; raises TextEncoderError unless all of it is as expected."""
    try:
        found = json.loads(bytes(blob.cpu().to(torch.uint8).tolist()))
        state = {name: found[name] for name in _STATE_KEYS if name in found}
        sound = state["quant_type"] in (NF4, FP4) and _is_block(state["blocksize"])
        sound = sound and len(state["shape"]) == 2 and all(type(n) is int and n > 0 for n in state["shape"])
        if any(name in state for name in _NESTED):
            offset = state["nested_offset"]
            sound = sound and _is_block(state["nested_blocksize"]) and isinstance(offset, float) and isfinite(offset)
    except (ValueError, KeyError, TypeError, RuntimeError):  # RecursionError is a RuntimeError
        sound = False
    if not sound:
        raise TextEncoderError(
            f"{where}: its 4-bit state is damaged or of another version; expected bitsandbytes' nf4 or fp4. Quantize the "
            "original again: python -m pixart quantize."
        )
    return state


def _is_block(size: object) -> bool:
    return type(size) is int and size in _BLOCK_SIZES


def check_parts(parts: dict[str, Tensor], shape: tuple[int, int], where: str) -> None:
    """Raises TextEncoderError unless the parts fit the layer: bitsandbytes' native code trusts them blindly."""
    wanted: dict[str, tuple[int, torch.dtype | None]]  # None: any float
    if STATE in parts:
        state = read_state(parts[STATE], where)
        if tuple(state["shape"]) != tuple(shape):
            raise TextEncoderError(f"{where} has shape {tuple(state['shape'])}, expected {tuple(shape)}.")
        blocks = ceil(prod(shape) / state["blocksize"])
        wanted = {WEIGHT: (ceil(prod(shape) / 2), torch.uint8), "quant_map": (16, torch.float32)}
        if "nested_blocksize" in state:
            wanted |= {"absmax": (blocks, torch.uint8), "nested_quant_map": (256, torch.float32)}
            wanted["nested_absmax"] = (ceil(blocks / state["nested_blocksize"]), torch.float32)
        else:
            wanted["absmax"] = (blocks, torch.float32)
    elif SCALES in parts:
        wanted = {WEIGHT: (prod(shape), torch.int8), SCALES: (shape[0], torch.float32)}
    else:
        wanted = {WEIGHT: (prod(shape), None)}
    problems = [f"{part} doesn't belong to it" for part in parts if part not in (*wanted, STATE)]
    for part, (count, dtype) in wanted.items():
        found = parts.get(part)
        fits = found is not None and (found.dtype == dtype if dtype else found.is_floating_point()) and found.numel() == count
        if not fits:
            has = "is missing" if found is None else f"has {found.numel()} values of {found.dtype}"
            problems.append(f"{part} {has}; expected {count} of {dtype or 'a float dtype'}")
    if problems:
        raise TextEncoderError(
            f"{where}: {', '.join(problems)}. The file is damaged or of another version: quantize the original again."
        )


def check_settings(settings: dict, path: Path) -> None:
    """Raises UnsupportedError for a config.json that names another quantization, or one of a later version."""
    version = settings.get(FORMAT_KEY, FORMAT)
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise UnsupportedError(
            f"{path} was quantized in format {version!r}; this version reads up to {FORMAT}. Update the pack, or quantize "
            "the original again: python -m pixart quantize."
        )
    method = settings.get("quantization_config")
    if method is None:
        return
    name = method.get("quant_method") if isinstance(method, dict) else method
    if name != "bitsandbytes":
        raise UnsupportedError(
            f"{path} is quantized by {name}; expected bitsandbytes (int8, nf4, fp4), or the original fp32, bf16 or fp16."
        )
