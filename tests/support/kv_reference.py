"""KV-compressed PixArt computed without this project's code: diffusers' model with attention in loops of plain maths."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoint_factory import reference_model, tiny_weights, write

Blocks = Mapping[int, int]  # block -> ratio


def conv_weights(blocks: Blocks, hidden: int, seed: int = 3) -> dict[int, dict[str, Tensor]]:
    """Random `attn.sr` and `attn.norm` of each block, far from their initial values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        block: {
            "sr.weight": draw(hidden, 1, ratio, ratio) / ratio, "sr.bias": draw(hidden) * 0.1,
            "norm.weight": 1 + 0.3 * draw(hidden), "norm.bias": draw(hidden) * 0.1,
        }
        for block, ratio in blocks.items()
    }  # fmt: skip


def shrink(tokens: Tensor, grid: tuple[int, int], ratio: int, mode: str, weights: Mapping[str, Tensor]) -> Tensor:
    """(B, N, D) -> (B, cells, D), cell by cell, as the Sigma repository's code and paper describe each mode."""
    rows, columns = grid
    if mode == "uniform_every":
        return torch.stack([tokens[:, i * ratio] for i in range(rows * columns // ratio)], dim=1)
    image = tokens.reshape(len(tokens), rows, columns, -1)
    if mode == "ave":  # the very call that the reference makes
        return F.interpolate(image.permute(0, 3, 1, 2), scale_factor=1 / ratio, mode="nearest").flatten(2).transpose(1, 2)
    cells = []
    for i in range(rows // ratio):
        for j in range(columns // ratio):
            window = image[:, i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
            if mode == "uniform":
                cells.append(window[:, 0, 0])
                continue
            kernel = weights["sr.weight"][:, 0].permute(1, 2, 0)  # (R, R, D)
            cell = (window * kernel).sum((1, 2)) + weights["sr.bias"]
            centred = cell - cell.mean(-1, keepdim=True)
            deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            cells.append(centred / deviation * weights["norm.weight"] + weights["norm.bias"])
    return torch.stack(cells, dim=1)


class LoopAttention:
    """A processor of diffusers' `Attention`: compressed keys and values, one head at a time."""

    def __init__(self, merge: Any) -> None:
        self.merge = merge  # (keys, values) -> (keys, values, what to add to the scores)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        k, v, bias = self.merge(attn.to_k(hidden_states), attn.to_v(hidden_states))
        out, width = torch.zeros_like(q), q.shape[-1] // attn.heads
        for head in range(attn.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5 + bias
            out[..., part] = scores.softmax(-1) @ v[..., part]
        return attn.to_out[0](out)


def compressed_model(config: Mapping[str, Any], blocks: Blocks, mode: str, grid: tuple[int, int]) -> torch.nn.Module:
    """diffusers' model of `tiny_weights`, with trained compression for one grid of tokens."""
    model = reference_model(config)
    weights = conv_weights(blocks, config["cross_attention_dim"])
    for block, ratio in blocks.items():

        def merge(k: Tensor, v: Tensor, block: int = block, ratio: int = ratio):
            return *(shrink(x, grid, ratio, mode, weights[block]) for x in (k, v)), 0.0

        model.transformer_blocks[block].attn1.set_processor(LoopAttention(merge))
    return model


def write_compressed(kind: str, folder: Path, blocks: Blocks, mode: str, **sizes: Any) -> tuple[Path, dict[str, Any]]:
    """A compressed model in one of FORMATS, and its config; modes without weights are noted beside or in the file."""
    config, diffusers, original = tiny_weights(**sizes)
    if mode == "conv":
        for block, tensors in conv_weights(blocks, config["cross_attention_dim"]).items():
            original |= {f"blocks.{block}.attn.{name}": value for name, value in tensors.items()}
            diffusers |= {f"transformer_blocks.{block}.attn1.{name}": value for name, value in tensors.items()}
        return write(kind, folder, config, diffusers, original), config
    path = write(kind, folder, config, diffusers, original)
    note(path, {"compressed_blocks": [list(pair) for pair in blocks.items()], "compression_mode": mode})
    return path, config


def note(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes facts where a loader looks for what weights can't tell."""
    if path.is_dir():
        file = next(path.rglob("config.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))
    elif path.suffix == ".pth":
        torch.save({**torch.load(path), "pixart": dict(facts)}, path)
    else:
        tensors = {key: value.clone() for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"pixart": json.dumps(facts)})


def predict(model: torch.nn.Module, latent: Tensor, timestep: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """What diffusers' model makes of these inputs."""
    with torch.no_grad():
        return model(
            latent, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask.float(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
