"""Loading T5, and encoding prompts with it."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..pixart.errors import InputError
from ..pixart.logs import get_logger
from .host.dtypes import DEFAULT
from .host.family import SIGMA_TOKENS, max_tokens_of
from .host.files import choices, fingerprint, name_problem, resolve
from .host.menus import check_choice
from .host.schema import schema
from .host.text_encoder import DEVICES, PRECISIONS, load_t5
from .host.tokens import encode, prepare_text

FOLDER, COMPONENT = "text_encoders", "text_encoder"
AUTO, MAX_TOKENS = "auto", 4096
log = get_logger(__name__)


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
            "as one file or as a Hugging Face folder with shards. Smaller T5s, such as the demo's, load too.",
            search_aliases=["t5", "load clip", "text encoder", "t5xxl"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=choices(FOLDER, COMPONENT),
                    tooltip="A file or a Hugging Face folder under models/text_encoders; may be quantized.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=DEFAULT,
                    tooltip="How weights are stored; default is as in the file. T5-XXL takes 9.5 GB in bf16 and fp16, 4.9 in fp8 "
                    "and int8, 2.7 in nf4 and fp4. int8, nf4 and fp4 need: pip install bitsandbytes",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default=DEFAULT,
                    tooltip="cpu keeps T5 off the graphics card: prompts are slower, but more memory is left for the model.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, t5_name: Any = None) -> bool | str:
        """Before anything runs; a linked name is looked up when it is known."""
        return name_problem(FOLDER, COMPONENT, t5_name)

    @classmethod
    def fingerprint_inputs(cls, t5_name: Any = None, **_: Any) -> str:
        """Loads again when the file, or one of the folder, has changed."""
        return fingerprint(FOLDER, COMPONENT, t5_name)

    @classmethod
    def execute(cls, t5_name: str, precision: str, device: str) -> io.NodeOutput:
        """Resolves the name, loads the encoder."""
        precision = check_choice("precision", precision, PRECISIONS)
        device = check_choice("device", device, DEVICES)
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
                io.Combo.Input(
                    "max_tokens",
                    options=[AUTO, "120", "300"],
                    default=AUTO,
                    tooltip="Token limit: 300 for PixArt-Sigma, 120 for PixArt-alpha. auto takes the connected model's limit, else 300.",
                ),
                io.Boolean.Input(  # optional, as all that came later: graphs in API format don't name it
                    "clean_caption",
                    optional=True,
                    default=False,
                    tooltip="Cleans the prompt as the reference cleans captions: no HTML, web addresses or brackets, all lower case. "
                    "Weights such as (word:1.2) are lost. Needs: pip install ftfy beautifulsoup4",
                ),
                io.Boolean.Input(
                    "lower_case",
                    optional=True,
                    default=False,
                    tooltip="Makes the prompt lower case, as diffusers does; the Sigma repository doesn't.",
                ),
                io.Model.Input("model", optional=True, tooltip="The model you will draw with; max_tokens auto takes its limit."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, max_tokens: str | int | None = None) -> bool | str:
        """Any number is fine: graphs made before there was a menu hold one. None is a linked input, not known yet."""
        try:
            if max_tokens is not None:
                token_limit(max_tokens, None)
        except InputError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        max_tokens: str | int = AUTO,
        clean_caption: bool = False,
        lower_case: bool = False,
        model: Any = None,
    ) -> io.NodeOutput:
        """CONDITIONING; the count is shown on the node, a cut is logged."""
        limit = token_limit(max_tokens, model)
        encoded = encode(clip, prepare_text(text, clean_caption, lower_case), limit)
        if encoded.cut:
            log.warning(
                "PixArt: a prompt has %d tokens, the limit is %d. Left out: %s",
                encoded.count, limit, encoded.cut,
            )  # fmt: skip
        return io.NodeOutput(encoded.conditioning, ui=ui.PreviewText(encoded.describe()))


def token_limit(wanted: str | int, model: Any | None) -> int:
    """auto: the model's, or Sigma's without one. Raises InputError for what is no number from 1 to MAX_TOKENS."""
    if wanted == AUTO:
        return SIGMA_TOKENS if model is None else max_tokens_of(model)
    try:
        limit = int(wanted)
    except (TypeError, ValueError):
        limit = 0
    if not 1 <= limit <= MAX_TOKENS:
        raise InputError(f"max_tokens is {wanted}; expected {AUTO}, or 1 to {MAX_TOKENS}: at least the end token.")
    return limit
