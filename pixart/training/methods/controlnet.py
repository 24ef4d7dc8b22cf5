"""A ControlNet beside finished weights, which stay as they are; the source gives a hint for every picture."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import TransformerConfig
from ...controlnet import ControlledTransformer, ControlNetConfig, PixArtControlNet, copy_base_blocks
from ...errors import ConfigError
from ..batch import Batch, Source
from ..recipe import Recipe
from ..write import write_weights
from . import full


@dataclass(frozen=True)
class Settings:
    """Of the ControlNet."""

    blocks: int = 13  # copies of the first blocks, as in PixArt-delta


class Part(full.Part):
    """Trains `blocks` copies of the first blocks of the weights in `initialize`."""

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        if not recipe.initialize:
            raise ConfigError("Method controlnet is trained beside finished weights; set initialize to them.")
        super().__init__(settings, recipe)

    def build(self, source: Source, device: torch.device) -> ControlledTransformer:
        base = self.begin(self.config(), device)[0].to(device)
        controlnet = PixArtControlNet(control_config(base.config, self.settings.blocks), attention=base.blocks[0].attn.attention)
        copy_base_blocks(controlnet, base)
        return ControlledTransformer(base, controlnet.to(device))

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return [block.copied_block for block in network.controlnet.controlnet]

    def null_rows(self, network: nn.Module) -> Tensor | None:
        return super().null_rows(network.base)

    def conditions(self, network: nn.Module, batch: Batch) -> dict[str, Any]:
        if batch.hint is None:
            raise ConfigError(f"The source {self.recipe.source.name!r} gives no hints; a ControlNet can't be trained on it.")
        return {**super().conditions(network, batch), "hint": batch.hint}

    def write(self, network: nn.Module, averages: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        weights = {name.removeprefix("controlnet."): value for name, value in {**network.state_dict(), **averages}.items()}
        write_weights(weights, path, metadata)


def control_config(base: TransformerConfig, depth: int) -> ControlNetConfig:
    """Sizes of a ControlNet of `depth` blocks for a base."""
    compressed = tuple((block, ratio) for block, ratio in base.compressed_blocks if block < depth)
    return ControlNetConfig(base.hidden_size, depth, base.num_heads, base.mlp_hidden, compressed, base.qk_norm)
