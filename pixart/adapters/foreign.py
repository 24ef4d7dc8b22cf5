"""Names what a LoRA file is when PixArt can't use it."""
from __future__ import annotations

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
    (("_self_attn_q_proj", "_self_attn_qkv_proj", "_mlp_gate_proj"), "a language model"),
    (("_self_attn_q_", "_self_attn_k_", "_self_attn_v_"), "Wan or Cosmos"),
    (("attention_qkv", "attention_to_q", "feed_forward_w1"), "Lumina or Z-Image"),
)
SHOWN = 3
UNREAD = {  # ends or parts of keys -> methods that are not read here
    ".a1.weight": "GLoRA", ".on_input": "(IA)3", "vera_lambda": "VeRA", ".oft_R": "PEFT's OFT", ".oft_r": "PEFT's OFT",
    ".boft_R": "PEFT's BOFT",
    ".lora_E": "AdaLoRA", "fourierft": "FourierFT", ".hra_u": "HRA", "ia3_l": "(IA)3", ".lokr_t1": "LoKr with two Tucker cores",
}  # fmt: skip


def looks_like(keys: Sequence[str]) -> str:
    """The model that LoRA keys seem to be for, or their first names."""
    joined = "\n".join(key.replace(".", "_") for key in keys)
    name = next((name for parts, name in MODELS if any(part in joined for part in parts)), None)
    return f"it looks like one for {name}" if name else f"its keys begin with {', '.join(list(keys)[:SHOWN])}"


def method_of(keys: Sequence[str]) -> str:
    """" (GLoRA)" for keys of a known method that isn't read here; "" for others."""
    found = sorted({name for part, name in UNREAD.items() if any(part in key for key in keys)})
    return f" ({', '.join(found)})" if found else ""


def no_adapter(source: str, keys: list[str]) -> str:
    """The message for a file without any adapter tensor."""
    pixart = bool(find_prefixes(keys))
    foreign = name_foreign(keys, has_pixart_layers=pixart)
    shown = ", ".join(keys[:SHOWN]) or "none"
    if method_of(keys) or (foreign is not None and foreign.kind == ADAPTER):
        return (
            f"{source}: an adapter of no supported kind{method_of(keys)} (its keys begin with {shown}); expected LoRA, LoHa, LoKr, "
            "OFT, BOFT or DoRA. "
            "Merge it with the program that trained it, or choose another file."
        )
    kind = foreign.kind if foreign else "a whole PixArt transformer" if pixart else f"a file with the keys {shown}"
    return (
        f"{source}: this is {kind}, no LoRA; expected lora_A / lora_B, lora_up / lora_down, hada_ or lokr_ matrices. "
        "Choose another file."
    )
