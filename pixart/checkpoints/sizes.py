"""What shapes alone tell about a native state dict."""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..embeddings import position_table
from ..errors import CheckpointError
from .keys import NULL_CAPTION_KEY

MAX_DEPTH = 256  # a guard against absurd block numbers in damaged files


class StoredPositions(NamedTuple):
    """A `pos_embed` found in a file: a hint, never used as positions."""

    side: int  # of the square grid
    span: float | None  # what its coordinates count to; None if it is no sin-cos table


def read_sizes(shapes: Mapping[str, tuple[int, ...]], source: str, reasons: list[str]) -> dict:
    """Every size that shapes tell. Where keys disagree the majority wins, so that the odd one is named later."""

    def vote(*candidates: int | None, default: int) -> int:
        counted = Counter(c for c in candidates if c)
        return counted.most_common(1)[0][0] if counted else default

    def dim(key: str, index: int) -> int | None:
        shape = shapes.get(key, ())
        return shape[index] if -len(shape) <= index < len(shape) else None

    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in shapes) if m}
    depth = max(blocks, default=0) + 1
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{source}: has a block numbered {depth - 1}; expected at most {MAX_DEPTH} blocks.")
    hidden = vote(
        dim("final_layer.scale_shift_table", 1), dim("x_embedder.proj.bias", 0), dim("y_embedder.y_proj.fc2.bias", 0),
        (dim("t_block.1.bias", 0) or 0) // 6, *(dim(f"blocks.{i}.scale_shift_table", 1) for i in blocks), default=1152,
    )  # fmt: skip
    patch = vote(dim("x_embedder.proj.weight", 3), default=2)
    ratios = {i: dim(f"blocks.{i}.attn.sr.weight", 3) for i in blocks if f"blocks.{i}.attn.sr.weight" in shapes}
    compressed = tuple((i, r) for i, r in sorted(ratios.items()) if r and r > 1)  # a 1 x 1 kernel is left over, and reported
    micro = any(key.startswith(("csize_embedder.", "ar_embedder.")) for key in shapes)
    qk_norm = any(f"blocks.{i}.attn.q_norm.weight" in shapes for i in blocks)
    if qk_norm:
        reasons.append("blocks have attn.q_norm / attn.k_norm: trained with qk_norm.")
    if compressed:
        reasons.append(f"{len(compressed)} block(s) have attn.sr / attn.norm: trained with KV compression.")
    return {
        "hidden_size": hidden,
        "depth": depth,
        "patch_size": patch,
        "in_channels": vote(dim("x_embedder.proj.weight", 1), default=4),
        "out_channels": vote((dim("final_layer.linear.bias", 0) or 0) // patch**2, default=8),
        "mlp_hidden": vote(*(dim(f"blocks.{i}.mlp.fc1.bias", 0) for i in blocks), default=4 * hidden),
        "caption_channels": vote(dim(NULL_CAPTION_KEY, 1), dim("y_embedder.y_proj.fc1.weight", 1), default=4096),
        "micro_condition": micro,
        "compressed_blocks": compressed,
        "qk_norm": qk_norm,
    }


def read_stored_positions(table: Tensor | None, hidden: int) -> StoredPositions | None:
    """Reads the grid of a stored position table, (1, N, D) or (N, D); None if it is not square."""
    if table is None or table.ndim not in (2, 3) or table.shape[-1] != hidden or hidden % 4:
        return None
    side = math.isqrt(table.shape[-2])
    if side < 2 or side * side != table.shape[-2] or table.is_meta or not table.is_floating_point():
        return StoredPositions(side, None) if side * side == table.shape[-2] else None
    values = table.reshape(-1, hidden)[: 2 * side].float().cpu()
    angle = math.atan2(values[1, 0], values[1, hidden // 4]) % (2 * math.pi)  # lowest frequency is 1
    span = angle * side
    expected = position_table(side, side, hidden, span)[: 2 * side]
    matches = span > 0 and bool((values - expected).abs().max() < 0.05)  # generous: may be stored in bf16
    return StoredPositions(side, span if matches else None)


def main_dtype(tensors: Iterable[Tensor]) -> str:
    count: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        count[tensor.dtype] += tensor.numel()
    return str(count.most_common(1)[0][0]).removeprefix("torch.")
