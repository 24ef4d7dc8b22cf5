"""Encoded prompts in files, and the three ways to say "no prompt"."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..pixart.errors import InputError
from .host import prompts
from .host.family import max_tokens_of, null_caption_of
from .host.files import stamp
from .host.menus import check_choice
from .host.schema import schema
from .host.tokens import encode, encode_padded_end

DIFFUSERS, SIGMA, ALPHA = "one token (diffusers)", "prompt length (Sigma repository)", "null embedding (alpha repository)"
CONVENTIONS = (DIFFUSERS, SIGMA, ALPHA)


class PixArtNegative(io.ComfyNode):
    """The unconditional side of guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What a convention doesn't use may stay unconnected."""
        return schema(
            node_id="PixArtNegative",
            display_name="PixArt Empty Negative",
            category="PixArt",
            description="The empty negative prompt, in one of the three forms that PixArt implementations use. Each changes the "
            "picture a little; none is right or wrong.",
            search_aliases=["negative prompt", "unconditional", "null embedding", "empty prompt"],
            inputs=[
                io.Combo.Input(
                    "convention",
                    options=list(CONVENTIONS),
                    default=DIFFUSERS,
                    tooltip="one token: the end token alone, as diffusers and ComfyUI do (needs clip). prompt length: padded to "
                    "the length of the positive prompt, as the Sigma repository does (needs clip and positive). null embedding: "
                    "what replaced dropped captions in training, as the alpha repository does (needs model and positive).",
                ),
                io.Clip.Input("clip", optional=True, tooltip="From PixArtT5Loader, or CLIPLoader with type pixart."),
                io.Conditioning.Input("positive", optional=True, tooltip="The positive prompt; its length is used."),
                io.Model.Input("model", optional=True, tooltip="From PixArtModelLoader; holds the null embedding."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, convention: str, clip: Any = None, positive: list | None = None, model: Any = None) -> io.NodeOutput:
        """CONDITIONING of no prompt."""
        convention = check_choice("convention", convention, CONVENTIONS)
        if convention == DIFFUSERS:
            return io.NodeOutput(encode(cls._given(clip, "clip", convention), "", 1).conditioning)
        length = prompts.tokens_of(cls._given(positive, "positive", convention))
        if convention == SIGMA:
            return io.NodeOutput(encode_padded_end(cls._given(clip, "clip", convention), length))
        model = cls._given(model, "model", convention)
        limit = max_tokens_of(model)
        if length > limit:
            raise InputError(f"The positive prompt has {length} tokens, the null embedding {limit}; encode it with max_tokens {limit}.")
        return io.NodeOutput([[null_caption_of(model)[None, :length], {"pooled_output": None}]])

    @staticmethod
    def _given(value: Any, name: str, convention: str) -> Any:
        if value is None:
            raise InputError(f"The convention {convention!r} needs {name}: connect it, or choose {DIFFUSERS!r}.")
        return value


class PixArtSavePrompt(io.ComfyNode):
    """CONDITIONING to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Runs for its file, so it is an output node."""
        return schema(
            node_id="PixArtSavePrompt",
            display_name="PixArt Save Prompt",
            category="PixArt",
            description="Saves an encoded prompt to output/prompts. PixArt Load Prompt loads it again without T5. "
            "pixart.Pipeline reads the same files.",
            search_aliases=["cache prompt", "save conditioning", "prompt embeds"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="One prompt, from PixArtTextEncode or any T5 encoding."),
                io.String.Input("filename_prefix", default=prompts.DEFAULT_NAME, tooltip="Name in output/prompts; a number is added."),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="Stored in the file for you to read; empty: PixArtTextEncode's text."
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list, filename_prefix: str, prompt: str = "") -> io.NodeOutput:
        """Shows the name it was given."""
        path = prompts.save(conditioning, filename_prefix, prompt)
        return io.NodeOutput(ui=ui.PreviewText(f"{path.parent.name}/{path.name}"))


class PixArtLoadPrompt(io.ComfyNode):
    """CONDITIONING from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Menus are read anew each time."""
        return schema(
            node_id="PixArtLoadPrompt",
            display_name="PixArt Load Prompt",
            category="PixArt",
            description="Loads a prompt that PixArt Save Prompt or `python -m pixart encode` wrote. No text encoder is loaded.",
            search_aliases=["cached prompt", "load conditioning", "prompt embeds"],
            inputs=[
                io.Combo.Input(
                    "prompt_file", options=prompts.choices(), tooltip="A .safetensors file in input/prompts or output/prompts."
                ),
                io.Model.Input("model", optional=True, tooltip="If connected, a file made with another T5 is refused right here."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, prompt_file: Any = None) -> bool | str:
        """Files written since the page was loaded are fine; None is a linked input, not known yet."""
        try:
            if prompt_file is not None:
                prompts.resolve(prompt_file)
        except InputError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, prompt_file: Any = None, **_: Any) -> str:
        """Runs again when the file changes; "" for a linked input, or a file that is gone."""
        try:
            return "" if prompt_file is None else stamp(prompts.resolve(prompt_file))
        except InputError:
            return ""

    @classmethod
    def execute(cls, prompt_file: str, model: Any = None) -> io.NodeOutput:
        """CONDITIONING; prompt and encoder are shown on the node."""
        conditioning, shown = prompts.load(prompts.resolve(prompt_file), model)
        return io.NodeOutput(conditioning, ui=ui.PreviewText(shown))
