"""The whole transformer: from scratch, or on from weights of the same sizes; weak to strong too, as PixArt-Sigma came from alpha."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import AttentionFunction, torch_attention
from ...checkpoints.detect import AUTO
from ...config import TransformerConfig, get_variant
from ...model import PixArtTransformer
from ..batch import Batch, Source
from ..cpu_attention import cpu_training_attention
from ..initialize import copy_weights, initialize_weights, pass_noise_through
from ..recipe import Recipe
from ..results import check_saving, describe, hints_of, weights_of, write_model


@dataclass(frozen=True)
class Settings:
    """Beside the recipe's own `initialize`."""

    pass_noise: bool = False  # from scratch: begin as the identity on noise, see `initialize.pass_noise_through`
    layout: str = "original"  # of the result's keys; or "diffusers", where an output without ending is a folder
    save_dtype: str = "fp16"  # of the result; or "bf16", "fp32"


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    check_saving(settings.layout, settings.save_dtype)


class Part:
    """See `methods.Method`."""

    def __init__(self, settings: Any, recipe: Recipe) -> None:
        self.settings, self.recipe = settings, recipe

    def build(self, source: Source, device: torch.device) -> PixArtTransformer:
        return self.begin(self.config(), device)[0].to(device)

    def config(self) -> TransformerConfig:
        """Sizes of the network."""
        return get_variant(self.recipe.variant).transformer

    def begin(self, config: TransformerConfig, device: torch.device) -> tuple[PixArtTransformer, list[int]]:
        """A network of these sizes with its first weights, and the blocks whose compression has none yet."""
        network = PixArtTransformer(config, attention=attention_of(device))
        if self.recipe.initialize:
            return network, copy_weights(network, self.recipe.initialize, AUTO)
        initialize_weights(network)
        if self.settings.pass_noise:
            pass_noise_through(network)
        return network, [block for block, _ in config.compressed_blocks]

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return network.blocks

    def null_rows(self, network: nn.Module) -> Tensor | None:
        return network.y_embedder.y_embedding if network.config.null_caption else None

    def conditions(self, network: nn.Module, batch: Batch) -> dict[str, Any]:
        size = {"size": batch.size} if network.config.micro_condition else {}
        return {"context": batch.context, "context_mask": batch.mask, **size}

    def write(self, network: nn.Module, averages: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        hints = hints_of(self.recipe, get_variant(self.recipe.variant), network.config)
        facts = describe(self.recipe, "", metadata)
        write_model(weights_of(network, averages), path, facts, hints, self.settings.layout, self.settings.save_dtype)


def attention_of(device: torch.device) -> AttentionFunction:
    """The one that trains fastest there."""
    return cpu_training_attention if device.type == "cpu" else torch_attention
