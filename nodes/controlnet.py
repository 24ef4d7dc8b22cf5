"""ControlNets, and the edge maps they were trained on."""
from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .host.controlnet import load_control
from .host.edges import detect_edges
from .host.files import choices, fingerprint, name_problem, resolve
from .host.schema import schema

FOLDER, COMPONENT = "controlnet", "controlnet"


class PixArtControlNetLoader(io.ComfyNode):
    """A PixArt ControlNet as CONTROL_NET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Menus are read anew each time."""
        return schema(
            node_id="PixArtControlNetLoader",
            display_name="PixArt ControlNet Loader",
            category="PixArt",
            description="Loads a ControlNet for PixArt: PixArt-delta's (.pth, with or without the base model inside), or an adapter "
            "trained with diffusers' example or SimpleTuner. Apply it with ControlNetApplyAdvanced and the model's VAE.",
            search_aliases=["controlnet", "load controlnet", "pixart delta"],
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=choices(FOLDER, COMPONENT),
                    tooltip="A file or a diffusers folder under models/controlnet.",
                ),
            ],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def validate_inputs(cls, control_net_name: Any = None) -> bool | str:
        """Before anything runs; a linked name is looked up when it is known."""
        return name_problem(FOLDER, COMPONENT, control_net_name)

    @classmethod
    def fingerprint_inputs(cls, control_net_name: Any = None, **_: Any) -> str:
        """Loads again when the file, or one of the folder, has changed."""
        return fingerprint(FOLDER, COMPONENT, control_net_name)

    @classmethod
    def execute(cls, control_net_name: str) -> io.NodeOutput:
        """Resolves the name, loads the ControlNet."""
        return io.NodeOutput(load_control(str(resolve(FOLDER, COMPONENT, control_net_name))))


class PixArtHED(io.ComfyNode):
    """Soft edges of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Weights come from the user's ControlNetHED.pth."""
        return schema(
            node_id="PixArtHED",
            display_name="PixArt HED Edges",
            category="PixArt",
            description="Draws the soft edges of a picture with the HED network. PixArt-delta's ControlNet was trained on such edges. "
            "Needs ControlNetHED.pth in models/controlnet.",
            search_aliases=["hed", "soft edge", "edge map", "controlnet preprocessor"],
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input(
                    "hed_name",
                    options=choices(FOLDER, COMPONENT),
                    tooltip="ControlNetHED.pth under models/controlnet.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, hed_name: Any = None) -> bool | str:
        """Before anything runs; a linked name is looked up when it is known."""
        return name_problem(FOLDER, COMPONENT, hed_name)

    @classmethod
    def fingerprint_inputs(cls, hed_name: Any = None, **_: Any) -> str:
        """Loads again when the file, or one of the folder, has changed."""
        return fingerprint(FOLDER, COMPONENT, hed_name)

    @classmethod
    def execute(cls, image: torch.Tensor, hed_name: str) -> io.NodeOutput:
        """image: (B, H, W, C) -> (B, H, W, 3), white edges on black."""
        return io.NodeOutput(detect_edges(image, str(resolve(FOLDER, COMPONENT, hed_name))))
