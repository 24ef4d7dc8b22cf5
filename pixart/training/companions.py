"""Networks that an objective has beside the one that is written: teachers and targets, and such as are trained too."""
from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .batch import Batch
from .draws import Draws
from .objectives import Objective, Turn
from .optimizers import make_optimizers
from .recipe import Recipe
from .state import optimizer_tensors, prepare_optimizers


def twin(network: nn.Module, trained: bool = False) -> nn.Module:
    """A copy of what the network trains, around the frozen weights themselves, which both share.

    Of a LoRA that is a copy of small matrices, of a whole network all of it. Before the first step it computes what the network
    began with, whatever the method: it is the teacher. trained: whether the copies require gradients.
    """
    frozen = [value for value in (*network.parameters(), *network.buffers()) if not value.requires_grad]
    shared = {id(value): value for value in frozen}
    made = copy.deepcopy(network, shared)
    for module in made.modules():
        module.__dict__.pop("forward", None)  # compiled or checkpointed, it would still be the first network's
    for value in made.parameters():
        value.requires_grad_(trained and id(value) not in shared)
    return made.train(trained)


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that require gradients, by name."""
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


class Companions:
    """The trained ones among an objective's companions, with their optimizers; the loop knows them by these functions alone."""

    def __init__(self, objective: Objective, method: Any, recipe: Recipe, accelerator: Accelerator) -> None:
        self.objective, self.recipe, self.accelerator = objective, recipe, accelerator
        found = objective.companions()
        self.networks = {name: network for name, network in found.items() if any(p.requires_grad for p in network.parameters())}
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, list[Any]] = {}
        for name, network in self.networks.items():
            prepared = accelerator.prepare(network, *make_optimizers(network, method.blocks(network), recipe))
            self.models[name], self.optimizers[name] = prepared[0], list(prepared[1:])

    def train(self, settings: Any, conditions: dict[str, Any], batch: Batch, draws: Draws, rate: float) -> tuple[dict[str, float], bool]:
        """The turns that come before a step of the network: their mean losses, and whether all gradients were finite.

        rate: the step's learning rate. A turn whose gradients are not finite changes nothing.
        """
        shown: dict[str, list[Tensor]] = {}
        finite = True
        for turn in self.objective.turns(settings) if self.models else ():
            model = self.models[turn.companion]
            with self.accelerator.autocast():
                losses = self.objective.companion_losses(turn, settings, model, conditions, batch, draws)
            means = {
                name: (loss * batch.weight).sum() * self.accelerator.num_processes / batch.total for name, loss in losses.items()
            }
            self.accelerator.backward(sum(means.values()))
            finite &= self._update(turn, rate)
            for name, mean in means.items():
                shown.setdefault(name, []).append(mean.detach())
        reduced = {name: self.accelerator.reduce(torch.stack(values).mean(), reduction="mean") for name, values in shown.items()}
        return {name: float(value) for name, value in reduced.items()}, finite

    def _update(self, turn: Turn, rate: float) -> bool:
        parameters = [value for value in self.models[turn.companion].parameters() if value.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.clip_norm)
        finite = bool(torch.isfinite(norm))
        for optimizer in self.optimizers[turn.companion]:
            for group in optimizer.param_groups:
                group["lr"] = rate * turn.rate
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        return finite

    def tensors(self) -> dict[str, Tensor]:
        """Everything of theirs that a run changes, by name."""
        return {name: value for part in self._parts() for name, value in part.items()}

    def _parts(self) -> Iterator[dict[str, Tensor]]:
        for name, bare in self._bare():
            yield {f"companion.{name}.{key}": value for key, value in trained_tensors(bare).items()}
            kept = optimizer_tensors(self._bare_optimizers(name), _names(bare))
            yield {f"companion.{name}.{key}": value for key, value in kept.items()}

    def prepare(self, stored: Mapping[str, torch.Size]) -> None:
        """Gives fresh optimizers the tensors that a state holds for them, to be filled."""
        for name, bare in self._bare():
            start = f"companion.{name}."
            own = {key.removeprefix(start): size for key, size in stored.items() if key.startswith(start)}
            prepare_optimizers(self._bare_optimizers(name), _names(bare), own)

    def _bare(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, self.accelerator.unwrap_model(model)) for name, model in self.models.items())

    def _bare_optimizers(self, name: str) -> list[torch.optim.Optimizer]:
        return [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers[name]]


def _names(network: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in network.named_parameters()}
