"""Where a tensor of an adapter file belongs: key -> module of the transformer or of T5, and its role in the algorithm.

Trainers write the same layer with dots or underscores, native or diffusers names, under many prefixes. Here
every name is flattened to underscores, so that the one key table of `checkpoints/keys.py` reads them all.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from ..checkpoints.keys import BLOCK_MODULES, BLOCK_TENSORS, MODULES, POSITION_KEY, PREFIXES, TENSORS, is_known_prefix, without_wrappers

TRANSFORMER, TEXT = "transformer", "text"


class Place(NamedTuple):
    """A layer, or a table that is a parameter by itself; piece `part` of `parts` along the first axis of its weight."""

    model: str  # TRANSFORMER or TEXT
    module: str  # native name; of a table the parameter's own
    part: int = 0
    parts: int = 1
    table: bool = False

    @property
    def weight(self) -> str:
        """Name of the parameter that is changed."""
        return self.module if self.table else f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name of the layer's bias."""
        return f"{self.module}.bias"


# End of a key -> role. kohya, PEFT, diffusers, LyCORIS and ComfyUI name the same matrices differently.
ROLES = {
    ".lora_up.weight": "lora_up", ".lora_down.weight": "lora_down", ".lora_mid.weight": "lora_mid",
    ".lora_B.weight": "lora_up", ".lora_A.weight": "lora_down", ".lora_B": "lora_up", ".lora_A": "lora_down",
    ".lora.up.weight": "lora_up", ".lora.down.weight": "lora_down", "_lora.up.weight": "lora_up", "_lora.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up", ".lora_linear_layer.down.weight": "lora_down",
    ".lora_B.bias": "lora_bias", ".alpha": "alpha",
    ".dora_scale": "dora_scale", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b",
    ".set_weight": "set", ".weight": "whole", ".bias": "whole_bias", ".reshape_weight": "reshape_weight",
    ".oft_R.weight": "oft_R", ".boft_R": "boft_R", ".boft_s": "boft_s", ".ia3_l": "ia3_l", ".on_input": "on_input",
    **{f".{name}": name for name in (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "oft_blocks", "rescale",
    )},
}  # fmt: skip
_ENDINGS = sorted(ROLES, key=len, reverse=True)
TABLES = ("scale_shift_table", "y_embedding")  # parameters without a layer, stored whole under their own name
# PEFT in memory puts the adapter's name into the key: lora_A.default.weight, hada_w1_a.default, modules_to_save.default.weight
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+?|lokr_\w+?|oft_R|boft_[Rs]|ia3_l)\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$"
)
_ONLY_BLOCKS = re.compile(r"\.oft_blocks\.0$")  # kohya's list of the pieces of a fused weight, where it has one
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")  # with the adapter's name, which PEFT leaves out where it is the last but one
_ORIGINAL = re.compile(r"\.original_module\.")  # PEFT's copy of a layer that it saves whole
_BASE_COPY = re.compile(  # bitsandbytes' constants of a frozen base model's weights
    r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|weight_format)$"
)
_POSITIONS = re.compile(rf"(?:^|\.){POSITION_KEY}$")
_STATE = re.compile(r"(?:^|\.)(?:_extra_state|rng_state)$")  # of torch's modules and of trainers
_COUNTER = re.compile(r"(?:^|[._])(?:steps?|epochs?|iter(?:ation)?s?|num_updates|num_batches_tracked|logit_(?:scale|bias))$")
_STRENGTH = re.compile(r"alpha|scal|rank|dim|strength|multiplier|factor|weight|fp8|lora|lycoris|oft", re.IGNORECASE)
COPY_OF_BASE, POSITIONS = "copies of the base model's own weights", "positions, which are computed"
BOOKKEEPING = "notes of the training, which no picture depends on"


def without_effect(key: str) -> str:
    """Why a tensor that belongs to no change may be left out, or "" if it may not."""
    if _ORIGINAL.search(key) or _BASE_COPY.search(key):
        return COPY_OF_BASE
    return POSITIONS if _POSITIONS.search(key) else ""


def is_bookkeeping(key: str, numbers: int | None) -> bool:
    """Whether an entry of no method is a counter or state of the training. numbers: how many it has; None for what is no tensor.

    So is a single number that belongs to no layer, unless its name may mean how strongly the adapter works.
    """
    if _STATE.search(key) or numbers == 1 and _COUNTER.search(key):
        return True
    owner = key.rpartition(".")[0]
    return numbers == 1 and (not owner or is_known_prefix(f"{owner}.")) and not _STRENGTH.search(key) and find_place(key) is None


def split_key(key: str) -> tuple[str, str] | None:
    """(module as the file names it, role), or None for a tensor of no known algorithm."""
    ways = dict.fromkeys((_SAVED.sub(".", key), key.replace(".modules_to_save.", ".")))
    found = [_split(way) for way in ways]
    return next((each for each in found if each and find_place(each[0])), found[0])


def _split(key: str) -> tuple[str, str] | None:
    key = _ONLY_BLOCKS.sub(".oft_blocks", _NAMED.sub(r".\1\2", without_wrappers(key)))
    if key.endswith(TABLES):
        return key, "whole"
    ending = next((end for end in _ENDINGS if key.endswith(end)), None)
    return None if ending is None else (key[: -len(ending)], ROLES[ending])


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _flattened(layers: dict[str, tuple[str, ...]], tables: dict[str, tuple[str, ...]]) -> dict[str, Place]:
    """Flat names of both layouts -> place."""
    found = {}
    for native, sources in {**layers, **tables}.items():
        place = Place(TRANSFORMER, native, table=native in tables)
        found[_flat(native)] = place
        found.update({_flat(source): place._replace(part=i, parts=len(sources)) for i, source in enumerate(sources)})
    return found


_PLACES = _flattened(MODULES, TENSORS)
_BLOCK_PLACES = _flattened(BLOCK_MODULES, BLOCK_TENSORS)
_PROCESSOR = re.compile(r"(attn[12]_)processor_(to_out(?=$)|to_[qkv]$)")  # diffusers, until 2023: attn1.processor.to_q_lora.up
_BLOCK = re.compile(r"^(?:transformer_)?blocks_(\d+)_(.+)$")
_PREFIXES = ("lora_unet_", "oft_unet_", "lora_transformer_", "lycoris_", "lora_", *map(_flat, PREFIXES))
_TEXT_PREFIX = re.compile(r"^(?:lora_te\d*_|(?:lora_|lycoris_)?text_encoders?_|(?:lora_)?te\d?_)")
_T5 = re.compile(r"(?:^|_)encoder_block_(\d+)_layer_([01])_(SelfAttention|DenseReluDense)_(q|k|v|o|wi_0|wi_1|wi|wo)$")


def find_place(module: str) -> Place | None:
    """The weight that a module's name means, or None if it is no layer of PixArt or T5."""
    flat = _PROCESSOR.sub(lambda name: name[1] + name[2].replace("to_out", "to_out_0"), _flat(module))
    text = _T5.search(flat)
    if text:
        block, layer, kind, name = text.groups()
        return Place(TEXT, f"encoder.block.{block}.layer.{layer}.{kind}.{name}")
    while True:
        found = _resolve(flat)
        prefix = next((p for p in _PREFIXES if flat.startswith(p)), None)
        if found or prefix is None:
            return found
        flat = flat[len(prefix) :]


def is_text(module: str) -> bool:
    """Whether a module's name says that it belongs to a text encoder, T5 or another."""
    flat = _flat(module)
    return bool(_TEXT_PREFIX.match(flat) or _T5.search(flat))


def _resolve(flat: str) -> Place | None:
    block = _BLOCK.match(flat)
    if not block:
        return _PLACES.get(flat)
    found = _BLOCK_PLACES.get(block[2])
    return found and found._replace(module=f"blocks.{block[1]}.{found.module}")
