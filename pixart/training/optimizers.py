"""The optimizers of a run, each from the library that keeps it."""
from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .recipe import Recipe

SHARDED = ("adamw", "muon")  # those that can step with slices of tensors (FSDP2)
BY_PARAMETER = ("adamw", "adamw8bit", "muon")  # those whose steps of one parameter don't depend on the others
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # of bitsandbytes: smaller tensors stay in 32 bits; values that share a scale
THIRD_BETA = 0.9999  # of CAME (Luo and others, 2023), as in the recipes of PixArt-Sigma


def make_optimizers(model: nn.Module, blocks: Iterable[nn.Module], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One or two optimizers that share a learning rate, for what `model` trains; `blocks` are the network's.

    Raises ConfigError where a library is missing or the recipe asks for what the optimizer doesn't have.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"Method {recipe.method.name} trains nothing with these settings; choose what it trains.")
    if len(recipe.betas) == 3 and recipe.optimizer != "came":
        raise ConfigError(f"betas are {list(recipe.betas)}; only came has a third, optimizer {recipe.optimizer!r} takes two.")
    if recipe.shard and recipe.optimizer not in SHARDED:
        raise ConfigError(f"optimizer {recipe.optimizer!r} can't be sharded; choose one of {', '.join(SHARDED)}, or shard false.")
    shared = {"lr": recipe.learning_rate(0), "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.epsilon is not None:
        shared["eps"] = recipe.epsilon
    make = {"adamw": _adamw, "adamw8bit": _adamw_8bit, "came": _came, "prodigy": _prodigy}
    if recipe.optimizer != "muon":
        return [make[recipe.optimizer](trained, shared, recipe)]
    matrices = block_matrices(blocks)
    taken = {id(weight) for weight in matrices}
    others = [parameter for parameter in trained if id(parameter) not in taken]
    return [*_muon(matrices, shared), *([_adamw(others, shared, recipe)] if others else [])]


def block_matrices(blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The trained matrices of linear layers in blocks, which Muon takes."""
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def state_bytes(optimizer: str, trained: list[nn.Parameter], matrices: list[nn.Parameter]) -> int:
    """What the recipe's optimizer keeps beside parameters of these shapes; matrices: those that Muon takes."""
    own = {id(weight) for weight in matrices}

    def each(parameter: nn.Parameter) -> float:
        count, width = parameter.numel(), parameter.element_size()
        if optimizer == "adamw8bit" and count >= SMALLEST_8BIT:
            return 2 * count + 8 * count / BLOCK_8BIT  # two moments, two fp32 scales a block
        if optimizer == "came" and parameter.ndim >= 2:
            rows, columns = count / parameter.shape[-1], count / parameter.shape[-2]
            return width * (count + 2 * (rows + columns))
        return width * count * {"prodigy": 4, "muon": 1 if id(parameter) in own else 2}.get(optimizer, 2)

    return round(sum(map(each, trained)))


def _adamw(trained: list[nn.Parameter], shared: dict[str, Any], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained, **shared, fused=True)


def _adamw_8bit(trained: list[nn.Parameter], shared: dict[str, Any], recipe: Recipe) -> torch.optim.Optimizer:
    """Dettmers and others, "8-bit Optimizers via Block-wise Quantization", 2021."""
    return _library("bitsandbytes", "bitsandbytes", recipe).optim.AdamW8bit(trained, **shared)


def _came(trained: list[nn.Parameter], shared: dict[str, Any], recipe: Recipe) -> torch.optim.Optimizer:
    """Luo and others, "CAME: Confidence-guided Adaptive Memory Efficient Optimization", 2023."""
    if "eps" in shared:
        raise ConfigError("epsilon is set, and optimizer 'came' has two of its own; leave epsilon out.")
    betas = (*recipe.betas, THIRD_BETA)[:3]
    return _library("pytorch_optimizer", "pytorch-optimizer", recipe).CAME(trained, **{**shared, "betas": betas})


def _prodigy(trained: list[nn.Parameter], shared: dict[str, Any], recipe: Recipe) -> torch.optim.Optimizer:
    """Mishchenko and Defazio, "Prodigy", 2023, which finds its step size itself: its learning rate is 1."""
    module = _library("pytorch_optimizer", "pytorch-optimizer", recipe)
    return module.Prodigy(trained, **shared, bias_correction=True, safeguard_warmup=recipe.warmup_steps > 0)


def _muon(matrices: list[nn.Parameter], shared: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Jordan and others, "Muon", 2024, with steps scaled to AdamW's size (Liu and others, "Muon is scalable for LLM training", 2025)."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}; choose 'adamw'.")
    if not matrices:
        raise ConfigError("optimizer 'muon' found no matrices of blocks in training; choose 'adamw'.")
    settings = {"lr": shared["lr"], "weight_decay": shared["weight_decay"], "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, **settings)]


def _library(name: str, package: str, recipe: Recipe) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"optimizer {recipe.optimizer!r} needs the Python package {package} ({error}); `pip install {package}`, or choose 'adamw'."
        ) from None
