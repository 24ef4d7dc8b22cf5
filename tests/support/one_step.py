"""One training step of a method and an objective, and of the reference, on the same random weights, batch and noise."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart.checkpoints import load_transformer
from pixart.config import TransformerConfig, Variant
from pixart.training import initialize
from pixart.training.batch import Batch
from pixart.training.draws import Draws
from pixart.training.methods import full
from pixart.training.objectives import denoise
from pixart.training.recipe import Recipe, make_recipe
from tests.support import checkpoint_factory as factory
from tests.support import training_reference as reference
from tests.support.tiny_training import recipe_values

TIMESTEPS = torch.tensor([0, 3, 420, 999])
CONFIG = TransformerConfig(hidden_size=72, depth=3, num_heads=1, mlp_hidden=288, caption_channels=32)


@dataclass
class Start:
    """A base in a file and as diffusers' model, and what a step is given."""

    path: Path
    model: nn.Module
    batch: Batch
    noise: Tensor
    draws: Draws
    captions: dict[str, Any]  # of `reference.predict`

    def recipe(self, folder: Path, **changes: Any) -> Recipe:
        return make_recipe(recipe_values(folder, initialize=str(self.path), **{"objective": "denoise", **changes}), "r")


class NoSource:
    """A source that a method asks nothing but a few pictures to measure on."""

    null_context, feature_count = torch.zeros(1, 32), 0

    def __init__(self, batch: Batch) -> None:
        self.kept = batch

    def batch(self, settings: Any, stage: Any, draws: Draws) -> Batch:
        picked = [row % len(self.kept.latent) for row in draws.rows]
        return Batch(*(getattr(self.kept, name)[picked] for name in ("latent", "context", "mask", "size", "weight")), total=1.0)


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, micro: bool = False, captions: tuple[str, ...] | None = None) -> Start:
    family, rows = ("alpha", 120) if micro else ("sigma", 300)
    config = replace(CONFIG, micro_condition=micro, max_tokens=rows)
    monkeypatch.setattr(full, "get_variant", lambda name: Variant("demo", "tiny", family, 1024, rows, 0.13025, "demo", config))
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))
    monkeypatch.setattr(denoise, "draw_timesteps", lambda settings, draws: TIMESTEPS)
    sizes, diffusers, original = factory.tiny_weights(micro=micro, null_rows=rows, hidden=72, depth=3, captions=32)
    path = factory.write("safetensors", folder / "base", sizes, diffusers, original)
    model = factory.reference_model(sizes).requires_grad_(True)
    order = torch.Generator().manual_seed(7)
    latent, context = torch.randn(4, 4, 8, 8, generator=order), torch.randn(4, 5, 32, generator=order)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    size = torch.tensor([[64.0, 64], [64, 128], [128, 64], [96, 32]])
    draws = Draws(3, 0, 0, range(4))
    batch = Batch(latent, context, mask, size, torch.ones(4), 4.0, captions=captions)
    told = {"context": context, "mask": mask, **({"size": size} if micro else {})}
    return Start(path, model, batch, draws.normal("noise", (4, 8, 8)), draws, told)


def step(begun: Start, recipe: Recipe, prepare: Any = lambda network: None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network after a backward pass, and the named losses."""
    torch.manual_seed(0)
    method, objective, source = recipe.method.make(recipe), recipe.objective.make(), NoSource(begun.batch)
    network = method.build(source, torch.device("cpu"))
    prepare(network)
    model = objective.wrap(network, source)
    losses = objective.losses(recipe.objective.settings, model, method.conditions(network, begun.batch), begun.batch, begun.draws)
    sum(losses.values()).mean().backward()
    return network, losses


def expected_step(begun: Start, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's losses after a backward pass of its own."""
    errors, bounds = reference.losses(prediction, begun.batch.latent, begun.noise, TIMESTEPS)
    (errors + bounds).mean().backward()
    return errors, bounds


def predicted(begun: Start, model: nn.Module) -> Tensor:
    return reference.predict(model, reference.noisy(begun.batch.latent, begun.noise, TIMESTEPS).float(), TIMESTEPS, **begun.captions)


def assert_losses(losses: dict[str, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, wanted in zip(("noise_loss", "variance_loss"), expected):
        torch.testing.assert_close(losses[name].double(), wanted, rtol=1e-5, atol=1e-5)


def diffusers_gradients(model: nn.Module, depth: int = 3) -> dict[str, Tensor]:
    return factory.original_keys(reference.gradients(model.named_parameters()), depth)


def randomize(network: nn.Module) -> None:
    """Every matrix of an adapter, so that none is hidden behind a zero; by name, so that both sides agree."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            parameter.data = parameter.data * (1 + 0.1 * draw) if "magnitude" in name else 0.2 * draw
