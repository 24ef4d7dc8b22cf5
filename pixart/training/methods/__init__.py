"""What is trained, from what it starts, and what is written: one module a method, with its `Settings` and `Part`.

A method is a `Method`; `full.py` is the plainest. The loop calls it in the order of its functions here.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...config import TransformerConfig
from ..batch import Batch, Source


class Method(Protocol):
    """One way to train; `network(latent, timestep, **conditions)` predicts noise and variance, (B, 2C, H, W)."""

    def config(self) -> TransformerConfig:
        """Sizes of the transformer; raises ConfigError where the settings don't fit it."""

    def build(self, source: Source, device: torch.device) -> nn.Module:
        """The network on the device; parameters that are not to be trained don't require gradients."""

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        """The blocks that gradients cross: they are compiled, checkpointed and sharded, and their trained matrices given to Muon."""

    def null_rows(self, network: nn.Module) -> Tensor | None:
        """The null caption that the weights bring, (M, C'), or None."""

    def conditions(self, network: nn.Module, batch: Batch) -> dict[str, Any]:
        """What the network is told of a batch beside the noisy latent and its timestep."""

    def write(self, network: nn.Module, averages: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        """The result, with the averages in place of the trained parameters; the file appears whole or not at all."""
