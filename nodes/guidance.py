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
            description="Makes objects clearer, with or without CFG: pushes each step away from a deliberately weakened prediction. "
            "Costs one more forward pass per step. ComfyUI's own PAG node has no effect on PixArt.",
            search_aliases=["pag", "perturbed attention guidance", "slg", "skip layer guidance"],
            inputs=[
                io.Model.Input("model", tooltip="From PixArtModelLoader."),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=PERTURBED_ATTENTION,
                    tooltip="How the chosen blocks are weakened: each token sees only itself, or the blocks are skipped.",
                ),
                io.String.Input(
                    "blocks", default="14", tooltip="Block numbers, from 0: 14, or 3, 10-12. PixArt has 0 to 27, the 900M 0 to 41."
                ),
                io.Float.Input("scale", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Strength; 0 is off."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="Where in sampling it starts."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="Where in sampling it ends."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, blocks: str, scale: float, start_percent: float, end_percent: float) -> io.NodeOutput:
        """A clone with the guidance."""
        kind = check_choice("kind", kind, KINDS)
        return io.NodeOutput(guide_by_perturbation(model, kind, blocks, scale, start_percent, end_percent))
