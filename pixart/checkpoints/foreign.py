"""Names what a weight file is when it is not a PixArt transformer, and which loader takes it."""
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Foreign(NamedTuple):
    """A kind of file, the key parts that betray it, and what to do with it."""

    kind: str
    markers: tuple[tuple[str, ...], ...]  # any group, all of whose parts occur in the keys
    advice: str


# Libraries that pickle quantized weights as objects of their own, by module.
PICKLED_BY = {
    "torchao.": "torchao", "optimum.quanto": "optimum-quanto", "quanto.": "optimum-quanto", "bitsandbytes.": "bitsandbytes",
    "hqq.": "HQQ", "sdnq.": "SDNQ",
}  # fmt: skip
_UNPACKED = "packed numbers that need that library; get unquantized weights (bf16), or fp8"
QUANTIZED = (  # endings of keys that go together
    Foreign("weights quantized by optimum-quanto", ((".weight._data", ".weight._scale"),), _UNPACKED),
    Foreign("weights quantized by bitsandbytes", ((".quant_state.",), (".weight.absmax",), (".SCB",)), _UNPACKED),
    Foreign("weights quantized by nunchaku (SVDQuant)", ((".qweight", ".wscales"), (".smooth_factor",), (".smooth_orig",)),
            "load them with ComfyUI-nunchaku, if it knows this model; else " + _UNPACKED),
    Foreign("weights quantized by GPTQ", ((".qweight", ".g_idx"),), _UNPACKED),
    Foreign("weights quantized by AWQ", ((".qweight", ".qzeros"),), _UNPACKED),
    Foreign("weights quantized by torchao", (("_weight_qdata",), (".weight:qdata",), (".weight_qdata",)), _UNPACKED),
    Foreign("weights quantized by HQQ", ((".W_q",),), _UNPACKED),
)  # fmt: skip

ADAPTER = "a LoRA or LyCORIS adapter"
_LORA = "load the base model first and add it with a LoRA loader (LoraLoaderModelOnly in ComfyUI)"
_DIFFUSION = "load it with ComfyUI's own UNETLoader / CheckpointLoaderSimple, or its diffusers pipeline"

PIXART_CONTROLNET = Foreign(
    "a PixArt ControlNet",
    (("controlnet.", "copied_block."), ("controlnet_blocks.", "transformer_block.")),
    "it is an adapter beside a PixArt transformer: load it with PixArtControlNetLoader, and choose the transformer's own file here",
)
# Files that share PixArt's layer names: looked for even where those names occur.
ADAPTERS_AND_COUSINS = (
    Foreign(
        "a ControlNet for another model (Flux, SD3, Sana, SDXL or the like)",
        (("controlnet_blocks.0.weight",), ("controlnet_x_embedder.",), ("controlnet_cond_embedding.",), ("controlnet_down_blocks.",),
         ("control_model.",), ("zero_convs.",)),
        "load it with ComfyUI's ControlNetLoader, beside its own model",
    ),
    Foreign(
        ADAPTER,
        (
            (".lora_A.",), (".lora_B.",), (".lora_up.",), (".lora_down.",), (".lora.up.",), (".lora.down.",), ("lora_unet_",),
            ("lora_transformer_",), ("lokr_",), ("hada_w1",), ("lycoris_",), (".oft_",), ("dora_scale",), ("lora_magnitude_vector",),
        ),  # fmt: skip
        _LORA,
    ),
    PIXART_CONTROLNET,
    Foreign("a Sana transformer", ((".inverted_conv.",), ("attention_y_norm.",), (".conv_inverted.",)), _DIFFUSION),
    Foreign("an Open-Sora transformer", ((".attn_temp.",), ("spatial_blocks.",)), _DIFFUSION),
    Foreign("an LTX-Video transformer", (("patchify_proj.",), ("adaln_single.", "proj_in.")), _DIFFUSION),
)

OTHERS = (
    Foreign(
        "a Stable Diffusion / SDXL UNet or checkpoint",
        (("input_blocks.", "middle_block."), ("down_blocks.", "mid_block.", "time_embedding."), ("add_embedding.linear_1.",)),
        _DIFFUSION,
    ),
    Foreign("a Flux transformer", (("double_blocks.", "single_blocks."), ("single_transformer_blocks.",)), _DIFFUSION),
    Foreign("an SD3 / AuraFlow transformer", (("joint_blocks.",), ("joint_transformer_blocks.",), ("norm1_context.",)), _DIFFUSION),
    Foreign("a DiT with class labels", (("y_embedder.embedding_table.",), (".adaLN_modulation.1.",)), _DIFFUSION),
    Foreign(
        "a T5 text encoder",
        (("layer.0.SelfAttention.q.",), ("DenseReluDense.",), ("enc.blk.0.attn_q.",)),
        "load it as the text encoder: pixart.load_text_encoder, or PixArtT5Loader / CLIPLoader in ComfyUI",
    ),
    Foreign(
        "a CLIP text encoder",
        (("text_model.encoder.layers.",), ("text_model.embeddings.",), ("transformer.resblocks.",), ("text_projection", "logit_scale")),
        "PixArt reads captions with T5-v1.1-XXL, not CLIP; choose a PixArt transformer here",
    ),
    Foreign(
        "a VAE",
        (
            ("taesd_decoder.",), ("taesd_encoder.",), ("decoder.conv_in.",), ("decoder.up_blocks.",), ("decoder.up.",),
            ("first_stage_model.",), ("encoder.layers.0.weight", "decoder.layers."),
        ),  # fmt: skip
        "load it as the VAE: vae= of pixart.Pipeline.from_files, or VAELoader in ComfyUI",
    ),
    Foreign("a language model", (("model.layers.0.self_attn.",), ("lm_head.",)), "choose a PixArt transformer here"),
)


def name_quantized(keys: Iterable[str]) -> Foreign | None:
    """By which library weights were packed, or None."""
    return _first_of(QUANTIZED, keys)


def name_foreign(keys: Iterable[str], *, has_pixart_layers: bool) -> Foreign | None:
    """What the file is, or None if nothing known fits; a few distinctive key parts decide."""
    return _first_of(ADAPTERS_AND_COUSINS if has_pixart_layers else ADAPTERS_AND_COUSINS + OTHERS, keys)


def is_pixart_controlnet(keys: Iterable[str]) -> bool:
    """Whether copied blocks of a PixArt ControlNet are among the keys; such a file may hold the model that it controls, too."""
    return _first_of((PIXART_CONTROLNET,), keys) is not None


def _first_of(table: tuple[Foreign, ...], keys: Iterable[str]) -> Foreign | None:
    joined = "\n".join(keys)
    return next((one for one in table if any(all(part in joined for part in group) for group in one.markers)), None)
