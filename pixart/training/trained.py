"""A network in training: shared among the processes, with optimizers of its own, and what a run must keep of it."""
from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.amp import GradScaler

from .linear import large_weights
from .narrow_gradients import NarrowGradients
from .optimizer_state import optimizer_tensors, optimizer_values, prepare_optimizers
from .optimizers import make_optimizers
from .recipe import Recipe
from .shard import shard_model, whole_tensor


class Trained:
    """`model` is to be called, `bare` is the same without what the processes need around it."""

    def __init__(
        self, module: nn.Module, blocks: Iterable[nn.Module], recipe: Recipe, accelerator: Accelerator, scaler: GradScaler
    ) -> None:
        self.recipe, self.accelerator, self.scaler = recipe, accelerator, scaler
        blocks = list(blocks)
        if recipe.shard:
            shard_model(module, blocks, accelerator.device)
        self.bare = module
        self.model = module if recipe.shard else accelerator.prepare(module)
        self.optimizers = make_optimizers(module, blocks, recipe)
        suit = self.model is module and NarrowGradients.suit(recipe, accelerator.num_processes)  # torchrun wraps a single process's too
        self.narrow = NarrowGradients(large_weights(blocks)) if suit else None
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}

    def gradients(self, last: bool) -> AbstractContextManager:
        """Processes exchange gradients with the last part of a batch alone."""
        if self.recipe.shard:
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def clip(self) -> Tensor:
        """The norm of all gradients before they are clipped."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [parameter for parameter in self.bare.parameters() if parameter.grad is not None]
        limit = self.recipe.clip_norm or float("inf")
        if self.narrow:
            return self.narrow.clip(parameters, limit)
        return whole_tensor(nn.utils.clip_grad_norm_(parameters, limit))

    def step(self, rate: float, finite: bool) -> None:
        """One step of the optimizers, unless the gradients are not finite, which leaves the weights as they are."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        if self.narrow and finite:
            self.narrow.step(self.optimizers)
        for optimizer in self.optimizers:
            if finite and not self.narrow:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()

    def tensors(self) -> dict[str, Tensor]:
        """Weights in training and what the optimizers keep, by name."""
        weights = {f"network.{name}": value for name, value in trained_parameters(self.bare).items()}
        return {**weights, **optimizer_tensors(self.optimizers, self.names)}

    def values(self) -> dict[str, Any]:
        """Numbers that the optimizers keep."""
        return optimizer_values(self.optimizers, self.names)

    def prepare(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Gives fresh optimizers the tensors that a state holds for them, to be filled, and the numbers."""
        prepare_optimizers(self.optimizers, self.names, tensors, values)


def trained_parameters(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that require gradients, by name, without them."""
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


def twin(network: nn.Module, trained: bool = False) -> nn.Module:
    """A copy of what the network trains, around the frozen weights themselves, which both share.

    Of a LoRA that is a copy of small matrices, of a whole network all of it. trained: whether the copies require gradients.
    """
    frozen = [value for value in (*network.parameters(), *network.buffers()) if not value.requires_grad]
    shared = {id(value): value for value in frozen}
    made = copy.deepcopy(network, dict(shared))
    for value in made.parameters():
        if id(value) not in shared:
            value.requires_grad_(trained)
    return made.train(trained)
