"""Methods on a tiny base: built, moved from where they began, and written, without a run."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart.checkpoints import load_transformer
from pixart.config import TransformerConfig, Variant
from pixart.training import initialize, results
from pixart.training.draws import Draws
from pixart.training.methods import full, lora
from pixart.training.recipe import Recipe, make_recipe
from tests.support import checkpoint_factory as factory
from tests.support.tiny_training import TwoPictures, recipe_values

CONFIG = TransformerConfig(hidden_size=72, depth=2, num_heads=1, mlp_hidden=288, caption_channels=8)
VARIANT = Variant("demo", "tiny", "sigma", 1024, 300, 0.13025, "sdxl", CONFIG)


def use_variant(monkeypatch: pytest.MonkeyPatch, variant: Variant = VARIANT) -> None:
    """Recipes mean this one, whatever name they give."""
    for module in (full, lora, results):
        monkeypatch.setattr(module, "get_variant", lambda name: variant)
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))


def write_base(folder: Path, kind: str = "safetensors", **sizes: Any) -> Path:
    """A random base of `CONFIG`'s sizes in one of the factory's formats."""
    return factory.write(kind, folder, *factory.tiny_weights(**{"hidden": 72, "depth": 2, "captions": 8, **sizes}))


def recipe_of(folder: Path, base: Path | None, method: Any, **changes: Any) -> Recipe:
    """A recipe that begins from `base`."""
    values = recipe_values(folder, initialize=None if base is None else str(base), **{"objective": "denoise", "method": method, **changes})
    return make_recipe(values, "r")


def built(recipe: Recipe, move: float = 0.05) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    """The method, its network, and averages at which nothing is as it began; the network has them too."""
    torch.manual_seed(0)
    method, source = recipe.method.make(recipe), TwoPictures(replace_hints(recipe), recipe)
    network = method.build(source, torch.device("cpu"))
    averages = {}
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.requires_grad:
                value.add_(move * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
                averages[name] = value.detach().clone()
    return method, network, averages


def replace_hints(recipe: Recipe) -> Any:
    """The source's settings, with hints."""
    return replace(recipe.source.settings, hints=True)


def inputs(width: int = 8, channels: int = 4) -> tuple[Tensor, ...]:
    """Arguments of a forward."""
    order = torch.Generator().manual_seed(11)
    mask = torch.arange(3) < torch.tensor([3, 1])[:, None]
    return torch.randn(2, channels, 8, 12, generator=order), torch.tensor([7, 600]), torch.randn(2, 3, width, generator=order), mask


def draws(rows: int = 4) -> Draws:
    """Of a first batch."""
    return Draws(0, 0, 0, range(rows))
