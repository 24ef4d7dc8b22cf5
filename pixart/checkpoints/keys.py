"""The one table between PixArt's own key names and diffusers', used in both directions.

Detection, conversion and (later) LoRA slices all read it. A native module with several sources is
their concatenation along the first axis, in that order.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

MODULES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
BLOCK_MODULES: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.sr": ("attn1.sr",),  # KV compression; diffusers has no such layers, these names are ours
    "attn.norm": ("attn1.norm",),
    "attn.q_norm": ("attn1.norm_q",),  # of a model trained with qk_norm; the names of diffusers' attention, whose PixArt has none
    "attn.k_norm": ("attn1.norm_k",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
TENSORS: dict[str, tuple[str, ...]] = {
    "final_layer.scale_shift_table": ("scale_shift_table",),
    "y_embedder.y_embedding": ("caption_projection.y_embedding",),  # ComfyUI's name; diffusers drops it
    "pos_embed": ("pos_embed.pos_embed",),  # never used: positions are computed
}
BLOCK_TENSORS: dict[str, tuple[str, ...]] = {"scale_shift_table": ("scale_shift_table",)}

POSITION_KEY = "pos_embed"
NULL_CAPTION_KEY = "y_embedder.y_embedding"

# Prefixes that files of the field carry, alone or nested (reference: trainers, hosts, DDP, PEFT, torch.compile).
PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.", "_orig_mod.", "base_model.",
    "ema.", "model_ema.", "state_dict.", "net.", "unet.", "dit.",
)
# Names that wrappers put in between, anywhere: torch.compile, activation checkpoints, FSDP, DDP, DeepSpeed, PEFT.
_WRAPPERS = re.compile(
    r"(?<=\.)(?:(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module|_fpw_module|module|base_layer)\.)+"
)
# The first names of all that PixArt has, in either layout.
OWN_NAMES = frozenset(
    {"blocks", "transformer_blocks"}
    | {name.partition(".")[0] for table in (MODULES, TENSORS) for native, sources in table.items() for name in (native, *sources)}
)
_OUTERMOST = re.compile(  # the first name that is PixArt's own; what stands before it is a prefix
    r"(?:^|\.)(?:" + "|".join((*sorted(OWN_NAMES), "controlnet", "controlnet_blocks")) + r")\."
)
_ANCHORS = (  # layers that only PixArt and its cousins have, in either layout
    "t_block.1", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "cross_attn.kv_linear",
    "adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_1", "caption_projection.linear_1",
)
_ANCHOR = re.compile(
    r"^(?P<prefix>(?:.*?\.)??)(?:blocks\.\d+\.)?(?:" + "|".join(map(re.escape, _ANCHORS)) + r")\.(?:weight|bias)$"
)
_BLOCK = re.compile(r"^(?P<group>blocks|transformer_blocks)\.(?P<index>\d+)\.(?P<rest>.+)$")


class Target(NamedTuple):
    """Where a diffusers tensor lies in the native one: piece `part` of `parts` along the first axis."""

    key: str
    part: int
    parts: int


def _inverse(table: Mapping[str, tuple[str, ...]]) -> dict[str, Target]:
    return {src: Target(native, i, len(srcs)) for native, srcs in table.items() for i, src in enumerate(srcs)}


_FROM_DIFFUSERS = _inverse(MODULES)
_FROM_DIFFUSERS_BLOCK = _inverse(BLOCK_MODULES)
_FROM_DIFFUSERS_TENSOR = _inverse(TENSORS)
_FROM_DIFFUSERS_BLOCK_TENSOR = _inverse(BLOCK_TENSORS)


def native_target(key: str) -> Target | None:
    """The native place of a diffusers key, or None if the table has none."""
    block = _BLOCK.match(key)
    if block and block["group"] != "transformer_blocks":
        return None
    rest = block["rest"] if block else key
    tensors, modules = (
        (_FROM_DIFFUSERS_BLOCK_TENSOR, _FROM_DIFFUSERS_BLOCK) if block else (_FROM_DIFFUSERS_TENSOR, _FROM_DIFFUSERS)
    )
    lead = f"blocks.{block['index']}." if block else ""
    if rest in tensors:
        found = tensors[rest]
        return found._replace(key=lead + found.key)
    module, _, leaf = rest.rpartition(".")
    if module not in modules:
        return None
    found = modules[module]
    return found._replace(key=f"{lead}{found.key}.{leaf}")


def diffusers_sources(key: str) -> tuple[str, ...] | None:
    """The diffusers keys whose concatenation is this native key, or None if the table has none."""
    block = _BLOCK.match(key)
    if block and block["group"] != "blocks":
        return None
    rest = block["rest"] if block else key
    tensors, modules = (BLOCK_TENSORS, BLOCK_MODULES) if block else (TENSORS, MODULES)
    lead = f"transformer_blocks.{block['index']}." if block else ""
    if rest in tensors:
        return tuple(lead + source for source in tensors[rest])
    module, _, leaf = rest.rpartition(".")
    if module not in modules:
        return None
    return tuple(f"{lead}{source}.{leaf}" for source in modules[module])


def without_wrappers(key: str, outermost: re.Pattern[str] = _OUTERMOST) -> str:
    """A key without the names that wrappers of modules put into it; those before the model's own names belong to its prefix.

    outermost: finds the first name that is the model's own (default: PixArt's).
    """
    start = outermost.search(key)
    return key if start is None else key[: start.end()] + _WRAPPERS.sub("", key[start.end() - 1 :])[1:]


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Prefixes under which PixArt layers lie, the most complete first; empty if there are none."""
    count: Counter[str] = Counter()
    for key in keys:
        match = _ANCHOR.match(key)
        if match:
            count[match["prefix"]] += 1
    return [prefix for prefix, _ in count.most_common()]


def is_known_prefix(prefix: str) -> bool:
    """Whether a prefix is made of known parts only."""
    while prefix:
        part = next((p for p in PREFIXES if prefix.startswith(p)), None)
        if part is None:
            return False
        prefix = prefix[len(part) :]
    return True


def has_every_part(keys: Iterable[str]) -> bool:
    """Whether weights of every module that any PixArt has are among these keys without prefix; of the blocks the first counts."""
    found = set(keys)
    modules = {native: sources for native, sources in MODULES.items() if not native.startswith(("csize_embedder.", "ar_embedder."))}
    some = ("attn.sr", "attn.norm", "attn.q_norm", "attn.k_norm")  # which only some have
    for native, sources in BLOCK_MODULES.items():
        if native not in some:
            modules[f"blocks.0.{native}"] = tuple(f"transformer_blocks.0.{source}" for source in sources)
    return all(f"{native}.weight" in found or all(f"{s}.weight" in found for s in sources) for native, sources in modules.items())


def key_layout(keys: Iterable[str]) -> str:
    """"original" or "diffusers", by which names of the table occur more often (without prefix)."""
    keys = list(keys)
    native = sum(diffusers_sources(key) is not None for key in keys)
    diffusers = sum(native_target(key) is not None for key in keys)
    return "diffusers" if diffusers > native else "original"


def gather_native(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Native tensors of a diffusers state dict; unknown keys keep their names.

    Also returns the fused keys that could not be joined, each with what is wrong with its parts.
    """
    native: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    problems: dict[str, str] = {}
    for key, tensor in state_dict.items():
        target = native_target(key)
        if target is None:
            native[key] = tensor
        elif target.parts == 1:
            native[target.key] = tensor
        else:
            groups.setdefault(target.key, {})[target.part] = tensor
    while groups:
        key, parts = groups.popitem()
        sources = diffusers_sources(key) or ()
        missing = [source for i, source in enumerate(sources) if i not in parts]
        if missing:
            problems[key] = f"missing {', '.join(missing)}"
            continue
        pieces = [parts[i] for i in range(len(sources))]
        if len({piece.shape[1:] for piece in pieces}) > 1 or pieces[0].ndim == 0 or not _joinable(pieces):
            found = ", ".join(f"{s} {tuple(p.shape)} {p.dtype}" for s, p in zip(sources, pieces))
            problems[key] = f"can't join {key} from {found}; expected equal widths and floating-point numbers, or one dtype"
            continue
        native[key] = _concatenate(pieces)
    return native, problems


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with native keys, from either layout without prefix; raises CheckpointError."""
    if key_layout(state_dict) == "original":
        return dict(state_dict)
    native, unjoined = gather_native(state_dict)
    problems = list(unjoined.values())
    problems += [f"unknown key {key}" for key in native if diffusers_sources(key) is None]
    if problems:
        raise CheckpointError("Can't convert diffusers keys to PixArt's own:\n  " + "\n  ".join(problems))
    return native


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_native`; fused tensors become views. Raises CheckpointError on unknown keys."""
    out: dict[str, Tensor] = {}
    unknown = [key for key in state_dict if diffusers_sources(key) is None]
    if unknown:
        raise CheckpointError("Can't convert to diffusers, no name for: " + ", ".join(sorted(unknown)))
    for key, tensor in state_dict.items():
        sources = diffusers_sources(key) or ()
        pieces = tensor.chunk(len(sources), dim=0) if len(sources) > 1 else (tensor,)
        if len(pieces) != len(sources) or len({piece.shape for piece in pieces}) > 1:
            raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}; expected {len(sources)} equal parts.")
        out.update(zip(sources, pieces))
    return out


def _joinable(pieces: list[Tensor]) -> bool:
    """Of one dtype, or plain floating-point numbers, of which the widest can hold all."""
    return len({piece.dtype for piece in pieces}) == 1 or all(type(p) is Tensor and p.is_floating_point() for p in pieces)


def _widest(pieces: list[Tensor]) -> list[Tensor]:
    """All in the dtype that loses nothing of any: fp16 and bf16 together need fp32."""
    dtypes = {piece.dtype for piece in pieces}
    if len(dtypes) == 1:
        return pieces
    large = [dtype for dtype in dtypes if dtype.itemsize > 1] or [torch.bfloat16]
    target = large[0]
    for dtype in large[1:]:
        target = torch.promote_types(target, dtype)
    return [piece.to(target) for piece in pieces]


def _concatenate(pieces: list[Tensor]) -> Tensor:
    pieces = _widest(pieces)
    if pieces[0].dtype.itemsize == 1 and type(pieces[0]) is Tensor:  # fp8 has no cat on every backend
        return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(pieces[0].dtype)
    return torch.cat(pieces)


# -- ControlNets: the reference's names beside those of diffusers' example and SimpleTuner ----------

CONTROL_GROUPS = {"controlnet": "copied_block", "controlnet_blocks": "transformer_block"}  # list of blocks: name of the copy
CONTROL_PROJECTIONS = ("before_proj", "after_proj")
_CONTROL = re.compile(
    r"^(?P<prefix>(?:.*?\.)??)(?P<group>" + "|".join(CONTROL_GROUPS) + r")\.(?P<index>\d+)\."
    r"(?P<part>" + "|".join((*CONTROL_GROUPS.values(), *CONTROL_PROJECTIONS)) + r")\.(?P<rest>.+)$"
)


class ControlKey(NamedTuple):
    """A key of a ControlNet file, taken apart; `target` is the native key, or a block's key in the base's own layout."""

    prefix: str
    index: int
    block: str | None  # key inside the copied block, under the group name of its layout ("blocks.0.", "transformer_blocks.0.")
    target: str  # native key of a projection; "" for a block's


def control_key(key: str) -> ControlKey | None:
    """Takes a ControlNet's key apart, or None if it is none."""
    match = _CONTROL.match(key)
    if match is None:
        return None
    index, part = int(match["index"]), match["part"]
    if part in CONTROL_PROJECTIONS:
        return ControlKey(match["prefix"], index, None, f"controlnet.{index}.{part}.{match['rest']}")
    group = "blocks" if part == CONTROL_GROUPS["controlnet"] else "transformer_blocks"
    return ControlKey(match["prefix"], index, f"{group}.{index}.{match['rest']}", "")


def control_block_key(key: str) -> str:
    """The ControlNet's native key of `blocks.{i}.{rest}`; other keys keep their names."""
    block = _BLOCK.match(key)
    return f"controlnet.{block['index']}.{CONTROL_GROUPS['controlnet']}.{block['rest']}" if block else key
