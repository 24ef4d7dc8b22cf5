"""ControlNet files: delta's own keys, diffusers' and SimpleTuner's, with or without the base beside them."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import HEAD_DIM
from ..controlnet import ControlNetConfig, PixArtControlNet, heads_of
from ..errors import CheckpointError
from .foreign import name_foreign
from .keys import control_block_key, control_key, diffusers_sources, find_prefixes, gather_native, native_target
from .load import group_keys, value_problems
from .parts import plain_keys
from .read import read_tensors
from .sizes import MAX_DEPTH

BASES = ("base_model.", "transformer.")  # where files keep the model they control


@dataclass(frozen=True)
class PreparedControlNet:
    """Native tensors that fit `config` exactly; `notes` says what else was in the file."""

    state_dict: dict[str, Tensor]
    config: ControlNetConfig
    source: str
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log."""
        parameters = sum(tensor.numel() for tensor in self.state_dict.values())
        dtype = str(next(iter(self.state_dict.values())).dtype).removeprefix("torch.")
        text = f"{self.source}: {self.config.depth} blocks, hidden {self.config.hidden_size}, {parameters / 1e6:.1f}M parameters, {dtype}"
        return "; ".join((text, *self.notes))


def prepare_controlnet(state_dict: Mapping[str, Tensor], source: str) -> PreparedControlNet:
    """Native keys, sizes read from the weights, and every key, shape and value checked; raises CheckpointError."""
    tensors, notes = _strip(state_dict, source)
    native, unjoined = gather_native(tensors)
    native = {control_block_key(key): tensor for key, tensor in native.items()}
    config = _read_config(native, source)
    expected = {key: tuple(t.shape) for key, t in PixArtControlNet(config, device="meta").state_dict().items()}
    joined = {control_block_key(key) for key in unjoined}
    problems = list(unjoined.values())
    problems += [f"missing {key}" for key in group_keys(k for k in expected if k not in native and k not in joined)]
    problems += [f"unknown key {key}" for key in group_keys(k for k in native if k not in expected)]
    problems += [
        f"{key} has shape {tuple(native[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in native and tuple(native[key].shape) != shape
    ]
    problems += value_problems(native, set())
    if problems:
        raise CheckpointError(
            f"{source}: not a complete, sound PixArt ControlNet ({len(problems)} problem(s)); expected {config.depth} blocks of "
            f"width {config.hidden_size}, as most of the file has. Download or convert it again:\n  " + "\n  ".join(problems)
        )
    return PreparedControlNet(native, config, source, notes)


def load_controlnet(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PixArtControlNet:
    """A ControlNet from a .pth, .safetensors or diffusers folder, in eval mode.

    dtype: default is the file's own (bfloat16 for fp8 files, which plain layers can't compute in).
    """
    raw = read_tensors(path)
    prepared = prepare_controlnet(raw.state_dict, raw.source)
    stored = {tensor.dtype for tensor in prepared.state_dict.values()}
    target = dtype or (torch.bfloat16 if any(each.itemsize == 1 for each in stored) else next(iter(prepared.state_dict.values())).dtype)
    model = PixArtControlNet(prepared.config, dtype=target, device="meta")
    model.load_state_dict({key: t.to(target) for key, t in prepared.state_dict.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval().to(device)


def _strip(state_dict: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Projections under native names and copied blocks under their layout's; the base's tensors are left out."""
    state_dict = plain_keys(state_dict, source)
    found = {key: parts for key in state_dict if (parts := control_key(key))}
    if not found:
        raise CheckpointError(f"{source}: {_what_else(state_dict)} Expected a PixArt ControlNet (controlnet.0.copied_block.* "
                              "or controlnet_blocks.0.transformer_block.*).")  # fmt: skip
    prefix = Counter(parts.prefix for parts in found.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    base = 0
    for key, tensor in state_dict.items():
        parts = found.get(key)
        if parts is not None and parts.prefix == prefix:
            tensors[parts.block or parts.target] = tensor
        elif _of_base(key, prefix):
            base += 1
        else:
            tensors[key] = tensor  # reported as unknown
    notes = (f"the file's copy of the base model ({base} tensors) is not used",) if base else ()
    return tensors, notes


def _of_base(key: str, prefix: str) -> bool:
    """Whether it is a tensor of the model that is controlled: under a name of its own, or beside the copied blocks."""
    outer = prefix.removesuffix("controlnet.")  # diffusers saves both as transformer.* and controlnet.*
    for rest in (key.removeprefix(where) for where in {prefix, outer} if key.startswith(where)):
        if rest.startswith(BASES) or native_target(rest) or diffusers_sources(rest):
            return True
    return False


def _what_else(state_dict: Mapping[str, Tensor]) -> str:
    prefixes = find_prefixes(state_dict)
    foreign = name_foreign(state_dict, has_pixart_layers=bool(prefixes))
    if foreign:
        return f"this is {foreign.kind}; {foreign.advice}."
    if prefixes:
        return "this is a PixArt transformer; load it with PixArtModelLoader."
    return f"no ControlNet blocks of PixArt among its {len(state_dict)} keys (first: {', '.join(list(state_dict)[:3]) or 'none'})."


def _read_config(tensors: Mapping[str, Tensor], source: str) -> ControlNetConfig:
    """Sizes by the majority of blocks, so that an odd one is named later."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    def majority(suffix: str, axis: int) -> int | None:
        sizes = Counter(shape[axis] for key, shape in shapes.items() if key.endswith(suffix) and len(shape) > axis)
        return sizes.most_common(1)[0][0] if sizes else None

    depth = max((int(match[1]) for key in shapes if (match := re.match(r"controlnet\.(\d+)\.", key))), default=0) + 1
    width = majority(".after_proj.weight", 0) or majority(".scale_shift_table", 1) or 0
    heads = heads_of(width) if 0 < width else None
    if depth > MAX_DEPTH or heads is None:
        raise CheckpointError(
            f"{source}: a ControlNet of {depth} blocks and width {width}; expected at most {MAX_DEPTH} blocks and a width "
            f"that is a multiple of {HEAD_DIM}, as every PixArt's. The file is damaged or for another model."
        )
    ratios = {
        int(match[1]): shape[3]
        for key, shape in shapes.items()
        if len(shape) == 4 and (match := re.match(r"controlnet\.(\d+)\.copied_block\.attn\.sr\.weight$", key))
    }
    mlp = majority(".mlp.fc1.bias", 0) or 4 * width
    qk_norm = any(key.endswith(".attn.q_norm.weight") for key in shapes)
    return ControlNetConfig(width, depth, heads, mlp, tuple(sorted(ratios.items())), qk_norm)
