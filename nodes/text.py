"""Loading T5, and encoding prompts with it."""
from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from .host.files import choices, resolve
from .host.schema import schema
from .host.text_encoder import DEFAULT, DEVICES, PRECISIONS, load_t5
from .host.tokens import encode

FOLDER, COMPONENT = "text_encoders", "text_encoder"
SIGMA_TOKENS, MAX_TOKENS = 300, 4096
log = logging.getLogger(__name__)


class PixArtT5Loader(io.ComfyNode):
    """A T5 as CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Menus are read anew each time."""
        return schema(
            node_id="PixArtT5Loader",
            display_name="PixArt T5 Loader",
            category="PixArt",
            description="Loads the T5 text encoder that PixArt reads prompts with: T5-v1.1-XXL for the released models, "
            "as one file or as a Hugging Face folder with shards; smaller ones such as the demo's too.",
            search_aliases=["t5", "load clip", "text encoder", "t5xxl"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=choices(FOLDER, COMPONENT),
                    tooltip="A file or a Hugging Face folder under models/text_encoders.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=DEFAULT,
                    tooltip="How weights are kept; default is as in the file. fp8 halves the memory of fp16 "
                    "(T5-XXL: 4.9 instead of 9.5 GB).",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default=DEFAULT,
                    tooltip="cpu keeps T5 off the graphics card: slower prompts, more memory for the model.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, t5_name: str, precision: str, device: str) -> io.NodeOutput:
        """Resolves the name, loads the encoder."""
        path = resolve(FOLDER, COMPONENT, t5_name)
        return io.NodeOutput(load_t5(str(path), precision, device))


class PixArtTextEncode(io.ComfyNode):
    """A prompt as CONDITIONING, within the model's token limit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The limit is the model's, not the encoder's."""
        return schema(
            node_id="PixArtTextEncode",
            display_name="PixArt Text Encode",
            category="PixArt",
            description="Encodes a prompt with T5 and shows how many tokens it has, and which words were cut. "
            "(word:1.2) weights work as in CLIPTextEncode.",
            search_aliases=["prompt", "clip text encode", "token counter"],
            inputs=[
                io.Clip.Input("clip", tooltip="From PixArtT5Loader, or CLIPLoader with type pixart."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt; may be empty."),
                io.Int.Input(
                    "max_tokens",
                    default=SIGMA_TOKENS,
                    min=1,
                    max=MAX_TOKENS,
                    tooltip="Longest prompt the model was trained with: 300 for PixArt-Σ, 120 for PixArt-α.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, max_tokens: int) -> io.NodeOutput:
        """CONDITIONING; the count is shown on the node, a cut is logged."""
        encoded = encode(clip, text, max_tokens)
        if encoded.cut:
            log.warning(
                "PixArt: a prompt has %d tokens, the limit is %d. Left out: %s",
                encoded.count, max_tokens, encoded.cut,
            )  # fmt: skip
        return io.NodeOutput(encoded.conditioning, ui=ui.PreviewText(encoded.describe()))
