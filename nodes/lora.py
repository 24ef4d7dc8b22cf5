"""LoRA and its kin, in every format that trainers of PixArt write."""
from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..pixart.adapters.settings import CONFIG_NAME
from ..pixart.logs import get_logger
from ..pixart.sampling_note import read_note
from .host.files import choices, fingerprint, name_problem, resolve
from .host.lora import apply_lora
from .host.menus import check_number
from .host.schema import schema

FOLDER, COMPONENT = "loras", "transformer"
LARGEST = 100.0
log = get_logger(__name__)


class PixArtLoraLoader(io.ComfyNode):
    """A LoRA on MODEL, and on CLIP if one is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Menus are read anew each time."""
        return schema(
            node_id="PixArtLoraLoader",
            display_name="PixArt LoRA Loader",
            category="PixArt",
            description="Applies a LoRA, LoHa, LoKr, DoRA, OFT, BOFT or (IA)^3 trained on PixArt: files of diffusers, PEFT, kohya, "
            "OneTrainer, SimpleTuner, LyCORIS and ComfyUI's TrainLoraNode, and PEFT folders. It is applied in full, or refused "
            "with a list of what doesn't fit.",
            search_aliases=["lora", "load lora", "lycoris", "dora", "oft", "peft", "onetrainer"],
            inputs=[
                io.Model.Input("model", tooltip="From PixArtModelLoader, or another PixArt loader."),
                io.Combo.Input(
                    "lora_name",
                    options=choices(FOLDER, COMPONENT, CONFIG_NAME),
                    tooltip="A file or a PEFT folder (with adapter_config.json) under models/loras.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-LARGEST, max=LARGEST, step=0.01,
                    tooltip="How strongly the model is changed: 0 is off, 1 is as trained, negative values do the opposite.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Only for a LoRA with T5 layers (OneTrainer's lora_te)."),
                io.Float.Input(
                    "strength_clip", default=1.0, min=-LARGEST, max=LARGEST, step=0.01, optional=True,
                    tooltip="How strongly T5 is changed. Without a CLIP, set 0 to leave out a LoRA's T5 layers.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(tooltip="Empty if no CLIP is connected.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, lora_name: Any = None) -> bool | str:
        """Before anything runs; a linked name is looked up when it is known."""
        return name_problem(FOLDER, COMPONENT, lora_name, CONFIG_NAME)

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = None, **_: Any) -> str:
        """Loads again when the file, or one of the folder, has changed."""
        return fingerprint(FOLDER, COMPONENT, lora_name, CONFIG_NAME)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float, clip: Any = None, strength_clip: float = 1.0) -> io.NodeOutput:
        """Clones with patches; what was applied is shown on the node and logged, as a warning where keys are left."""
        strength = check_number("strength", strength, -LARGEST, LARGEST)
        strength_clip = check_number("strength_clip", strength_clip, -LARGEST, LARGEST)
        path = resolve(FOLDER, COMPONENT, lora_name, CONFIG_NAME)
        model, clip, fit = apply_lora(model, clip, path, strength, strength_clip)
        log.log(logging.WARNING if fit.left else logging.INFO, "PixArt LoRA %s", fit.describe())
        note = read_note(path)
        told = fit.describe() if note is None else f"{fit.describe()}\n{note.describe()}"
        if note is not None:
            log.info("PixArt LoRA %s: %s", path.name, note.describe())
        return io.NodeOutput(model, clip, ui=ui.PreviewText(told))
