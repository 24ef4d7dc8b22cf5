"""Rewrites a checkpoint in the other layout without changing a bit of its weights."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import COMPRESSION_MODES, get_variant
from ..errors import CheckpointError, UnsupportedError
from ..model import PIXELS_PER_LATENT
from .detect import AUTO, Detection
from .hints import NOTE_KEY, TRANSFORMER_CLASSES
from .keys import to_diffusers
from .load import prepare_file
from .notes import note_of
from .read import WEIGHTS_NAME

LAYOUTS = ("original", "diffusers")


def convert_file(
    src: str | Path, dst: str | Path, to: str, ema: bool = False, variant: str = AUTO, kv_compression: str | None = None
) -> Path:
    """Writes `src` in layout `to` ("original" | "diffusers") and returns what was written.

    dst: .safetensors; .pth for "original"; for "diffusers" any other name is a folder with config.json.
    Weights keep their bits and dtype. y_embedding is kept (in diffusers files as
    `caption_projection.y_embedding`, which diffusers skips); a stored pos_embed is dropped, since
    positions are computed.
    kv_compression: "MODE:RATIO:FIRST-LAST", e.g. "uniform:2:14-27", for weights trained with a mode that
    leaves no trace in them; it is noted in the file, and every loader here follows the note.
    Raises CheckpointError, and UnsupportedError for KV-compressed models to diffusers.
    """
    src, dst = Path(src), Path(dst)
    if to not in LAYOUTS:
        raise CheckpointError(f"{dst}: unknown layout {to!r}; expected one of {', '.join(LAYOUTS)}.")
    if dst.exists() and src.exists() and dst.resolve() == src.resolve():
        raise CheckpointError(f"{dst}: is the source itself; choose another destination.")
    prepared = prepare_file(src, variant, ema, parse_compression(kv_compression) if kv_compression else {})
    write = write_original if to == "original" else write_diffusers
    try:
        return write(prepared.state_dict, dst, prepared.detection)
    except OSError as error:
        raise CheckpointError(f"{dst}: can't be written ({error}); choose another destination.") from error


def parse_compression(text: str) -> dict[str, Any]:
    """Fields of Hints from "MODE:RATIO:FIRST-LAST"; raises CheckpointError."""
    match = re.fullmatch(r"(\w+):(\d{1,3}):(\d{1,3})-(\d{1,3})", text)
    if not match or match[1] not in COMPRESSION_MODES or int(match[2]) < 2 or int(match[3]) > int(match[4]):
        raise CheckpointError(
            f"KV compression {text!r}; expected MODE:RATIO:FIRST-LAST like uniform:2:14-27, with a ratio of 2 or more and a "
            f"mode of {', '.join(COMPRESSION_MODES)}."
        )
    blocks = tuple((block, int(match[2])) for block in range(int(match[3]), int(match[4]) + 1))
    return {"compressed_blocks": blocks, "compression_mode": match[1]}


def write_original(
    state_dict: Mapping[str, Tensor], dst: str | Path, detection: Detection, metadata: Mapping[str, str] | None = None
) -> Path:
    """Native keys as .safetensors, with more metadata if given, or as .pth with a `state_dict`."""
    dst = Path(dst)
    if dst.suffix not in (".safetensors", ".pth", ".pt"):
        dst = dst / "pixart.safetensors" if dst.is_dir() else dst.with_name(dst.name + ".safetensors")
    note = note_of(detection)
    with replacing(dst) as temporary:
        if dst.suffix == ".safetensors":
            facts = {"format": "pt", **(metadata or {}), NOTE_KEY: json.dumps(note)}
            save_file(separate(state_dict), str(temporary), metadata=facts)
        else:
            torch.save({"state_dict": separate(state_dict), NOTE_KEY: note}, str(temporary))
    return dst


def write_diffusers(
    state_dict: Mapping[str, Tensor], dst: str | Path, detection: Detection, metadata: Mapping[str, str] | None = None
) -> Path:
    """diffusers keys, as a transformer folder with config.json, or as one .safetensors."""
    if detection.config.compressed_blocks:
        raise UnsupportedError(
            f"{detection.source}: its KV compression ({len(detection.config.compressed_blocks)} blocks) has no place in "
            "diffusers, which would silently compute something else; keep the original layout."
        )
    dst = Path(dst)
    single = dst.suffix == ".safetensors"
    if dst.suffix in (".pth", ".pt") or (dst.is_file() and not single):
        raise CheckpointError(f"{dst}: diffusers files are written as .safetensors or as a folder; choose such a name.")
    file = dst if single else dst / f"{WEIGHTS_NAME}.safetensors"
    tensors = separate(to_diffusers(state_dict))
    facts = {"format": "pt", **(metadata or {}), NOTE_KEY: json.dumps(note_of(detection))}
    with replacing(file) as temporary:
        save_file(tensors, str(temporary), metadata=facts)
    if not single:
        text = json.dumps(diffusers_config(detection), indent=2) + "\n"
        with replacing(dst / "config.json") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return dst


def diffusers_config(detection: Detection) -> dict[str, Any]:
    """The config.json with which diffusers' PixArtTransformer2DModel computes the same."""
    c = detection.config
    sample = (detection.base_size or get_variant(detection.variant).base_size) // PIXELS_PER_LATENT
    return {
        "_class_name": TRANSFORMER_CLASSES[0],
        "_diffusers_version": "0.30.0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": c.hidden_size // c.num_heads,
        "caption_channels": c.caption_channels,
        "cross_attention_dim": c.hidden_size,
        "in_channels": c.in_channels,
        "interpolation_scale": (sample // c.patch_size) / c.position_range,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_attention_heads": c.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": c.depth,
        "out_channels": c.out_channels,
        "patch_size": c.patch_size,
        "sample_size": sample,
        "use_additional_conditions": c.micro_condition,
    }


def separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with storage of their own: pieces of a fused weight are copied, others are not."""
    return {
        key: t.detach().contiguous() if t.untyped_storage().nbytes() == t.numel() * t.element_size() else t.detach().clone()
        for key, t in state_dict.items()
    }


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour that takes the name `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask says; safetensors makes files that only their owner may read
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
