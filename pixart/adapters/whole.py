"""LoRAs merged into a whole model's file: each weight is summed in fp32 and rounded once."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints.convert import LAYOUTS, write_diffusers, write_original
from ..checkpoints.detect import AUTO
from ..checkpoints.load import COMPUTING_DTYPES, load_transformer
from ..errors import CheckpointError, InputError
from .merge import merge_file

MERGED_KEY = "pixart.merged"  # of safetensors metadata: JSON, [file, strength] of each adapter


def merge_into_file(
    base: str | Path,
    adapters: Sequence[str | Path],
    dst: str | Path,
    strengths: Sequence[float] = (1.0,),
    *,
    to: str = "original",
    dtype: torch.dtype | None = None,
    variant: str = AUTO,
    ema: bool = False,
    leave_text: bool = False,
) -> tuple[Path, list[str]]:
    """Writes `base` with the adapters' changes in its weights; returns what was written, and a line on each adapter.

    strengths: one for all, or one each. to, dst: as of `convert_file`. dtype: fp32, bf16 or fp16; default: as the base is
    stored, for fp8 bf16. leave_text: an adapter's layers of T5 are left out; without it they are an error, as T5 is
    another file. Raises CheckpointError or InputError; nothing is written then.
    """
    base, dst = Path(base), Path(dst)
    strengths = list(strengths) * len(adapters) if len(strengths) == 1 else list(strengths)
    _check(base, adapters, dst, strengths, to)
    model = load_transformer(base, variant, torch.float32, ema=ema)
    lines = []
    for path, strength in zip(adapters, strengths, strict=True):
        fit = merge_file(path, strength, model, None, text_strength=0.0 if leave_text else None)
        lines.append(f"{fit.describe()}, strength {strength:g}")
    stored = getattr(torch, model.detection.dtype)
    target = dtype or (stored if stored in COMPUTING_DTYPES else torch.bfloat16)
    weights = {name: value.detach().to(target) for name, value in model.state_dict().items()}
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(f"{dst}: {', '.join(broken[:4])} would hold numbers beyond {target}; choose --dtype bf16 or fp32.")
    merged = [[Path(path).name, strength] for path, strength in zip(adapters, strengths, strict=True)]
    metadata = {MERGED_KEY: json.dumps({"base": base.name, "adapters": merged})}
    write = write_original if to == "original" else write_diffusers
    try:
        return write(weights, dst, replace(model.detection, source=str(base)), metadata), lines
    except OSError as error:
        raise CheckpointError(f"{dst}: can't be written ({error}); choose another destination.") from error


def _check(base: Path, adapters: Sequence[str | Path], dst: Path, strengths: Sequence[float], to: str) -> None:
    if to not in LAYOUTS:
        raise InputError(f"{dst}: unknown layout {to!r}; expected one of {', '.join(LAYOUTS)}.")
    if not adapters:
        raise InputError("No LoRA was given; expected one or more.")
    if len(strengths) != len(adapters):
        raise InputError(f"{len(strengths)} strengths for {len(adapters)} LoRAs; expected one for all, or one each in their order.")
    wrong = [strength for strength in strengths if not abs(strength) <= 100]  # NaN too
    if wrong:
        raise InputError(f"A strength is {wrong[0]}; expected a number from -100 to 100.")
    if dst.exists() and any(Path(path).exists() and dst.resolve() == Path(path).resolve() for path in (base, *adapters)):
        raise InputError(f"{dst} is one of the sources; choose another destination.")
