"""The network as it was before training, for objectives that learn from it."""
from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_MAKE = "_make_teacher"


class Teacher:
    """Predicts as the network did before training, without gradients.

    A method may say what that is (`set_teacher`). Else it is the network itself with its adapters off, where it has some,
    which takes no memory; or a frozen copy. Make it in `Objective.wrap`, before the first step and before sharding.
    """

    def __init__(self, network: nn.Module) -> None:
        make: Callable[[], nn.Module] | None = getattr(network, _MAKE, None)
        if make is None and adapter_layers(network):
            self.network, self.own = network, False
        else:
            copied = _copy(network) if make is None else make().to(next(network.parameters()).device)
            self.network, self.own = copied.requires_grad_(False).eval(), True

    @torch.no_grad()
    def __call__(self, *inputs: Any, **conditions: Any) -> Tensor:
        """As the network's forward."""
        if self.own:
            return self.network(*inputs, **conditions)
        with without_adapters(self.network):
            return self.network(*inputs, **conditions)


def _copy(network: nn.Module) -> nn.Module:
    made = copy.deepcopy(network)
    for module in made.modules():
        module.__dict__.pop("forward", None)  # compiled or checkpointed, it would still be the first network's
    return made


def set_teacher(network: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Says what the network was before training, where its own first weights are not that; `make` runs if an objective asks."""
    object.__setattr__(network, _MAKE, make)


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """LoRA and its kin are off inside; a network without any stays as it is."""
    layers = adapter_layers(network)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # gradients too


def adapter_layers(network: nn.Module) -> list[Any]:
    """Layers that peft has put an adapter beside."""
    if "peft" not in sys.modules:  # which is slow to import, and then no layer can be peft's
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
