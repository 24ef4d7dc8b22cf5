"""KV compression begun in weights that were trained without it, then trained on."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config import TransformerConfig
from ...errors import ConfigError
from ...model import PixArtTransformer
from ..batch import Source
from ..compression import begin_compression
from ..diffusion import STEPS, NoiseSchedule
from ..draws import Draws
from . import full

PROBED = 16  # pictures that the beginning is measured on


@dataclass(frozen=True)
class Settings(full.Settings):
    """Where keys and values are compressed."""

    blocks: tuple[tuple[int, int], ...] = ()  # (block, ratio); those that the first weights compress already go on


class Part(full.Part):
    """As `full`, with the blocks' compression begun as near to the uncompressed model as it can."""

    def config(self) -> TransformerConfig:
        if not self.settings.blocks:
            raise ConfigError("Method kv has no blocks; expected pairs [block, ratio], like [[14, 2], [15, 2]].")
        return replace(super().config(), compressed_blocks=self.settings.blocks)

    def build(self, source: Source, device: torch.device) -> PixArtTransformer:
        network, new = self.begin(self.config(), device)
        if new:
            begin_compression(network, new, self._probe(source))
        return network.to(device)

    def _probe(self, source: Source) -> tuple[Tensor, ...]:
        """Arguments of a forward on noisy pictures at timesteps from 0 to 999, to measure a model with."""
        stage = replace(self.recipe.stages[-1], batch_size=PROBED)
        draws = Draws(self.recipe.seed, len(self.recipe.stages), 0, range(PROBED))
        batch = source.batch(self.recipe.part_at("source", -1).settings, stage, draws)
        timestep = torch.linspace(0, STEPS - 1, PROBED).long()
        noisy = NoiseSchedule().add_noise(batch.latent, draws.normal("probe", batch.latent.shape[1:]), timestep)
        return noisy, timestep, batch.context, batch.mask
