"""A T5 of the XXL shape with random weights on disk, and its states in fp32 as a reference for every precision."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.text.settings import XXL

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def sizes(layers: int, width: int) -> dict[str, Any]:
    """XXL's, or in its proportions."""
    return {**XXL, "num_layers": layers, "d_model": width, "d_ff": width * 5 // 2, "num_heads": width // XXL["d_kv"]}


def write_weights(folder: Path, shape: dict[str, Any]) -> Path:
    """A bf16 folder, one shard a layer; scaled as T5's initialisation, so that attention and MLP both act.

    A folder that is complete is kept: the index is written last.
    """
    from safetensors.torch import save_file

    from pixart.text.weights import expected_shapes

    if (folder / INDEX).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    shapes = expected_shapes(shape)
    for name in sorted(shapes, key=_shard_of):
        shards.setdefault(_shard_of(name), []).append(name)
    for shard, names in shards.items():
        tensors = {name: _random(name, shapes[name], shape, generator).to(torch.bfloat16) for name in names}
        save_file(tensors, str(folder / f"model-{shard}.safetensors"), {"format": "pt"})
    _write_json(folder, shape, {name: f"model-{shard}.safetensors" for shard, names in shards.items() for name in names})
    return folder


def first_layers(source: Path, layers: int) -> Path:
    """A folder beside `source` with its first layers alone, for precisions that don't fit into memory whole; shards are linked."""
    folder = source.with_name(f"{source.name}-{layers}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    weight_map = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
    kept = {name: shard for name, shard in weight_map.items() if _shard_of(name) == "rest" or int(_shard_of(name)) < layers}
    for shard in sorted(set(kept.values())):
        os.link(source / shard, folder / shard)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    _write_json(folder, {**config, "num_layers": layers}, kept)
    return folder


@torch.no_grad()
def reference_states(source: Path, prompts: list[Tensor]) -> list[Tensor]:
    """States (1, tokens, width) in fp32 of rows of ids (1, tokens), by transformers' T5 with one layer in memory at a time."""
    from transformers import T5Config, T5EncoderModel

    from pixart.text.weights import read_t5

    weights = read_t5(source)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**weights.config)).eval()
    layers = {f"encoder.block.{number}.": block for number, block in enumerate(model.encoder.block)}
    others = {name: stored.read().float() for name, stored in weights.stored.items() if not name.startswith(tuple(layers))}
    model.load_state_dict(others, strict=False, assign=True)
    model.set_input_embeddings(model.shared)

    def fill(block: nn.Module, prefix: str) -> None:
        tensors = {name.removeprefix(prefix): stored.read().float() for name, stored in weights.stored.items() if name.startswith(prefix)}
        block.load_state_dict(tensors, assign=True)

    for prefix, block in layers.items():
        block.register_forward_pre_hook(lambda block, _, prefix=prefix: fill(block, prefix))
        block.register_forward_hook(lambda block, *_: block.to("meta") and None)
    return [model(input_ids=ids).last_hidden_state for ids in prompts]


def _write_json(folder: Path, shape: dict[str, Any], weight_map: dict[str, str]) -> None:
    config = {**shape, "model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False, "use_cache": False}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _shard_of(name: str) -> str:
    return name.split(".")[2].zfill(3) if name.startswith("encoder.block.") else "rest"


def _random(name: str, shape: tuple[int, ...], sizes: dict[str, Any], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    scale = 1.0 if name == "shared.weight" else shape[1] ** -0.5
    if name.endswith("SelfAttention.q.weight"):
        scale *= sizes["d_kv"] ** -0.5  # T5 doesn't divide by it in attention
    return torch.randn(shape, generator=generator).mul_(scale)
