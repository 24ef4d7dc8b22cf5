"""Tiny random VAEs of diffusers' own classes."""
from __future__ import annotations

import torch

SD1, SDXL = 0.18215, 0.13025


def tiny_kl(scaling_factor: float = SDXL) -> torch.nn.Module:
    """An AutoencoderKL of four stages."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=32,
        scaling_factor=scaling_factor,
    ).eval()


def tiny_taesd() -> torch.nn.Module:
    """An AutoencoderTiny."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).eval()
