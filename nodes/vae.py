"""Decoders that the host doesn't know."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host.consistency import load_decoder
from .host.files import choices, fingerprint, name_problem, resolve
from .host.schema import schema

FOLDER, COMPONENT = "vae", "vae"


class PixArtConsistencyDecoder(io.ComfyNode):
    """The DALL-E 3 consistency decoder as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Menus are read anew each time."""
        return schema(
            node_id="PixArtConsistencyDecoder",
            display_name="PixArt Consistency Decoder",
            category="PixArt",
            description="Loads the DALL-E 3 consistency decoder as VAE for PixArt-alpha: better faces and lettering than SD1's decoder, "
            "but slower. Not for Sigma, which uses SDXL's latents. Needs the Python package diffusers.",
            search_aliases=["dall-e 3 decoder", "consistency vae", "load vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=choices(FOLDER, COMPONENT),
                    tooltip="The diffusers folder or file of openai/consistency-decoder under models/vae.",
                ),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, vae_name: Any = None) -> bool | str:
        """Before anything runs; a linked name is looked up when it is known."""
        return name_problem(FOLDER, COMPONENT, vae_name)

    @classmethod
    def fingerprint_inputs(cls, vae_name: Any = None, **_: Any) -> str:
        """Loads again when the file, or one of the folder, has changed."""
        return fingerprint(FOLDER, COMPONENT, vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        """Resolves the name, loads the decoder."""
        return io.NodeOutput(load_decoder(str(resolve(FOLDER, COMPONENT, vae_name))))
