"""The nodes of this pack; what ComfyUI's versions differ in lies in `host/`."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .controlnet import PixArtControlNetLoader, PixArtHED
from .few_steps import PixArtOneStep, PixArtTimesteps
from .guidance import PixArtPAG
from .host.demo_models import offer_demo_models
from .kv_compress import PixArtKVCompress
from .lora import PixArtLoraLoader
from .model import PixArtModelLoader
from .prompts import PixArtLoadPrompt, PixArtNegative, PixArtSavePrompt
from .resolution import PixArtCropToSize, PixArtResolution, PixArtSizeCondition
from .text import PixArtT5Loader, PixArtTextEncode
from .vae import PixArtConsistencyDecoder

NODES: tuple[type[io.ComfyNode], ...] = (
    PixArtModelLoader,
    PixArtT5Loader,
    PixArtTextEncode,
    PixArtResolution,
    PixArtCropToSize,
    PixArtSizeCondition,
    PixArtLoraLoader,
    PixArtPAG,
    PixArtControlNetLoader,
    PixArtHED,
    PixArtTimesteps,
    PixArtOneStep,
    PixArtConsistencyDecoder,
    PixArtNegative,
    PixArtSavePrompt,
    PixArtLoadPrompt,
    PixArtKVCompress,
)


class PixArtExtension(ComfyExtension):
    """What the host asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return list(NODES)


async def comfy_entrypoint() -> PixArtExtension:
    """Called by the host once, at start."""
    offer_demo_models()
    return PixArtExtension()
