"""How a distilled model is to be sampled: written into its file's metadata, told by every loader."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .checkpoints.shards import SAFE_SUFFIXES, WEIGHTS_NAME
from .timesteps import DMD_TIMESTEP, LAST_TIMESTEP

METHODS = CONSISTENCY, DMD = "lcm", "dmd"
NOTE_KEY = "pixart.sampling"  # of safetensors metadata: JSON of `SamplingNote`
MOST_STEPS = 100
# Of a diffusers model, of a pipeline, of a PEFT folder.
IN_FOLDERS = (f"{WEIGHTS_NAME}.safetensors", f"transformer/{WEIGHTS_NAME}.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class SamplingNote:
    """Of one model or adapter; guidance is always folded in, so that cfg is 1."""

    method: str  # of METHODS
    steps: int
    timestep: int = LAST_TIMESTEP  # where sampling begins

    def describe(self) -> str:
        """One line for a log: what to set in ComfyUI and in Python."""
        if self.method == DMD:
            return (
                f"distilled to one step at timestep {self.timestep} (DMD). In ComfyUI: PixArt One Step with timestep {self.timestep} "
                "into SamplerCustom, cfg 1. In Python: steps=1, guidance=1."
            )
        return (
            f"distilled to few steps (LCM). In ComfyUI: ModelSamplingDiscrete lcm, sampler lcm, scheduler simple, {self.steps} steps, "
            f"cfg 1. In Python: steps={self.steps}, guidance=1."
        )


LCM = SamplingNote(CONSISTENCY, 4)


def dmd_note(timestep: int = DMD_TIMESTEP) -> SamplingNote:
    """Of one step from this timestep."""
    return SamplingNote(DMD, 1, timestep)


def note_metadata(note: SamplingNote) -> dict[str, str]:
    """An entry of a safetensors file's metadata."""
    return {NOTE_KEY: json.dumps(asdict(note))}


def read_note(path: str | Path) -> SamplingNote | None:
    """What a file or folder of weights says of its sampling; None if nothing, or nothing that could be."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
    if not path.is_file() or path.suffix.lower() not in SAFE_SUFFIXES:
        return None
    try:
        with safe_open(str(path), framework="pt") as opened:
            return note_of(opened.metadata())
    except (SafetensorError, OSError):
        return None  # the loader says what is wrong with the file


def note_of(metadata: Mapping[str, Any] | None) -> SamplingNote | None:
    """The note in a file's metadata, which anyone may have written."""
    try:
        values = json.loads((metadata or {}).get(NOTE_KEY) or "null")
    except (ValueError, RecursionError, TypeError):
        return None
    if not isinstance(values, Mapping):
        return None
    method, steps, timestep = values.get("method"), values.get("steps"), values.get("timestep")
    whole = all(type(value) is int for value in (steps, timestep))
    if method not in METHODS or not whole or not 1 <= steps <= MOST_STEPS or not 1 <= timestep <= LAST_TIMESTEP:
        return None
    return SamplingNote(method, steps, timestep)
