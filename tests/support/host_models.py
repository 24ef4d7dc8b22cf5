"""Tiny random models as the host's MODEL and CONDITIONING, and one way to sample with them."""
from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.support import checkpoint_factory, host

CAPTIONS = 32  # width of the tiny models' captions
# Relative error of weights that the host adds up in the run: on a card in fp16
ADDED = 1e-3 if host.on_card() else 1e-4


def write_model(folder: Path, kind: str = "safetensors", **sizes: Any) -> Path:
    """A tiny random PixArt in one of checkpoint_factory.FORMATS."""
    return checkpoint_factory.write(kind, folder, *checkpoint_factory.tiny_weights(captions=CAPTIONS, **sizes))


def load_model(path: Path, variant: str = "auto", weight_dtype: str = "default") -> Any:
    """The pack's loader, below its node."""
    return host.pack_module("nodes.host.loader").load_model(str(path), variant, weight_dtype)


def captions(length: int, seed: int = 0, width: int = CAPTIONS, batch: int = 1) -> list:
    """CONDITIONING with random T5 states."""
    return [[torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)), {}]]


def noise(height: int = 8, width: int = 8, batch: int = 1, seed: int = 0) -> Tensor:
    """A latent of unit normal noise."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def sample(
    model: Any,
    positive: list,
    negative: list,
    latent: Tensor | None = None,
    *,
    steps: int = 3,
    cfg: float = 4.5,
    denoise: float = 1.0,
    mask: Tensor | None = None,
    sampler: str = "euler",
    last_step: int | None = None,
) -> Tensor:
    """Samples as the host's KSampler node does, through its `common_ksampler`."""
    given = {"samples": torch.zeros(1, 4, 8, 8) if latent is None else latent}
    if mask is not None:
        given["noise_mask"] = mask
    run = importlib.import_module("nodes").common_ksampler
    return run(model, 1, steps, cfg, sampler, "normal", positive, negative, given, denoise=denoise, last_step=last_step)[0]["samples"]


def forward(model: Any, latent: Tensor, timestep: Tensor, context: Tensor, **arguments: Any) -> Tensor:
    """The MODEL's network, called as the host calls it, on its device; the result on the CPU."""
    latent, timestep, context, arguments = to_device(model, (latent, timestep, context, arguments))
    with torch.no_grad():
        return model.model.diffusion_model(latent, timestep, context=context, **arguments).cpu()


def to_device(model: Any, values: Any) -> Any:
    """Tensors in any nest of containers, where the MODEL's weights are."""
    device = next(model.model.diffusion_model.parameters()).device
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm, wherever the tensors are; random models give latents in the hundreds."""
    found, expected = found.cpu(), expected.cpu()
    return float((found - expected).norm() / expected.norm())
