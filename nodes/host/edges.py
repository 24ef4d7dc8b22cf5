"""The HED network on the host's device."""
from __future__ import annotations

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...pixart.hed import load_hed

BYTES_PER_PIXEL = 1000  # three maps of 64 channels in fp32 in the first stage, the five read-outs, and the picture


@torch.inference_mode()
def detect_edges(images: Tensor, path: str) -> Tensor:
    """images: (B, H, W, C) in 0..1 -> (B, H, W, 3), white edges on black; one picture at a time."""
    device = management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(
        load_hed(path, comfy.ops.manual_cast), load_device=device, offload_device=management.unet_offload_device()
    )
    management.load_models_gpu([patcher], memory_required=images.shape[1] * images.shape[2] * BYTES_PER_PIXEL)
    pictures = images[..., :3].movedim(-1, 1).float()
    edges = [patcher.model(picture[None].to(device)).cpu() for picture in pictures]
    return torch.cat(edges).movedim(1, -1).repeat(1, 1, 1, 3).to(management.intermediate_device())
