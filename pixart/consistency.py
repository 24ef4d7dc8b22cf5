"""The DALL-E 3 consistency decoder for alpha's latents (SD1's): a two-step diffusion model in place of a VAE decoder.

diffusers' ConsistencyDecoderVAE, which also carries SD1's encoder; weights: openai/consistency-decoder.
"""
from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder_config import build_autoencoder
from .checkpoints.load import tensor_problems
from .checkpoints.parts import require_tensors
from .checkpoints.read import read_tensors
from .errors import CheckpointError, InputError, UnsupportedError
from .json_files import read_json

CLASS = "ConsistencyDecoderVAE"
MARKS = ("decoder_unet.conv_in.weight", "encoder.conv_in.weight")


class ConsistencyVae:
    """Pictures to SD1 VAE latents (not yet scaled for a model) and back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def pixels_per_latent(self) -> int:
        """How much smaller a latent's side is than the picture's."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 -> (B, 4, H/8, W/8), the mean of the distribution."""
        return self.module.encode(self._place(images) * 2 - 1).latent_dist.mode().float()

    @torch.no_grad()
    def decode(self, latents: Tensor, seed: int = 0) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 8h, 8w), fp32, in 0..1. The decoder's own noise is drawn from `seed`, on the CPU."""
        channels = self.module.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise InputError(
                f"latents have shape {tuple(latents.shape)}; expected (batch, {channels}, height/8, width/8): the consistency decoder "
                "is for PixArt-alpha's latents."
            )
        pictures = [  # one at a time: the same picture whatever the batch, and less memory
            self.module.decode(self._place(one[None]), generator=torch.Generator().manual_seed(seed)).sample for one in latents
        ]
        return (torch.cat(pictures).float() / 2 + 0.5).clamp(0, 1)

    def _place(self, tensor: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        return tensor.to(parameter.device, parameter.dtype)


def load_consistency_decoder(path: str | Path, dtype: torch.dtype = torch.float32) -> ConsistencyVae:
    """From diffusers' folder (config.json and weights) or its one file; raises CheckpointError or UnsupportedError."""
    try:
        from diffusers import ConsistencyDecoderVAE
    except ImportError:
        raise UnsupportedError("The consistency decoder needs the diffusers library: `pip install diffusers`.") from None
    path = Path(path)
    if _is_program(path):
        raise CheckpointError(
            f"{path}: OpenAI's own decoder.pt, a compiled program and not weights, so it was not loaded. Expected the diffusers form: "
            "download the folder openai/consistency-decoder from Hugging Face."
        )
    tensors = read_tensors(path).state_dict
    require_tensors(tensors, str(path))
    config: dict[str, Any] = read_json(path / "config.json", required=False) if path.is_dir() else {}
    if config and config.get("_class_name") != CLASS or not all(mark in tensors for mark in MARKS):
        raise CheckpointError(
            f"{path}: not the consistency decoder (its config names {config.get('_class_name', 'no class')}; first keys: "
            f"{', '.join(list(tensors)[:3])}). Give the diffusers folder or file of openai/consistency-decoder."
        )
    remedy = "Download openai/consistency-decoder again."
    module = build_autoencoder(ConsistencyDecoderVAE, config, path / "config.json", "consistency decoder", remedy)
    _check_weights(tensors, module, path)
    module.load_state_dict(tensors, strict=True)
    return ConsistencyVae(module.to(dtype).eval().requires_grad_(False))


def _is_program(path: Path) -> bool:
    """Whether a file is TorchScript: code beside the tensors."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_weights(tensors: Mapping[str, Tensor], module: nn.Module, path: Path) -> None:
    """Raises CheckpointError with all keys, shapes and values that are wrong."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = tensor_problems(tensors, expected)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path}: not a sound consistency decoder: {shown}. Download openai/consistency-decoder again.")
