"""A transformer in scaled fp8: half the size of 16 bits, in ComfyUI's per-layer format."""
from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import get_variant
from ..embeddings import position_table
from ..errors import CheckpointError
from .convert import replacing, separate
from .detect import AUTO, Detection
from .hints import NOTE_KEY
from .keys import POSITION_KEY
from .load import prepare_file
from .notes import note_of
from .parts import SCALED_FP8

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
# The blocks' matrices, 97 % of XL. Embeddings, modulation and the final layer are few and touch every token.
MATRICES = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|mlp\.fc[12])\.weight")


def quantize_transformer(src: str | Path, dst: str | Path, variant: str = AUTO, ema: bool = False) -> Path:
    """Writes `src` with its blocks' matrices in fp8 (e4m3) times one scale each, and returns `dst`, a .safetensors.

    Each matrix keeps its largest number exactly; others are rounded to 3 bits of mantissa, by at most a sixteenth. PixArt
    Model Loader and ComfyUI's UNETLoader read it; a card that multiplies in fp8 does so. Older hosts (0.3.64) hold the
    other linear layers of such a file in fp8 too. Raises CheckpointError.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise CheckpointError(f"{dst}: a transformer in fp8 is one file; choose a name that ends in .safetensors.")
    if dst.exists() and Path(src).exists() and dst.resolve() == Path(src).resolve():
        raise CheckpointError(f"{dst}: is the source itself; choose another destination.")
    prepared = prepare_file(src, variant, ema)
    if prepared.detection.dtype.startswith("float8"):
        raise CheckpointError(f"{src}: is in fp8 already; quantize the file in 16 or 32 bits that it was made of.")
    # ComfyUI's mark: a `scale_weight` stands beside each fp8 weight. Without elements it allows products in fp8
    tensors: dict[str, Tensor] = {SCALED_FP8: torch.empty(0, dtype=FP8), POSITION_KEY: _positions(prepared.detection)}
    for key, tensor in separate(prepared.state_dict).items():
        if MATRICES.fullmatch(key):
            tensors[key], tensors[key.replace(".weight", ".scale_weight")] = quantize_matrix(tensor)
        else:
            tensors[key] = tensor
    note = json.dumps(note_of(prepared.detection))
    with replacing(dst) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt", NOTE_KEY: note})
    return dst


def quantize_matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(weight / scale in fp8, the scale: fp32, no dimension); the largest absolute value becomes fp8's largest."""
    wide = weight.float()
    scale = (wide.abs().max() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def _positions(detection: Detection) -> Tensor:
    """(1, N, D) of the base size, which ComfyUI's own PixArt needs to know its size; this project computes them."""
    side = (detection.base_size or get_variant(detection.variant).base_size) // 16
    return position_table(side, side, detection.config.hidden_size, detection.config.position_range)[None]
