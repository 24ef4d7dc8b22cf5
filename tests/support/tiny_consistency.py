"""A tiny random consistency decoder, and its folder as diffusers writes it."""
from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@cache
def tiny_decoder() -> torch.nn.Module:
    """diffusers' class with narrow layers and the true number of stages."""
    from diffusers import ConsistencyDecoderVAE

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ConsistencyDecoderVAE(
            encoder_block_out_channels=(32, 32, 32, 32), encoder_layers_per_block=1, decoder_block_out_channels=(32, 32, 32, 32),
            decoder_layers_per_block=1,
        )  # fmt: skip
    return module.eval().requires_grad_(False)


def write_decoder(folder: Path, leave_out: str = "") -> Path:
    """config.json and weights, less one key."""
    tiny_decoder().save_pretrained(folder)
    if leave_out:
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file({key: value.clone() for key, value in load_file(file).items() if key != leave_out}, file)
    return folder
