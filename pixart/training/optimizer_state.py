"""What optimizers keep between steps, whichever library they are from: tensors by name, and plain values."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = (bool, int, float)


def optimizer_tensors(optimizers: list[Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Every tensor, as optimizer.<number>.<parameter>.<what>, and those of groups; names: of parameters, by id."""
    return {name: value for name, value in _kept(optimizers, names) if isinstance(value, Tensor)}


def optimizer_values(optimizers: list[Optimizer], names: Mapping[int, str]) -> dict[str, Any]:
    """Every number that the steps have changed, likewise; the learning rate is the recipe's."""
    return {name: value for name, value in _kept(optimizers, names) if isinstance(value, PLAIN)}


def prepare_optimizers(
    optimizers: list[Optimizer], names: Mapping[int, str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Gives fresh optimizers what a state holds for them: numbers as they are, tensors empty, to be filled.

    tensors: by name, of which shape and dtype are used; values: of `optimizer_values`.
    """
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            start = f"optimizer.{number}.group{index}."
            device = group["params"][0].device
            group.update(_inside(values, start))
            group.update({what: torch.zeros_like(value, device=device) for what, value in _inside(tensors, start).items()})
            for parameter in group["params"]:
                start = f"optimizer.{number}.{names[id(parameter)]}."
                empty = {what: _empty(value, parameter) for what, value in _inside(tensors, start).items()}
                if empty or _inside(values, start):
                    optimizer.state[parameter].update({**_inside(values, start), **empty})


def _kept(optimizers: list[Optimizer], names: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that is kept."""
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for what, value in group.items():
                fixed = what in ("params", "lr") or (not isinstance(value, Tensor) and optimizer.defaults.get(what, _ABSENT) == value)
                if not fixed:
                    yield f"optimizer.{number}.group{index}.{what}", value
        for parameter, kept in optimizer.state.items():
            for what, value in kept.items():
                yield f"optimizer.{number}.{names[id(parameter)]}.{what}", value


_ABSENT = object()


def _inside(stored: Mapping[str, Any], start: str) -> dict[str, Any]:
    """What is stored under names that begin so and have one more part."""
    return {name[len(start) :]: value for name, value in stored.items() if name.startswith(start) and "." not in name[len(start) :]}


def _empty(like: Tensor, parameter: nn.Parameter) -> Tensor:
    """In the parameter's sharding where it has its shape."""
    if like.shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=like.dtype)
    return torch.zeros_like(like, device=parameter.device)
