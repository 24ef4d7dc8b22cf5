"""OFT and BOFT: a weight's rows turned, block by block, by orthogonal matrices (arXiv:2306.07280, 2311.06243), as LyCORIS stores them."""
from __future__ import annotations

import torch
from torch import Tensor


def rotated(weight: Tensor, blocks: Tensor, constraint: float, rescale: Tensor | None) -> Tensor:
    """weight: (rows, ...), fp32; blocks: (count, size, size) of OFT, or (factors, count, size, size) of BOFT -> the turned weight.

    constraint: the largest Frobenius norm of the skew-symmetric matrices, 0 for none. rescale: (rows, 1), a factor for each row.
    """
    turn = _cayley(blocks, constraint)
    flat = weight.flatten(1)
    if blocks.ndim == 4:
        out = _butterfly(flat, turn)
    else:
        out = torch.einsum("knm,knc->kmc", turn, flat.unflatten(0, turn.shape[:2])).flatten(0, 1)
    if rescale is not None:
        out = out * rescale.reshape(-1, 1)
    return out.reshape(weight.shape)


def rows_of(blocks: Tensor) -> int:
    """Rows of the weight that blocks turn; ValueError for blocks of another form."""
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"oft_blocks have shape {tuple(blocks.shape)}; expected square blocks")
    return blocks.shape[-3] * blocks.shape[-1]


def _cayley(blocks: Tensor, constraint: float) -> Tensor:
    """(I + Q)(I - Q)^-1 of the skew-symmetric part Q = B - B^T."""
    skew = blocks - blocks.transpose(-1, -2)
    norm = skew.norm()
    if 0 < constraint < float(norm):
        skew = skew * (constraint / norm)
    eye = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def _butterfly(weight: Tensor, turn: Tensor) -> Tensor:
    """Each factor turns blocks of rows that lie 2^i half-blocks apart."""
    size = turn.shape[-1]
    for level, blocks in enumerate(turn):
        span = 2**level * (size // 2)
        mixed = weight.unflatten(0, (-1, 2, span)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        mixed = torch.einsum("bij,bjc->bic", blocks, mixed)
        weight = mixed.flatten(0, 1).unflatten(0, (-1, span, 2)).transpose(1, 2).flatten(0, 2)
    return weight
