"""A ControlNet beside finished weights, which stay as they are; the source gives a hint for every picture."""
from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.quantize import FP8
from ...config import TransformerConfig
from ...controlnet import ControlledTransformer, ControlNetConfig, PixArtControlNet, copy_base_blocks
from ...errors import ConfigError
from ..bases import DTYPES, base_dtype, check_base, pack_matrices
from ..batch import Batch, Source
from ..initialize import load_base
from ..recipe import Recipe
from ..results import check_saving, describe, weights_of, without_places
from ..write import write_weights
from . import full

HINT_RANGE = "-1..1"  # of the picture whose latent is the hint, as PixArt-delta was trained; diffusers' example has 0..1


@dataclass(frozen=True)
class Settings:
    """Of the ControlNet."""

    blocks: int = 13  # copies of the first blocks, as in PixArt-delta
    base: str | None = None  # as of the method lora
    save_dtype: str = "fp16"  # of the result; or "bf16", "fp32", or "fp8": its matrices in e4m3, the rest in fp16


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    check_saving("original", settings.save_dtype, "fp8")
    if settings.blocks < 1:
        raise ConfigError(f"blocks is {settings.blocks}; expected the number of blocks to copy, 1 or more.")


class Part(full.Part):
    """Trains `blocks` copies of the first blocks of the weights in `initialize`."""

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        if not recipe.initialize:
            raise ConfigError("Method controlnet needs finished weights to start from; set initialize to them.")
        check_base(settings.base, recipe.precision)
        super().__init__(settings, recipe)

    def build(self, source: Source, device: torch.device) -> ControlledTransformer:
        dtype, attention = base_dtype(self.settings.base, self.recipe.precision), full.attention_of(device)
        base = load_base(self.recipe.initialize, self.recipe.variant, self.config(), dtype, attention)
        controlnet = PixArtControlNet(control_config(base.config, self.settings.blocks), attention=attention)
        copy_base_blocks(controlnet, base)
        base = pack_matrices(base, self.settings.base, device).to(device)
        return ControlledTransformer(base, controlnet.to(device))

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return [*(block.copied_block for block in network.controlnet.controlnet), *network.base.blocks]  # gradients cross the base too

    def null_rows(self, network: nn.Module) -> Tensor | None:
        return super().null_rows(network.base)

    def conditions(self, network: nn.Module, batch: Batch) -> dict[str, Any]:
        if batch.hint is None:
            raise ConfigError(f"The source {self.recipe.source.name!r} gives no hints; a ControlNet learns from them. Set source.hints.")
        return {**super().conditions(network, batch), "hint": batch.hint}

    def write(self, network: nn.Module, averages: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        weights = {name.removeprefix("controlnet."): value for name, value in weights_of(network, averages).items()}
        facts = describe(self.recipe, "controlnet", metadata, hint_range=HINT_RANGE, hints=json.dumps(self._hints()))
        write_weights(stored_as(weights, self.settings.save_dtype), path, facts, None)

    def _hints(self) -> Any:
        """What the pictures' hints were, as the source was told; of a folder, its name."""
        return without_places(getattr(self.recipe.source.settings, "hints", None))


def stored_as(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Weights as `save_dtype` says; fp8 is without scales, so that everything that reads fp8 reads it."""
    if dtype != "fp8":
        return {key: value.to(DTYPES[dtype]) for key, value in weights.items()}
    return {key: value.to(FP8 if key.endswith(".weight") and value.ndim == 2 else torch.float16) for key, value in weights.items()}


def control_config(base: TransformerConfig, depth: int) -> ControlNetConfig:
    """Sizes of a ControlNet of `depth` blocks for a base."""
    compressed = tuple((block, ratio) for block, ratio in base.compressed_blocks if block < depth)
    return ControlNetConfig(base.hidden_size, depth, base.num_heads, base.mlp_hidden, compressed, base.qk_norm)
