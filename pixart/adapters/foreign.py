"""Names what a LoRA file is when PixArt can't use it."""
from __future__ import annotations

import re
from collections.abc import Sequence

from ..checkpoints.foreign import ADAPTER, name_foreign
from ..checkpoints.keys import find_prefixes

# Flattened key parts (dots as underscores); the first group of which any occurs names the model.
MODELS = (
    (("lora_te2_", "down_blocks_2_attentions_1_transformer_blocks_9_", "input_blocks_8_1_transformer_blocks_9_"), "SDXL"),
    (("down_blocks_", "up_blocks_", "input_blocks_", "output_blocks_", "mid_block_"), "Stable Diffusion (a UNet)"),
    (("double_blocks_", "single_blocks_", "single_transformer_blocks_"), "Flux or a relative of it"),
    (("joint_blocks_", "joint_transformer_blocks_", "attn_add_q_proj", "attn_add_k_proj"), "SD3, AuraFlow or Qwen-Image"),
    (("text_model_",), "a CLIP text encoder"),
    (("controlnet_",), "a ControlNet"),
    (("_self_attn_q_proj", "_self_attn_qkv_proj", "_mlp_gate_proj"), "a language model"),
    (("_self_attn_q_", "_self_attn_k_", "_self_attn_v_"), "Wan or Cosmos"),
    (("attention_qkv", "attention_to_q", "feed_forward_w1"), "Lumina or Z-Image"),
)
# Methods whose tensors can't be applied: end of a key, or a part of it -> name.
METHODS = (
    (r"\.(?:a[12]|b[12]|bm)\.weight$|\.glora_[A-E]\b", "GLoRA"), (r"\.p?vera_(?:lambda_[bd]|[AB])\b", "VeRA"),
    (r"\.fourierft_", "FourierFT"),
    (r"\.lora_E\b|\.ranknum\b", "AdaLoRA"), (r"\.hra_u\b", "HRA"), (r"\.vblora_", "VB-LoRA"), (r"\.randlora_", "RandLoRA"),
    (r"\.road_(?:theta|alpha)\b", "RoAd"), (r"\.shira_weight\b", "SHiRA"), (r"\.c3a_kernel\b", "C3A"), (r"\.waveft_", "WaveFT"),
    (r"\.(?:bone|miss)_", "MiSS (Bone)"), (r"\.delora_", "DeLoRA"), (r"\.gralora_", "GraLoRA"), (r"\.ln_tuning_", "LN tuning"),
    (r"\.(?:p_layer|q_layer)\.weight$|\.lambda_layer$", "T-LoRA"), (r"\.(?:oft_r|oft_s)\b", "OFT of PEFT before 0.16"),
    (r"\.(?:lora|hira|oft)_embedding_", "embeddings adapted by PEFT"), (r"\.trainable_tokens_", "trained tokens of PEFT"),
    (r"^bundle_emb\.", "embeddings bundled by OneTrainer"),
    (r"\.(?:scale_weight|scale_input|weight_scale|scaled_fp8)$", "scaled fp8"), (r"\.hira_", "HiRA"),
    (r"\.lokr_t1$", "LoKr with two cores"),
    (r"\.(?:poly|lily|peanut|psoft|deft|frod|beft|adamss|unilora|tinylora|supertuning|osf)_", "another method of PEFT"),
)  # fmt: skip
SHOWN = 3
EXPECTED = "LoRA, LoHa, LoKr, DoRA, OFT, BOFT, (IA)^3 or whole differences"


def name_method(key: str) -> str:
    """The method of a tensor that can't be applied, or "" for others."""
    return next((name for pattern, name in METHODS if re.search(pattern, key)), "")


def looks_like(keys: Sequence[str]) -> str:
    """The model that LoRA keys seem to be for, or their first names."""
    joined = "\n".join(key.replace(".", "_") for key in keys)
    name = next((name for parts, name in MODELS if any(part in joined for part in parts)), None)
    return f"it looks like one for {name}" if name else f"its keys begin with {', '.join(list(keys)[:SHOWN])}"


def no_adapter(source: str, keys: list[str]) -> str:
    """The message for a file without any adapter tensor."""
    pixart = bool(find_prefixes(keys))
    foreign = name_foreign(keys, has_pixart_layers=pixart)
    shown = ", ".join(keys[:SHOWN]) or "none"
    method = next(filter(None, map(name_method, keys)), "")
    if method or foreign is not None and foreign.kind == ADAPTER:
        kind = f"{method}, which is not supported" if method else "an adapter of no supported kind"
        return (
            f"{source}: {kind} (its keys begin with {shown}); expected {EXPECTED}. "
            "Merge it with the program that trained it, or choose another file."
        )
    kind = foreign.kind if foreign else "a whole PixArt transformer" if pixart else f"a file with the keys {shown}"
    return (
        f"{source}: this is {kind}, not a LoRA; expected lora_A / lora_B, lora_up / lora_down, hada_ or lokr_ matrices. "
        "Choose another file."
    )
