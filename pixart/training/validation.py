"""The losses of held-out pictures, always at the same noise and timesteps, so that two looks differ by the weights alone."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .draws import Draws, share
from .precision import autocast

if TYPE_CHECKING:
    from .loop import Loop

DRAWS_STAGE = 2**31 - 1  # no stage of a recipe has this number: training never draws the same noise


def validation_losses(loop: Loop, stage: int) -> dict[str, float]:
    """Mean losses by name over the pictures that the source holds out; empty if it has none. Every process calls it."""
    recipe, accelerator = loop.recipe, loop.accelerator
    rows = share(recipe.stages[stage].batch_size, accelerator.process_index, accelerator.num_processes)
    source, objective = recipe.part_at("source", stage).settings, recipe.part_at("objective", stage).settings
    sums: dict[str, Tensor] = {}
    weight = torch.zeros((), device=loop.device)
    for number, batch in enumerate(loop.source.validation(source, recipe.stages[stage], rows)):
        batch, draws = batch.to(loop.device), Draws(recipe.seed, DRAWS_STAGE, number, rows)
        with autocast(recipe.precision, loop.device):
            losses = loop.objective.losses(objective, loop.bare_model, loop.method.conditions(loop.network, batch), batch, draws)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + (loss * batch.weight).sum()
        weight = weight + batch.weight.sum()
    if not sums:
        return {}
    *totals, weight = accelerator.reduce(torch.stack([*sums.values(), weight]), reduction="sum").tolist()
    return {name: total / weight for name, total in zip(sums, totals, strict=True)} if weight > 0 else {}
