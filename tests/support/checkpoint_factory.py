"""Random PixArt weights, tiny or full width, written in every format a user may have.

The layouts are spelled out here once more, index by index, and the numbers come from diffusers' own
module, so that nothing of `pixart.checkpoints` is used to test itself.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FORMATS = (
    "pth", "pth-ema", "safetensors", "diffusers-file", "diffusers-folder", "diffusers-shards", "pipeline-folder", "mindone-folder",
)  # fmt: skip
PREFIXES = ("model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.")


def diffusers_config(
    hidden: int = 144,
    depth: int = 2,
    captions: int = 32,
    pixels: int = 1024,
    position_range: float = 32,
    micro: bool = False,
    heads: int = 0,
    channels: int = 4,
) -> dict[str, Any]:
    """Arguments of diffusers' PixArtTransformer2DModel whose positions run to `position_range`."""
    heads = heads or hidden // 72
    return {
        "num_attention_heads": heads, "attention_head_dim": hidden // heads, "num_layers": depth, "cross_attention_dim": hidden,
        "sample_size": pixels // 8, "interpolation_scale": pixels / 16 / position_range, "caption_channels": captions,
        "use_additional_conditions": micro, "in_channels": channels, "out_channels": 2 * channels, "patch_size": 2,
    }  # fmt: skip


def reference_model(config: Mapping[str, Any], seed: int = 0) -> torch.nn.Module:
    """diffusers' model with random weights, large enough that every one of them shows in the output."""
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PixArtTransformer2DModel(**config).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 1
            scale = 0.02 if name.endswith("bias") else 0.3 if "scale_shift" in name else fan_in**-0.5
            weight.normal_(0.0, scale)
    return model


def original_keys(diffusers: Mapping[str, Tensor], depth: int, null_rows: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The same weights under the names of the PixArt repositories."""
    left = dict(diffusers)
    out: dict[str, Tensor] = {}

    def move(native: str, *sources: str) -> None:
        for leaf in ("weight", "bias"):
            parts = [left.pop(f"{source}.{leaf}") for source in sources]
            out[f"{native}.{leaf}"] = torch.cat(parts) if len(parts) > 1 else parts[0]

    move("x_embedder.proj", "pos_embed.proj")
    embedders = {"t_embedder": "timestep_embedder", "csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    for native, theirs in embedders.items():
        if f"adaln_single.emb.{theirs}.linear_1.weight" in left:
            move(f"{native}.mlp.0", f"adaln_single.emb.{theirs}.linear_1")
            move(f"{native}.mlp.2", f"adaln_single.emb.{theirs}.linear_2")
    move("t_block.1", "adaln_single.linear")
    move("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    move("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        out[f"{ours}.scale_shift_table"] = left.pop(f"{theirs}.scale_shift_table")
        move(f"{ours}.attn.qkv", f"{theirs}.attn1.to_q", f"{theirs}.attn1.to_k", f"{theirs}.attn1.to_v")
        move(f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0")
        move(f"{ours}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
        move(f"{ours}.cross_attn.kv_linear", f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v")
        move(f"{ours}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
        move(f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj")
        move(f"{ours}.mlp.fc2", f"{theirs}.ff.net.2")
    move("final_layer.linear", "proj_out")
    out["final_layer.scale_shift_table"] = left.pop("scale_shift_table")
    assert not left, sorted(left)
    if null_rows:
        width = out["y_embedder.y_proj.fc1.weight"].shape[1]
        out["y_embedder.y_embedding"] = torch.randn(null_rows, width, generator=torch.Generator().manual_seed(seed)).to(
            out["t_block.1.bias"].dtype
        )
    return out


def stored_positions(rows: int, hidden: int, position_range: float) -> Tensor:
    """A `pos_embed` buffer as the original repositories store it, (1, rows*rows, hidden)."""
    frequencies = 10000.0 ** (-torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    coordinate = torch.arange(rows, dtype=torch.float64) * position_range / rows
    one = torch.cat([(coordinate[:, None] * frequencies).sin(), (coordinate[:, None] * frequencies).cos()], dim=1)
    table = torch.cat([one[None].expand(rows, rows, -1), one[:, None].expand(rows, rows, -1)], dim=-1)
    return table.reshape(1, rows * rows, hidden).float()


def tiny_weights(micro: bool = False, null_rows: int | None = 300, dtype: torch.dtype = torch.float32, **sizes: Any):
    """(config, diffusers state dict, original state dict) of a tiny random model."""
    config = diffusers_config(micro=micro, **sizes)
    diffusers = {key: value.to(dtype) for key, value in reference_model(config).state_dict().items()}
    return config, diffusers, original_keys(diffusers, config["num_layers"], null_rows)


def write(kind: str, folder: Path, config: Mapping[str, Any], diffusers: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Path:
    """Writes one of FORMATS into `folder` and returns the path a user would give."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("pth", "pth-ema"):
        other = {key: torch.zeros_like(value) for key, value in original.items()}
        stored = {"state_dict": dict(original), "epoch": 3} if kind == "pth" else {"state_dict": other, "state_dict_ema": dict(original)}
        torch.save(stored, folder / "model.pth")
        return folder / "model.pth"
    if kind == "safetensors":
        save_file(dict(original), folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "diffusers-file":
        save_file(dict(diffusers), folder / "model.safetensors", metadata={"format": "pt"})
        return folder / "model.safetensors"
    pipeline = kind == "pipeline-folder"
    target = folder / "pipe" / "transformer" if pipeline else folder / "transformer"
    _write_folder(target, config, diffusers, shards=3 if kind == "diffusers-shards" else 1, mindone=kind == "mindone-folder")
    if pipeline:
        short_range = config["interpolation_scale"] * 32 > config["sample_size"] // 2  # only alpha-256 counts to 16
        family = "Alpha" if config["use_additional_conditions"] or short_range else "Sigma"
        (target.parent / "model_index.json").write_text(json.dumps({"_class_name": f"PixArt{family}Pipeline"}))
        return target.parent
    return target


def _write_folder(target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shards: int, mindone: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel", **config}))
    name = "diffusion_pytorch_model"
    if shards == 1:
        save_file(dict(tensors), target / f"{name}.safetensors", metadata={"format": "np" if mindone else "pt"})
        return
    keys, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"{name}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[i::shards]
        save_file({key: tensors[key] for key in part}, target / file)
        weight_map.update(dict.fromkeys(part, file))
    (target / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
