"""Gradients of large weights stay in the 16 bits that autocast computes them in, until the optimizer takes them.

In fp32 they are the same numbers in twice the memory: 1.1 GiB of XL/2. They are cast a few at a time, so optimizers serve that treat
each parameter by itself.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .linear import large_weights
from .optimizers import BY_PARAMETER
from .recipe import Recipe

MOST_AT_ONCE = 2**24  # values that are in fp32 at a time


class NarrowGradients:
    """`weights`: whose `grad` may be in another dtype than their own, until `step` has used it up."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights, self.scale = weights, 1.0
        for weight in weights:
            weight.grad_dtype = None

    @staticmethod
    def suit(recipe: Recipe, processes: int) -> bool:
        """Not where gradients are summed, over parts of a batch, processes or forwards, as sums need fp32; nor scaled, nor in graphs."""
        twice = getattr(recipe.objective.settings, "runs_network_twice", False)
        summed = processes > 1 or twice or any(stage.accumulation > 1 for stage in recipe.stages)
        known = hasattr(Tensor, "grad_dtype")  # torch 2.10
        return known and recipe.precision == "bf16" and not (summed or recipe.compile_blocks) and recipe.optimizer in BY_PARAMETER

    @classmethod
    def gradient_bytes(cls, trained: Iterable[nn.Parameter], blocks: Iterable[nn.Module], recipe: Recipe, processes: int) -> int:
        """Of all parameters in training, once a step has computed them."""
        narrow = sum(weight.nbytes for weight in large_weights(blocks)) // 2 if cls.suit(recipe, processes) else 0
        return sum(parameter.nbytes for parameter in trained) - narrow

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """The norm of all gradients; those in fp32 are clipped, the others when they are cast."""
        gradients = [parameter.grad for parameter in parameters]
        # Row by row: each row's is rounded to 16 bits, which many rows even out (to 1e-5 in XL/2; 0.2 % at worst).
        rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten().float() for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.cat(rows))
        self.scale = min(1.0, limit / (float(norm) + 1e-6))  # as torch's clip_grad_norm_
        if self.scale != 1.0:
            for wide in (each for each in gradients if each.dtype == torch.float32):
                wide.mul_(self.scale)
        return norm

    def step(self, optimizers: Iterable[Optimizer]) -> None:
        """One step of all parameters that have gradients, and no gradients are left."""
        narrow = [weight for weight in self.weights if weight.grad is not None and weight.grad.dtype != weight.dtype]
        held = [weight.grad for weight in narrow]
        for weight in narrow:
            weight.grad = None
        _step(optimizers)
        for start, end in _chunks(narrow):
            for index in range(start, end):
                gradient, held[index] = held[index].to(narrow[index].dtype), None
                narrow[index].grad = gradient if self.scale == 1.0 else gradient.mul_(self.scale)
            _step(optimizers)


def _step(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _chunks(weights: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """First and last index of neighbours, together of at most MOST_AT_ONCE values, or of one weight."""
    start, size = 0, 0
    for index, weight in enumerate(weights):
        if index > start and size + weight.numel() > MOST_AT_ONCE:
            yield start, index
            start, size = index, 0
        size += weight.numel()
    if size:
        yield start, len(weights)
