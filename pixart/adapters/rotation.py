"""Orthogonal fine-tuning: weights turned by learned rotations, as LyCORIS, ComfyUI's trainer and PEFT parametrise them, in float32."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ROTATIONS = {"oft_blocks": "OFT", "rescale": "OFT", "oft_R": "OFT", "boft_R": "BOFT", "boft_s": "BOFT"}  # role -> method


class Rotation(NamedTuple):
    """What the tensors of a rotation don't tell."""

    bound: float | None = None  # largest norm of all generators together; oft_blocks only
    terms: int | None = None  # of the series that stands for the inverse in Cayley's formula; PEFT's OFT only
    radius: float | None = None  # largest norm of each generator (constrained OFT); PEFT's OFT only


def rotated(weight: Tensor, tensors: Mapping[str, Tensor], rotation: Rotation) -> Tensor:
    """The turned weight, of the shape of `weight` (rows, ...); RuntimeError where sizes don't fit, KeyError for a missing tensor.

    OFT (arXiv:2306.07280) turns blocks of neighbouring rows (LyCORIS) or columns (PEFT); BOFT (arXiv:2311.06243) is a
    product of such turns of ever wider neighbourhoods.
    """
    flat = weight.flatten(1)
    if "oft_blocks" in tensors or "rescale" in tensors:
        blocks = tensors["oft_blocks"]
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise RuntimeError(f"oft_blocks {tuple(blocks.shape)} are not square blocks")
        turn = _turn_rows if blocks.ndim == 3 else _turn_rows_in_stages
        turned = turn(flat, _cayley(_bounded(blocks - blocks.mT, rotation.bound)))
        if "rescale" in tensors:
            turned = turned * tensors["rescale"].reshape(-1, 1)
    elif "oft_R" in tensors:
        turned = _turn_columns(flat, _peft_rotations(tensors["oft_R"], rotation))
    else:
        turned = _turn_columns_in_stages(flat, tensors["boft_R"])
        if "boft_s" in tensors:
            turned = turned * tensors["boft_s"].reshape(-1, 1)
    return turned.reshape(weight.shape)


def generator_norm(blocks: Tensor) -> float:
    """Norm of all generators of `oft_blocks` together, which a bound limits."""
    return float(torch.linalg.vector_norm((blocks - blocks.mT).float()))


def rows_of(blocks: Tensor) -> int:
    """Rows that `oft_blocks` ([stages,] n, b, b) turn."""
    return blocks.shape[-3] * blocks.shape[-1]


def block_size(numbers: int) -> int | None:
    """Rows of a skew-symmetric matrix with so many free numbers; None if there is none such."""
    size = int((1 + (1 + 8 * numbers) ** 0.5) / 2)
    return size if numbers > 0 and size * (size - 1) // 2 == numbers else None


def _bounded(generators: Tensor, bound: float | None) -> Tensor:
    if bound is None:
        return generators
    return generators * (bound / (torch.linalg.vector_norm(generators) + 1e-8)).clamp_max(1.0)


def _cayley(generators: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 of skew-symmetric matrices (..., b, b)."""
    one = torch.eye(generators.shape[-1], device=generators.device)
    return (one + generators) @ torch.linalg.inv(one - generators)


def _turn_rows(flat: Tensor, rotations: Tensor) -> Tensor:
    """Each block of b rows becomes R^T rows; rotations (n, b, b), n * b rows."""
    number, size, _ = rotations.shape
    return torch.einsum("knm,knc->kmc", rotations, flat.reshape(number, size, -1)).flatten(0, 1)


def _turn_rows_in_stages(flat: Tensor, rotations: Tensor) -> Tensor:
    """rotations (stages, n, b, b): in stage i the two halves of a block lie 2^i half blocks apart."""
    _, number, size, _ = rotations.shape
    for stage, turns in enumerate(rotations):
        distance = 2**stage * (size // 2)
        pairs = flat.reshape(-1, 2, distance, flat.shape[-1]).transpose(1, 2)
        mixed = (turns @ pairs.reshape(number, size, -1)).reshape(pairs.shape)
        flat = mixed.transpose(1, 2).reshape(flat.shape)
    return flat


def _turn_columns(flat: Tensor, rotations: Tensor) -> Tensor:
    """W R^T for each block of b columns; one rotation serves all blocks where there is only one."""
    number, size, _ = rotations.shape
    blocks = flat.reshape(flat.shape[0], -1, size)
    if number not in (1, blocks.shape[1]):
        raise RuntimeError(f"{number} rotations of {size} x {size} for {flat.shape[1]} columns")
    return torch.einsum("rkn,kmn->rkm", blocks, rotations.expand(blocks.shape[1], -1, -1)).flatten(1)


def _turn_columns_in_stages(flat: Tensor, parameters: Tensor) -> Tensor:
    """PEFT's BOFT: parameters (stages, n, b, b); stage i gathers half blocks that lie 2^i apart."""
    stages, number, size, _ = parameters.shape
    if number * size != flat.shape[1]:
        raise RuntimeError(f"{number} rotations of {size} x {size} for {flat.shape[1]} columns")
    generators = 0.5 * (parameters - parameters.mT)
    for stage, turns in enumerate(_cayley(-generators)):
        order = torch.arange(flat.shape[1], device=flat.device)
        if stages > 1:  # in each neighbourhood first the even half blocks, then the odd ones
            order = order.reshape(number // 2**stage, 2**stage, 2, size // 2).transpose(1, 2).flatten()
        back = torch.argsort(order)
        flat = _turn_columns(flat[:, back], turns)[:, order]
    return flat


def _peft_rotations(numbers: Tensor, rotation: Rotation) -> Tensor:
    """PEFT's OFT keeps the numbers above the diagonal, (n, b (b - 1) / 2); its series leaves out terms on purpose."""
    size = block_size(numbers.shape[1])
    if size is None:
        raise RuntimeError(f"{numbers.shape[1]} numbers for each rotation, which make no triangle")
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    generators = numbers.new_zeros(numbers.shape[0], size, size)
    generators[:, rows, columns] = numbers
    generators = generators - generators.mT
    if rotation.radius is not None:
        limit = rotation.radius / numbers.shape[0] ** 0.5
        norms = torch.linalg.matrix_norm(generators, keepdim=True)
        generators = generators * (limit / norms.clamp_min(limit))
    if rotation.terms is None:
        return _cayley(-generators)
    return _series(generators, rotation.terms)


def _series(generators: Tensor, terms: int) -> Tensor:
    """The first terms of (I + Q)(I - Q)^-1 = I + 2 Q + 2 Q^2 + ...; of three and more PEFT counts the last one once, from Q^3 on."""
    power = torch.eye(generators.shape[-1], device=generators.device).expand_as(generators)
    total, last = power, terms - 1 if terms < 3 else max(terms - 1, 3)
    for exponent in range(1, last + 1):
        power = power @ generators
        total = total + (power if exponent == last >= 3 else 2 * power)
    return total
