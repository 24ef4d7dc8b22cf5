"""An auxiliary target: the tokens after one block are to hold known features of the clean picture.

Representation alignment ("Representation Alignment for Generation", Yu and others, 2024) reaches a given
quality in a fraction of the steps. There the features come from a pretrained vision encoder; here from
the data source, which may know what it drew. The head is thrown away after training.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear

from ...errors import ConfigError
from ...layers import BlockInputs
from ...model import PixArtTransformer
from ..batch import Batch, Source
from ..draws import Draws
from . import denoise


@dataclass(frozen=True)
class Settings(denoise.Settings):
    """Beside those of `denoise`."""

    align_weight: float = 1.0
    align_block: int = 0  # whose tokens are aligned


check = denoise.check


class Part(denoise.Part):
    """`denoise` with that target beside it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.block = settings.align_block

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        if not source.feature_count:
            raise ConfigError("Objective aligned needs a source that knows features of tokens; this one doesn't. Choose denoise.")
        if not isinstance(network, PixArtTransformer) or not 0 <= self.block < network.config.depth:
            raise ConfigError(f"Objective aligned reads a transformer's block; this run has none with the number {self.block}.")
        return AlignedTransformer(network, self.block, source.feature_count)

    def losses(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy, noise, timestep = self.noised(settings, batch, draws)
        prediction, read = model(noisy, timestep, **conditions)
        error = (read.float() - batch.features).square().mean(dim=(1, 2))
        return {**self.compared(settings, prediction, batch.latent, noise, timestep), "align_loss": settings.align_weight * error}


class AlignedTransformer(nn.Module):
    """A transformer with a head that reads `features` numbers from every token after block `block`."""

    def __init__(self, transformer: PixArtTransformer, block: int, features: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.block = block
        self.head = Linear(transformer.config.hidden_size, features)

    def forward(self, *inputs: Any, **conditions: Any) -> tuple[Tensor, Tensor]:
        """The transformer's prediction, and the features read on the way, (B, N, features)."""
        seen: list[Tensor] = []

        def watch(block_inputs: BlockInputs, block) -> Tensor:
            seen.append(block(block_inputs))
            return seen[-1]

        prediction = self.transformer(*inputs, **conditions, block_wrappers={self.block: watch})
        normal = F.layer_norm(seen[0], seen[0].shape[-1:])
        return prediction, self.head(normal)
