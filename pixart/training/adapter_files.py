"""Trained adapters as files: one safetensors in the keys that ComfyUI and this package read, and PEFT's folder."""
from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.names import ROLES, split_key
from ..checkpoints.keys import diffusers_sources
from ..errors import ConfigError
from .adapters import Adaptation

PREFIX, TEXT_PREFIX = "diffusion_model.", "text_encoders.t5xxl.transformer."  # as ComfyUI names its models' layers
FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
ROWS = ("lora_up", "hada_w1_a", "hada_w2_a", "magnitude")  # matrices whose rows are the weight's
PEFT_NAMES = {"lora_up": ".lora_B.weight", "lora_down": ".lora_A.weight", "magnitude": ".lora_magnitude_vector"}
Layers = Mapping[str, Mapping[str, Tensor]]  # layer -> role, see `adapters.names.ROLES` -> tensor


def layers_of(averages: Mapping[str, Tensor], prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """peft's parameters, of those that begin with `prefix`, by layer and role."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in averages.items():
        if name.startswith(prefix):
            module, role = split_key(name)
            layers.setdefault(module.removeprefix(prefix), {})[role] = value.detach().float().cpu()
    return layers


def comfy_tensors(layers: Layers, adaptation: Adaptation, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by ComfyUI's keys; the scale is in `alpha`, or in the matrices where a file has no place for it.

    DoRA's magnitude stays in fp32: it is the length of whole rows.
    """
    tensors: dict[str, Tensor] = {}
    endings = {role: ending for ending, role in reversed(ROLES.items())}  # the first ending of a role is ComfyUI's
    for module, roles in layers.items():
        roles = dict(roles)
        if "lokr_w1" in roles and "lokr_w2" in roles:  # no rank that alpha could be divided by
            roles["lokr_w1"] = roles["lokr_w1"] * adaptation.scale
        else:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(adaptation.scale * adaptation.rank)
        if "magnitude" in roles:
            tensors[f"{prefix}{module}.dora_scale"] = roles.pop("magnitude").reshape(-1, 1)
        tensors |= {f"{prefix}{module}{endings[role]}": value.to(dtype).contiguous() for role, value in roles.items()}
    return tensors


def peft_tensors(layers: Layers) -> dict[str, Tensor]:
    """Tensors of a folder that PEFT loads onto diffusers' transformer, where a fused layer is two or three."""
    tensors: dict[str, Tensor] = {}
    for module, roles in layers.items():
        sources = [name.removesuffix(".weight") for name in diffusers_sources(f"{module}.weight") or (f"{module}.weight",)]
        for part, source in enumerate(sources):
            for role, value in roles.items():
                piece = value.chunk(len(sources))[part] if role in ROWS else value
                tensors[f"{PEFT_PREFIX}{source}{PEFT_NAMES.get(role, f'.{role}')}"] = piece.clone(memory_format=torch.contiguous_format)
    return tensors


def write_peft_folder(layers: Layers, adaptation: Adaptation, folder: Path, base: str | None, metadata: Mapping[str, str]) -> None:
    """`adapter_config.json` and the weights, in a folder that appears whole. LoKr isn't possible, see `check_peft_folder`."""
    check_peft_folder(adaptation.kind)
    tensors = peft_tensors(layers)
    targets = sorted({split_key(key.removeprefix(PEFT_PREFIX))[0] for key in tensors})
    config = adaptation.config(targets)
    config.base_model_name_or_path, config.inference_mode = base, True
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / FILE, metadata={"format": "pt", **metadata})
        (partial / FILE).chmod(0o644)  # safetensors writes files that only their owner can read
        config.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_peft_folder(kind: str) -> None:
    """Raises ConfigError for a kind that diffusers' split layers can't take."""
    if kind == "lokr":
        raise ConfigError("peft_folder is asked for a LoKr, whose products don't split into diffusers' layers; write the file only.")
