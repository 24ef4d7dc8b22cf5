"""Whom a student in few steps learns from, and who can't be one."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..checkpoints import load_transformer
from ..config import TransformerConfig
from ..errors import ConfigError
from ..model import PixArtTransformer
from .initialize import is_dry
from .teacher import Teacher, set_teacher

FREE = ("compressed_blocks", "compression_mode", "max_tokens", "null_caption", "position_range")  # may differ from the student's


def make_teacher(network: nn.Module, path: str | None, objective: str) -> Teacher:
    """The network as it was before training, or the weights of a file, which may have other KV compression.

    Raises ConfigError for a file of another size, and for a network that can't be distilled.
    """
    student = _check_student(network, objective)
    if path is not None:
        teacher = _load(path, student)
        set_teacher(network, lambda: teacher)
    return Teacher(network)


def networks_of(teacher: Teacher) -> dict[str, nn.Module]:
    """The teacher as a companion, where it is a network of its own."""
    return {"teacher": teacher.network} if teacher.own else {}


def transformer_of(network: nn.Module) -> PixArtTransformer:
    """The transformer in training, with adapters in it or not."""
    return next(module for module in network.modules() if isinstance(module, PixArtTransformer))


def _check_student(network: nn.Module, objective: str) -> PixArtTransformer:
    if not isinstance(network, PixArtTransformer):
        raise ConfigError(
            f"Objective {objective} distils a transformer, in whole or as a LoRA; this run trains a {type(network).__name__}. "
            "Choose the method full, kv or lora, and leave text_rank at 0."
        )
    packed = [name for name, value in network.state_dict().items() if value.element_size() == 1 and value.dtype != torch.bool]
    if packed:
        raise ConfigError(
            f"Objective {objective} can't be trained over a quantized base ({packed[0]} has 8 bits or fewer): the teacher would be the "
            "rounded model, and the LoRA would learn its rounding too, which is wrong over whole weights. Leave base null, or choose bf16."
        )
    return network


def _load(path: str, student: PixArtTransformer) -> PixArtTransformer:
    if is_dry():
        return PixArtTransformer(student.config).requires_grad_(False)
    loaded = load_transformer(path, dtype=torch.float32)
    _check_sizes(path, loaded.config, student.config)
    config = replace(loaded.config, position_range=student.config.position_range)  # which weights can't tell
    teacher = PixArtTransformer(config, attention=student.blocks[0].attn.attention)
    teacher.load_state_dict(loaded.state_dict())
    return teacher


def _check_sizes(path: str, found: TransformerConfig, wanted: TransformerConfig) -> None:
    theirs, ours = found.to_dict(), wanted.to_dict()
    differing = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if name not in FREE and theirs[name] != ours[name]]
    if differing:
        raise ConfigError(
            f"The teacher {path} has another size than the model in training: {', '.join(differing)}. Give weights of the recipe's "
            "variant, or leave teacher out: then the run learns from the weights that it begins with."
        )
