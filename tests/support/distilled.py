"""Tiny students with weights that say something, and batches to distil them on."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pixart.config import TransformerConfig
from pixart.model import PixArtTransformer
from pixart.training.adapters import Adaptation, add_adapters, choose_layers
from pixart.training.batch import Batch
from tests.support.tiny_training import TINY

ALPHA = replace(TINY, micro_condition=True)
COMPRESSED = replace(TINY, compressed_blocks=((1, 2),))


class NullSource:
    """Of an empty caption that is longer than some captions."""

    null_context = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    feature_count = 0


def network_of(config: TransformerConfig = TINY, seed: int = 0, lora: int = 0) -> PixArtTransformer:
    """Random weights, all of them large enough to matter; lora: rank of adapters beside the frozen network, which change it."""
    torch.manual_seed(seed)
    network = PixArtTransformer(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.5 / parameter[0].numel() ** 0.5))
    if lora:
        add_adapters(network, Adaptation("lora", lora, lora), choose_layers(network, "attention+mlp", None))
    return network


def move(network: torch.nn.Module, scale: float = 0.05, seed: int = 9) -> None:
    """Weights as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def batch_of(config: TransformerConfig = TINY, count: int = 4, side: int = 8) -> Batch:
    """Random latents, captions of one and two tokens, sizes of their own."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True, True], [True, False]]).repeat(count // 2, 1)
    latent, context = torch.randn(count, 4, side, side, generator=generator), torch.randn(count, 2, 8, generator=generator)
    size = torch.tensor([[64.0, 96.0]]).repeat(count, 1) + torch.arange(count)[:, None]
    return Batch(latent, context, mask, size, torch.ones(count), float(count))


def conditions_of(config: TransformerConfig, batch: Batch) -> dict[str, Any]:
    """What `methods.full` tells the network."""
    return {"context": batch.context, "context_mask": batch.mask, **({"size": batch.size} if config.micro_condition else {})}


def gradients(loss: torch.Tensor, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of what is trained, by name; zeros where there is none."""
    named = {name: value for name, value in network.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in zip(named.items(), found)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Gradients to 1e-5 of the largest, every one of them."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * largest, name
