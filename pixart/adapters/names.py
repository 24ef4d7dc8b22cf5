"""Where a tensor of an adapter file belongs: key -> module of the transformer or of T5, and its role in the algorithm.

Trainers write the same layer with dots or underscores, native or diffusers names, under many prefixes. Here
every name is flattened to underscores, so that the one key table of `checkpoints/keys.py` reads them all.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from ..checkpoints.keys import BLOCK_MODULES, BLOCK_TENSORS, MODULES, POSITION_KEY, PREFIXES, TENSORS, without_wrappers

TRANSFORMER, TEXT = "transformer", "text"
TABLES = ("scale_shift_table", "y_embedder.y_embedding")  # raw parameters


class Place(NamedTuple):
    """A weight, native name without `.weight`, or a table; piece `part` of `parts` along its first axis."""

    model: str  # TRANSFORMER or TEXT
    module: str
    part: int = 0
    parts: int = 1

    @property
    def is_table(self) -> bool:
        """Whether it is a raw parameter, not a layer with a weight."""
        return self.module.endswith(TABLES)

    @property
    def weight(self) -> str:
        """Name of the parameter."""
        return self.module if self.is_table else f"{self.module}.weight"


# End of a key -> role. kohya, PEFT, diffusers and LyCORIS name the same matrices differently.
ROLES = {
    ".lora_up.weight": "lora_up", ".lora_down.weight": "lora_down", ".lora_mid.weight": "lora_mid",
    ".lora_B.weight": "lora_up", ".lora_A.weight": "lora_down", ".lora_B": "lora_up", ".lora_A": "lora_down",
    ".lora.up.weight": "lora_up", ".lora.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up", ".lora_linear_layer.down.weight": "lora_down",
    ".lora_B.bias": "lora_bias", ".alpha": "alpha",
    ".dora_scale": "dora_scale", ".lora_magnitude_vector": "dora_scale", ".lora_magnitude_vector.weight": "dora_scale",
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b", ".set_weight": "set",
    ".oft_blocks": "oft_blocks", ".rescale": "rescale",
    **{f".{name}": name for name in (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    )},
}  # fmt: skip
# PEFT in memory puts the adapter's name into the key: lora_A.default.weight, hada_w1_a.default
_NAMED = re.compile(r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+?|lokr_\w+?)\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$")


_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.)")  # PEFT's place for layers that were trained whole
_WHOLE = {".weight": "set", ".bias": "set_b"}


def whole_key(key: str) -> tuple[str, str] | None:
    """(module, role) of a weight, bias or table that stands in an adapter's file as it is to be; None for anything else."""
    key = _SAVED.sub("", without_wrappers(key))
    for ending, role in _WHOLE.items():
        if key.endswith(ending) and find_place(key.removesuffix(ending)) is not None:
            return key.removesuffix(ending), role
    place = find_place(key)
    return (key, "set") if place is not None and place.is_table else None


def split_key(key: str) -> tuple[str, str] | None:
    """(module as the file names it, role), or None for a tensor of no known algorithm."""
    key = _NAMED.sub(r".\1\2", _SAVED.sub("", without_wrappers(key)))
    ending = next((end for end in sorted(ROLES, key=len, reverse=True) if key.endswith(end)), None)
    return None if ending is None else (key[: -len(ending)], ROLES[ending])


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _flattened(table: dict[str, tuple[str, ...]]) -> dict[str, Place]:
    """Flat names of both layouts -> place."""
    found = {_flat(native): Place(TRANSFORMER, native) for native in table}
    for native, sources in table.items():
        found.update({_flat(source): Place(TRANSFORMER, native, i, len(sources)) for i, source in enumerate(sources)})
    return found


_PLACES = _flattened({**MODULES, **{name: sources for name, sources in TENSORS.items() if name != POSITION_KEY}})
_BLOCK_PLACES = _flattened({**BLOCK_MODULES, **BLOCK_TENSORS})
_BLOCK = re.compile(r"^(?:transformer_)?blocks_(\d+)_(.+)$")
_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_", *map(_flat, PREFIXES))
_TEXT_PREFIX = re.compile(r"^(?:lora_te\d*_|(?:lora_|lycoris_)?text_encoders?_|(?:lora_)?te\d?_)")
_T5 = re.compile(r"(?:^|_)encoder_block_(\d+)_layer_([01])_(SelfAttention|DenseReluDense)_(q|k|v|o|wi_0|wi_1|wi|wo)$")


def find_place(module: str) -> Place | None:
    """The weight that a module's name means, or None if it is no layer of PixArt or T5."""
    flat = _flat(module)
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
