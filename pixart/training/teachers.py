"""The frozen network that a student learns from."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..checkpoints import load_transformer
from ..config import TransformerConfig
from ..errors import ConfigError
from ..model import PixArtTransformer
from .companions import twin

FREE = ("compressed_blocks", "compression_mode", "max_tokens", "null_caption", "position_range")  # may differ from the student's


def make_teacher(network: nn.Module, path: str | None) -> nn.Module:
    """The network as it began, or the weights of a file, which may have other KV compression.

    Raises ConfigError for a file of another size.
    """
    if path is None:
        return twin(network)
    student = transformer_of(network)
    loaded = load_transformer(path, dtype=torch.float32)
    _check_sizes(path, loaded.config, student.config)
    config = replace(loaded.config, position_range=student.config.position_range)  # which weights can't tell
    teacher = PixArtTransformer(config, attention=student.blocks[0].attn.attention)
    teacher.load_state_dict(loaded.state_dict())
    return teacher.to(next(network.parameters()).device).requires_grad_(False).eval()


def check_unpacked(network: nn.Module, objective: str) -> None:
    """Raises ConfigError for adapters over weights in 8 or 4 bits."""
    if any(value.element_size() == 1 and value.dtype != torch.bool for value in (*network.parameters(), *network.buffers())):
        raise ConfigError(
            f"Objective {objective} can't be trained over a quantized base: the teacher would be the rounded model, and the LoRA would "
            "learn to undo the rounding, which is wrong over the whole weights. Give weights of 16 or 32 bits, and leave base null."
        )


def transformer_of(network: nn.Module) -> PixArtTransformer:
    """The transformer in training, whatever is around it."""
    return next(module for module in network.modules() if isinstance(module, PixArtTransformer))


def _check_sizes(path: str, found: TransformerConfig, wanted: TransformerConfig) -> None:
    theirs, ours = found.to_dict(), wanted.to_dict()
    differing = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if name not in FREE and theirs[name] != ours[name]]
    if differing:
        raise ConfigError(
            f"The teacher {path} has another size than the model in training: {', '.join(differing)}. Give weights of the recipe's "
            "variant, or leave teacher out: then the run learns from the weights that it begins with."
        )
