"""Whether a file of weights can be learned from by distillation."""
from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..checkpoints.shards import SAFE_SUFFIXES
from ..errors import ConfigError
from ..sampling_note import read_note

WHOLE = ("F64", "F32", "F16", "BF16")


def check_teacher(path: str, objective: str) -> None:
    """Raises ConfigError for a model that is distilled already, and for one whose matrices were rounded to 8 bits or fewer."""
    note = read_note(path)
    if note is not None:
        raise ConfigError(
            f"Objective {objective} would learn from {path}, which is {note.describe().partition('.')[0]} already: guidance would be "
            "folded in twice. Set the objective's teacher to the model that it was made from."
        )
    packed = quantized_matrix(Path(path))
    if packed is not None:
        raise ConfigError(
            f"Objective {objective} can't learn from {path}: it is quantized ({packed}), and what is learned would be its rounding too. "
            "Give the file in bf16, fp16 or fp32."
        )


def quantized_matrix(path: Path) -> str | None:
    """Name and type of a matrix of a safetensors file that isn't of whole floats."""
    if not path.is_file() or path.suffix.lower() not in SAFE_SUFFIXES:
        return None
    try:
        with safe_open(str(path), framework="pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                if name.endswith(".weight") and len(part.get_shape()) == 2 and part.get_dtype() not in WHOLE:
                    return f"{name} is {part.get_dtype()}"
    except (SafetensorError, OSError):
        return None  # the loader says what is wrong with the file
    return None
