"""The losses of held-out pictures, always at the same noise and timesteps, so that two looks differ by the weights alone."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .draws import Draws
from .precision import autocast

if TYPE_CHECKING:
    from .loop import Loop

MOST = 256  # pictures
DRAWS_STAGE = 2**31 - 1  # no stage of a recipe has this number: training never draws the same noise


def validation_losses(loop: Loop, stage: int) -> dict[str, float]:
    """Mean losses by name over the pictures that the source holds out; empty if it has none. Every process calls it.

    Picture by picture, so that the noise of each is its own however many processes share them.
    """
    recipe, accelerator = loop.recipe, loop.accelerator
    alone = accelerator.num_processes == 1 or recipe.shard  # sharded weights need every process in every forward
    mine = range(MOST) if alone else range(accelerator.process_index, MOST, accelerator.num_processes)
    source, objective = recipe.part_at("source", stage).settings, recipe.part_at("objective", stage).settings
    sums: dict[str, Tensor] = {}
    weight = torch.zeros((), device=loop.device)
    for row in mine:
        rows = range(row, row + 1)
        batches = loop.source.validation(source, recipe.stages[stage], rows)
        if not batches:
            break
        batch, draws = batches[0].to(loop.device), Draws(recipe.seed, DRAWS_STAGE, 0, rows)
        with autocast(recipe.precision, loop.device):
            losses = loop.objective.losses(objective, loop.bare_model, loop.method.conditions(loop.network, batch), batch, draws)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + (loss * batch.weight).sum()
        weight = weight + batch.weight.sum()
    if accelerator.num_processes > 1 and not recipe.shard:
        return _over_processes(sums, weight, accelerator.num_processes)
    return {name: float(value / weight) for name, value in sums.items()} if weight > 0 else {}


def _over_processes(sums: dict[str, Tensor], weight: Tensor, processes: int) -> dict[str, float]:
    """Means over what all processes saw; one that saw nothing doesn't know the names."""
    found: list[dict[str, float]] = [{}] * processes
    torch.distributed.all_gather_object(found, {name: float(value) for name, value in {**sums, "": weight}.items()})
    total = sum(each[""] for each in found)
    names = dict.fromkeys(name for each in found for name in each if name)
    return {name: sum(each.get(name, 0.0) for each in found) / total for name in names} if total > 0 else {}
