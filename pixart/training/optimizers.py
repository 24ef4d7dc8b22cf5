"""The optimizers of a run: AdamW, or Muon for the blocks' matrices with AdamW for the rest."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ConfigError
from .recipe import Recipe


def make_optimizers(model: nn.Module, blocks: Iterable[nn.Module], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One or two optimizers that share a learning rate, for what `model` trains; `blocks` are the network's.

    muon: Jordan and others, "Muon", 2024, with steps scaled to AdamW's size (Liu and others, "Muon is
    scalable for LLM training", 2025).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = {"lr": recipe.learning_rate(0), "betas": recipe.betas, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(trained, **adam)]
    if recipe.optimizer != "muon":
        raise ConfigError(f"optimizer is {recipe.optimizer!r}; expected 'adamw' or 'muon'.")
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}; choose 'adamw'.")
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    taken = {id(weight) for weight in matrices}
    others = [parameter for parameter in trained if id(parameter) not in taken]
    muon = torch.optim.Muon(
        matrices, lr=adam["lr"], momentum=0.95, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, **adam)]
