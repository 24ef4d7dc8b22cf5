"""Loading the transformer."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pixart.checkpoints.detect import AUTO
from ..pixart.config import variant_names
from .host.dtypes import DEFAULT
from .host.files import choices, fingerprint, name_problem, resolve
from .host.loader import WEIGHT_DTYPES, load_model
from .host.menus import check_choice
from .host.schema import schema

FOLDER, COMPONENT = "diffusion_models", "transformer"


class PixArtModelLoader(io.ComfyNode):
    """A PixArt transformer as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Menus are read anew each time."""
        return schema(
            node_id="PixArtModelLoader",
            display_name="PixArt Model Loader",
            category="PixArt",
            description="Loads PixArt-alpha or PixArt-Sigma from an original .pth, a safetensors file with original or diffusers "
            "keys, or a diffusers folder. The log says what was detected, why, and which VAE it needs.",
            search_aliases=["pixart", "pixart sigma", "pixart alpha", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices(FOLDER, COMPONENT),
                    tooltip="A file or a diffusers folder under models/diffusion_models.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *variant_names()],
                    default=AUTO,
                    tooltip="auto reads everything from the file. Choose one where the weights can't tell: alpha-256 and alpha-512 look "
                    "alike, and so do alpha and Sigma in files without y_embedding.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default=DEFAULT,
                    tooltip="How weights are stored. default lets ComfyUI decide; fp8 takes half the memory of fp16.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: Any = None) -> bool | str:
        """Before anything runs; a linked name is looked up when it is known."""
        return name_problem(FOLDER, COMPONENT, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: Any = None, **_: Any) -> str:
        """Loads again when the file, or one of the folder, has changed."""
        return fingerprint(FOLDER, COMPONENT, model_name)

    @classmethod
    def execute(cls, model_name: str, variant: str, weight_dtype: str) -> io.NodeOutput:
        """Resolves the name, loads the model."""
        variant = check_choice("variant", variant, [AUTO, *variant_names()])
        weight_dtype = check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
        path = resolve(FOLDER, COMPONENT, model_name)
        return io.NodeOutput(load_model(str(path), variant, weight_dtype))
