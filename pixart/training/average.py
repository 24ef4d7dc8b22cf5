"""The exponential moving average of what is trained; it is what a run writes."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """Averages of a network's trained parameters, by name, in their dtype and sharding; with decay 0 the parameters themselves."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self.values = {name: value.detach().clone() if decay else value.detach() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step nearer to the parameters."""
        if self.decay:
            torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averages inside, and its own values again behind."""
        if not self.decay:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Parameters and averages trade places, one tensor at a time: two copies of a model are enough."""
        for name, parameter in self.parameters.items():
            own = parameter.clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(own)
