"""From a file to a checked state dict, and to a transformer: all of it, or an error."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TransformerConfig, get_variant
from ..errors import CheckpointError, UnsupportedError
from ..model import PixArtTransformer
from .detect import AUTO, Detection, Origin, examine
from .hints import Hints
from .keys import POSITION_KEY, gather_native, is_known_prefix, key_layout, native_target
from .notes import take_note
from .parts import LISTED, QUANTIZATION_SUFFIXES, shard_advice, some_names, take_transformer
from .read import RawCheckpoint, read_checkpoint

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
COMPUTING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prepared:
    """Native tensors that fit `detection.config` exactly, and quantization extras kept apart."""

    state_dict: dict[str, Tensor]
    detection: Detection
    extras: dict[str, Tensor] = field(default_factory=dict)


def prepare(
    state_dict: Mapping[str, Tensor],
    *,
    source: str,
    variant: str = AUTO,
    ema: bool = False,
    passthrough_suffixes: tuple[str, ...] = (),
    container: str = "state dict",
    hints: Hints = Hints(),
    notes: tuple[str, ...] = (),
    sampled: int | None = None,
) -> Prepared:
    """Strips the prefix, converts, detects, and checks every key, shape and value of a state dict.

    source: named in messages. passthrough_suffixes: keys that end so are quantization extras; they are
    returned in `extras` under native names, and the shapes of the weights they belong to are checked
    in their first axis only. sampled: how many values of each tensor are looked at (default: all). The given mapping is
    not changed. Raises one CheckpointError with all problems.
    """
    if variant != AUTO:
        get_variant(variant)
    tensors, prefix, dropped = take_transformer(state_dict, source)
    hints = take_note(tensors, hints)
    layout = key_layout(tensors)
    problems: list[str] = []
    extras = _take_extras(tensors, layout, passthrough_suffixes, problems)
    unjoined: dict[str, str] = {}
    if layout == "diffusers":
        tensors, unjoined = gather_native(tensors)
    if prefix and not is_known_prefix(prefix):
        notes += (f"the keys have an unusual prefix, {prefix!r}; it was removed.",)
    if dropped:
        notes += (f"left out, as it is not the transformer: {some_names(dropped)}.",)
    if POSITION_KEY in tensors:
        notes += ("the stored pos_embed is not loaded; positions are computed.",)
    origin = Origin(source, container, layout, prefix, ema, notes)
    detection, contradictions = examine(tensors, variant, origin=origin, hints=hints)
    tensors.pop(POSITION_KEY, None)
    quantized = {key.rpartition(".")[0] for key in extras}
    problems += contradictions + list(unjoined.values())
    problems += _shape_problems(tensors, detection.config, quantized, unjoined)
    if any(problem.startswith("missing ") for problem in problems):  # what is missing may have another name
        problems += [f"unknown key {name}" for name in dropped[:LISTED]]
    problems += value_problems(tensors, quantized, sampled)
    if problems:
        raise CheckpointError(_report(source, problems, detection, damaged=len(problems) > len(contradictions)))
    return Prepared(tensors, detection, extras)


def load_transformer(
    path: str | Path,
    variant: str = AUTO,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> PixArtTransformer:
    """A PixArt transformer from any of its formats, in eval mode, without gradients.

    dtype: default is the file's own (bfloat16 for fp8 files, which plain layers can't compute in).
    The result has `.detection`, the report. Raises CheckpointError, or UnsupportedError for a dtype
    other than float32, bfloat16 and float16; never a partly loaded model.
    """
    if dtype is not None and dtype not in COMPUTING_DTYPES:
        raise UnsupportedError(
            f"dtype is {dtype}, in which plain layers can't compute; expected torch.float32, torch.bfloat16 or torch.float16."
        )
    prepared = prepare_file(path, variant, ema)
    stored = getattr(torch, prepared.detection.dtype)
    target = dtype or (stored if stored.itemsize > 1 else torch.bfloat16)
    model = PixArtTransformer(prepared.detection.config, dtype=target, device="meta")
    tensors = {key: tensor.to(target) for key, tensor in prepared.state_dict.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval().to(device)
    model.detection = prepared.detection
    return model


def prepare_file(path: str | Path, variant: str = AUTO, ema: bool = False, told: Mapping[str, Any] | None = None) -> Prepared:
    """`read_checkpoint` and `prepare` in one step. told: fields of Hints that the caller knows better than the file."""
    raw: RawCheckpoint = read_checkpoint(path, ema)
    hints = replace(raw.hints, **told) if told else raw.hints
    return prepare(
        raw.state_dict, source=raw.source, variant=variant, ema=raw.ema, container=raw.container, hints=hints, notes=raw.notes
    )


def inspect_file(path: str | Path, variant: str = AUTO, ema: bool = False) -> Detection:
    """The detection report of a file whose weights were fully checked; raises CheckpointError."""
    return prepare_file(path, variant, ema).detection


def _take_extras(tensors: dict[str, Tensor], layout: str, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Tensor]:
    """Moves quantization extras out of `tensors`, under native names."""
    extras: dict[str, Tensor] = {}
    unread: list[str] = []
    for key in [key for key in tensors if key.endswith(QUANTIZATION_SUFFIXES + suffixes)]:
        if not key.endswith(suffixes or ("\0",)):
            unread.append(key)
            tensors.pop(key)
            continue
        target = native_target(key) if layout == "diffusers" else None
        if target is not None and target.parts > 1:
            problems.append(f"{key}: a scale of its own for one part of {target.key}; quantize a file with original keys instead")
        extras[target.key if target else key] = tensors.pop(key)
    if unread:
        which = f"{unread[0]} and {len(unread) - 1} more" if len(unread) > 1 else unread[0]
        problems.append(f"{which}: scaled quantization is not supported here; use PixArtModelLoader, or an unquantized file (fp16, bf16)")
    return extras


def _shape_problems(
    tensors: Mapping[str, Tensor], config: TransformerConfig, quantized: set[str], unjoined: Mapping[str, str]
) -> list[str]:
    """Missing and unknown keys and wrong shapes, against an empty model of that config."""
    empty = PixArtTransformer(config, device="meta")
    expected = {key: tuple(value.shape) for key, value in empty.state_dict().items()}
    problems = [f"missing {key}" for key in group_keys(k for k in expected if k not in tensors and k not in unjoined)]
    problems += [f"unknown key {key}" for key in group_keys(k for k in tensors if k not in expected)]
    for key, shape in expected.items():
        if key not in tensors:
            continue
        found = tuple(tensors[key].shape)
        packed = key.rpartition(".")[0] in quantized and found[:1] == shape[:1]
        if found != shape and not packed:
            problems.append(f"{key} has shape {found}, expected {shape}")
    return problems


def group_keys(keys: Iterable[str]) -> list[str]:
    """Keys with equal names in several blocks on one line: `blocks.{0-27}.attn.qkv.weight`."""
    groups: dict[str, list[int]] = {}
    for key in keys:
        match = re.match(r"(.*?\b(?:blocks|controlnet)\.)(\d+)(\..+)$", key)
        groups.setdefault(f"{match[1]}{{}}{match[3]}" if match else key.replace("{", "{{"), []).append(int(match[2]) if match else -1)
    return [
        pattern.replace("{}", str(numbers[0]) if len(numbers) == 1 else "{" + _ranges(numbers) + "}")
        for pattern, numbers in groups.items()
    ]


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def tensor_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Keys, shapes and values of a module's weights that are wrong; for small networks, whose keys needn't be grouped."""
    problems = [f"missing {key}" for key in expected if key not in tensors]
    problems += [f"unknown {key}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    return problems + value_problems(tensors, quantized=set())


def value_problems(tensors: Mapping[str, Tensor], quantized: set[str], sampled: int | None = None) -> list[str]:
    """Keys with NaN or infinite values, or no floating-point numbers at all. min and max carry both and need no mask as large."""
    problems = []
    for key, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.numel():
            continue  # a host's quantized tensor: only its shape is ours to check
        if not tensor.is_floating_point() and key.rpartition(".")[0] not in quantized:
            problems.append(f"{key} holds {tensor.dtype}; expected floating-point weights")
        tensor = tensor if sampled is None else tensor.flatten()[:sampled]
        if tensor.dtype in FP8_DTYPES:
            tensor = tensor.float()  # fp8 has no aminmax; one weight at a time
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            continue
        low, high = torch.aminmax(tensor.detach())
        if not bool(torch.isfinite(torch.stack([low, high])).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(f"{key} has {bad} NaN or infinite values of {tensor.numel()}")
    return problems


def _report(source: str, problems: list[str], detection: Detection, damaged: bool) -> str:
    if not damaged:
        return f"{source}: the weights contradict what was given:\n  " + "\n  ".join(problems)
    c = detection.config
    return (
        f"{source}: not a complete, sound PixArt transformer ({len(problems)} problem(s)); expected depth {c.depth}, "
        f"hidden {c.hidden_size}, captions {c.caption_channels} wide, as the rest of the file has."
        f"{shard_advice(source) or ' Download or convert it again:'}\n  " + "\n  ".join(problems)
    )
