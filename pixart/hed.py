"""Soft edges: Holistically-Nested Edge Detection (Xie and Tu, 2015), as PixArt-delta's ControlNet was trained with.

The layout is that of `ControlNetHED.pth`: VGG-16's five stages of 3x3 convolutions, each read out by one
1x1 convolution, and a colour mean that is part of the weights.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints.load import tensor_problems
from .checkpoints.parts import require_tensors
from .checkpoints.read import read_tensors
from .errors import CheckpointError, InputError

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, number of convolutions
SMALLEST = 2 ** (len(STAGES) - 1)  # below this the last stage has no pixel


class Stage(nn.Module):
    """3x3 convolutions with ReLU, and their read-out."""

    def __init__(self, channels: int, width: int, count: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            operations.Conv2d(channels if i == 0 else width, width, kernel_size=3, padding=1, **factory) for i in range(count)
        )
        self.projection = operations.Conv2d(width, 1, kernel_size=1, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> features (B, width, h, w), edges (B, 1, h, w)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HedNetwork(nn.Module):
    """Edge map of a picture."""

    def __init__(self, operations: Any = nn, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1, **factory))
        channels = 3
        for number, (width, count) in enumerate(STAGES, start=1):
            self.add_module(f"block{number}", Stage(channels, width, count, operations, **factory))
            channels = width

    @property
    def stages(self) -> list[Stage]:
        """In the order they run."""
        return [getattr(self, f"block{number}") for number in range(1, len(STAGES) + 1)]

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 -> edges (B, 1, H, W) in 0..1: the sigmoid of the five read-outs' mean."""
        size = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or min(size) < SMALLEST:
            raise InputError(f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width), sides of {SMALLEST} or more.")
        x = images * 255 - self.norm.to(images)
        read = []
        for index, stage in enumerate(self.stages):
            x, edges = stage(F.max_pool2d(x, kernel_size=2) if index else x)
            read.append(F.interpolate(edges, size=size, mode="bilinear", align_corners=False, antialias=True))
        return torch.cat(read, dim=1).mean(dim=1, keepdim=True).sigmoid()


def prepare_hed(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a ControlNetHED.pth, checked; raises CheckpointError with all that is wrong."""
    require_tensors(state_dict, source)
    tensors = {key.removeprefix("module."): value for key, value in state_dict.items()}
    expected = {key: tuple(value.shape) for key, value in HedNetwork(device="meta").state_dict().items()}
    problems = tensor_problems(tensors, expected)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"{source}: not the HED network ({shown}). Give ControlNetHED.pth from PixArt-alpha/PixArt-alpha on Hugging Face."
        )
    return tensors


def load_hed(path: str | Path, operations: Any = nn) -> HedNetwork:
    """The network from the user's ControlNetHED.pth (read without running code) or its safetensors copy, in fp32."""
    raw = read_tensors(path)
    tensors = prepare_hed(raw.state_dict, raw.source)
    model = HedNetwork(operations, device="meta")
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()
