"""KV compression begun in weights that were trained without it, then trained on.

The objective `denoise` teaches it by pictures, as PixArt-Sigma, section 3.2; `imitate` by the uncompressed model.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...checkpoints.detect import AUTO
from ...config import COMPRESSION_MODES, TransformerConfig
from ...errors import ConfigError
from ...model import PixArtTransformer
from ..batch import Source
from ..compression import begin_compression
from ..diffusion import STEPS, NoiseSchedule
from ..draws import Draws
from ..initialize import load_base
from ..teacher import set_teacher
from . import full

PROBED, PROBED_LARGE, LARGE = 16, 4, 1024  # pictures that the beginning is measured on; of large ones a few have as many tokens


@dataclass(frozen=True)
class Settings(full.Settings):
    """Where keys and values are compressed."""

    blocks: tuple[tuple[int, int], ...] = ()  # (block, ratio); those that the first weights compress already go on
    mode: str = "conv"  # or "uniform", "uniform_every", "ave", which have no weights, see `attention.select_tokens`


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    full.check(settings)
    if not settings.blocks:
        raise ConfigError("blocks is empty; expected pairs [block, ratio], like [[14, 2], [15, 2]].")
    if settings.mode not in COMPRESSION_MODES:
        raise ConfigError(f"mode is {settings.mode!r}; expected one of {', '.join(COMPRESSION_MODES)}.")
    if settings.layout == "diffusers":
        raise ConfigError("diffusers has no KV compression, so that its layout can't hold the result; choose layout 'original'.")


class Part(full.Part):
    """As `full`, with the blocks' compression begun as near to the uncompressed model as it can."""

    def config(self) -> TransformerConfig:
        return replace(super().config(), compressed_blocks=self.settings.blocks, compression_mode=self.settings.mode)

    def build(self, source: Source, device: torch.device) -> PixArtTransformer:
        network, new = self.begin(self.config(), device)
        network = network.to(device)
        if new and self.settings.mode == "conv":
            begin_compression(network, new, tuple(each.to(device) for each in self._probe(source)))
        if self.recipe.initialize:  # the model of the first weights, compressed only where they are already
            plain, path, attention = super().config(), self.recipe.initialize, full.attention_of(device)
            set_teacher(network, lambda: load_base(path, AUTO, plain, torch.float32, attention))
        return network

    def _probe(self, source: Source) -> tuple[Tensor, ...]:
        """Arguments of a forward on noisy pictures at timesteps from 0 to 999, to measure a model with."""
        pictures = PROBED if self.recipe.stages[-1].base_size < LARGE else PROBED_LARGE
        stage = replace(self.recipe.stages[-1], batch_size=pictures)
        draws = Draws(self.recipe.seed, len(self.recipe.stages), 0, range(pictures))
        batch = source.batch(self.recipe.part_at("source", -1).settings, stage, draws)
        timestep = torch.linspace(0, STEPS - 1, pictures).long()
        noisy = NoiseSchedule().add_noise(batch.latent, draws.normal("probe", batch.latent.shape[1:]), timestep)
        return noisy, timestep, batch.context, batch.mask
