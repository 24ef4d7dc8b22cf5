"""A note among the weights: what a program that saves tensors alone would lose, such as KV compression without weights."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .detect import AUTO, Detection, Origin, examine
from .hints import VAE_OF_SCALE, Hints, hints_from_note

NOTE_TENSOR = "pixart_note"  # bytes of JSON, beside the transformer's other tensors
LONGEST = 65536
KEPT = ("variant", "family", "base_size", "vae")  # fields of a Detection that a note can tell


def saving_note(state_dict: Mapping[str, Tensor], detection: Detection) -> Tensor | None:
    """The note for these native weights, (bytes,) uint8; None if they tell all of `detection` by themselves."""
    bare = {key: value for key, value in state_dict.items() if key != NOTE_TENSOR}
    try:
        seen, problems = examine(bare, AUTO, origin=Origin(), hints=Hints())
    except CheckpointError:
        return None  # not the weights that the detection was made of
    if not problems and _facts(seen) == _facts(detection):
        return None
    return torch.tensor(list(json.dumps(note_of(detection)).encode()), dtype=torch.uint8)


def note_of(detection: Detection) -> dict[str, Any]:
    """Fields of Hints from which the weights alone are detected as this again; where the family was a guess, it stays one."""
    config, known = detection.config, detection.family_known
    note: dict[str, Any] = {
        "variant": detection.variant if known else None, "family": detection.family if known else None,
        "vae": detection.vae if detection.vae in VAE_OF_SCALE.values() else None,  # the demo's own is known by its variant
        "base_size": detection.base_size, "num_heads": config.num_heads, "position_range": config.position_range, "ema": detection.ema,
    }  # fmt: skip
    if config.compressed_blocks:
        blocks = [list(pair) for pair in config.compressed_blocks]
        note |= {"compressed_blocks": blocks, "compression_mode": config.compression_mode}
    return note


def take_note(tensors: dict[str, Tensor], hints: Hints) -> Hints:
    """Takes the note out of the weights; what the file says in its usual place comes first."""
    found = tensors.pop(NOTE_TENSOR, None)
    if found is None or hints != Hints(ema=hints.ema):
        return hints
    if found.dtype != torch.uint8 or found.ndim != 1 or found.numel() > LONGEST:
        raise CheckpointError(f"{NOTE_TENSOR} is {tuple(found.shape)} in {found.dtype}; expected a note's bytes. Save the model again.")
    read = hints_from_note(bytes(found.tolist()).decode("utf-8", errors="replace"))
    return replace(read, ema=hints.ema or read.ema)


def _facts(detection: Detection) -> tuple:
    """All that a note can tell."""
    config = detection.config
    return (
        *(getattr(detection, name) for name in KEPT),
        config.num_heads, config.position_range, config.compressed_blocks, config.compression_mode,
    )  # fmt: skip


