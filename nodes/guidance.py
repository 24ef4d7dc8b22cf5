"""Guidance that needs no second prompt."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pixart.guidance import PERTURBED_ATTENTION, SKIPPED_BLOCKS
from .host.guidance import guide_by_perturbation
from .host.menus import check_choice
from .host.schema import schema

KINDS = (PERTURBED_ATTENTION, SKIPPED_BLOCKS)


class PixArtPAG(io.ComfyNode):
    """Perturbed-attention or skip-layer guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Defaults are those of diffusers' example for PixArt-Sigma."""
        return schema(
            node_id="PixArtPAG",
            display_name="PixArt Perturbed-Attention Guidance",
            category="PixArt",
            description="Pushes each step away from a prediction whose structure was weakened in some blocks: clearer objects, "
            "also without CFG. Costs one more forward pass per step. ComfyUI's own PAG node has no effect on PixArt.",
            search_aliases=["pag", "perturbed attention guidance", "slg", "skip layer guidance"],
            inputs=[
                io.Model.Input("model", tooltip="From PixArtModelLoader."),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=PERTURBED_ATTENTION,
                    tooltip="What weakens the prediction: self-attention in which no token sees another, or no block at all.",
                ),
                io.String.Input(
                    "blocks", default="14", tooltip="Numbers of the blocks, from 0: 14, or 3, 10-12. PixArt has 0 to 27, the 900M 0 to 41."
                ),
                io.Float.Input("scale", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Strength; 0 is off."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="Part of sampling where it begins."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="Part of sampling where it ends."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, blocks: str, scale: float, start_percent: float, end_percent: float) -> io.NodeOutput:
        """A clone with the guidance."""
        kind = check_choice("kind", kind, KINDS)
        return io.NodeOutput(guide_by_perturbation(model, kind, blocks, scale, start_percent, end_percent))
