"""Sizes: the trained bins, the way back from them, and the size that alpha-1024 is told."""
from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..pixart.bins import MAX_SIDE, base_sizes, check_size, nearest_bin, resize_and_crop
from .host.conds import with_size
from .host.latent import empty_latent
from .host.menus import check_choice, check_number, choice_problem
from .host.schema import schema

DEFAULT_BASE = "1024"
MAX_BATCH = 4096


def _bases() -> list[str]:
    return [str(base) for base in base_sizes()]


def _side(name: str, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=1024, min=1, max=MAX_SIDE, tooltip=tooltip)


class PixArtResolution(io.ComfyNode):
    """An empty latent of the trained size nearest to the wanted one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """base is the model's own size."""
        return schema(
            node_id="PixArtResolution",
            display_name="PixArt Resolution",
            category="PixArt",
            description="Makes an empty latent in the trained size (aspect-ratio bin) nearest to the size you want. "
            "PixArtCropToSize then brings the picture to exactly your size.",
            search_aliases=["aspect ratio bins", "empty latent pixart", "resolution"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=_bases(),
                    default=DEFAULT_BASE,
                    tooltip="The size the model was trained at: 512 for Sigma-512 and alpha-512, 2048 for Sigma-2K, 256 for the demo ...",
                ),
                _side("width", "Wanted width in pixels."),
                _side("height", "Wanted height in pixels."),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, tooltip="Pictures per run."),
            ],
            outputs=[
                io.Latent.Output(),
                io.Int.Output("bin_width", display_name="width", tooltip="Width of the bin in pixels."),
                io.Int.Output("bin_height", display_name="height", tooltip="Height of the bin in pixels."),
            ],
        )

    @classmethod
    def validate_inputs(cls, base: Any = None) -> bool | str:
        """Clients send the number as well as its text."""
        return choice_problem("base", base, _bases())

    @classmethod
    def execute(cls, base: str | int, width: int, height: int, batch_size: int) -> io.NodeOutput:
        """(LATENT, width, height)."""
        size = nearest_bin(int(check_choice("base", base, _bases())), width, height)
        batch_size = check_number("batch_size", batch_size, 1, MAX_BATCH, whole=True)
        return io.NodeOutput(empty_latent(size.width, size.height, batch_size), size.width, size.height)


class PixArtCropToSize(io.ComfyNode):
    """From a bin back to the wanted size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As the reference pipeline's resize and centre crop."""
        return schema(
            node_id="PixArtCropToSize",
            display_name="PixArt Crop To Size",
            category="PixArt",
            description="Scales the picture until it covers the size you want and crops the centre, as the reference "
            "pipeline does after sampling in a bin.",
            search_aliases=["resize and crop", "center crop"],
            inputs=[
                io.Image.Input("image"),
                _side("width", "Width of the result in pixels."),
                _side("height", "Height of the result in pixels."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, width: int, height: int) -> io.NodeOutput:
        """image: (B, H, W, C)."""
        cropped = resize_and_crop(image.movedim(-1, 1), width, height)
        return io.NodeOutput(cropped.movedim(1, -1).contiguous())


class PixArtSizeCondition(io.ComfyNode):
    """Tells alpha-1024 a size other than the latent's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Other models don't read it."""
        return schema(
            node_id="PixArtSizeCondition",
            display_name="PixArt Size Condition",
            category="PixArt",
            description="Sets the picture size that PixArt-alpha 1024 is told. Without this node it is the size of "
            "the latent. Other PixArt models have no such input and ignore it.",
            search_aliases=["micro conditioning", "resolution conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning"),
                _side("width", "The width, in pixels, to tell the model."),
                _side("height", "The height, in pixels, to tell the model."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: list, width: int, height: int) -> io.NodeOutput:
        """A copy of the conditioning with the size set."""
        width, height = check_size(width, height)
        return io.NodeOutput(with_size(conditioning, width, height))
