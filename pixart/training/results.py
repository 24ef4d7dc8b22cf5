"""What a run writes: whole models in either layout, and what every result says of itself in its metadata."""
from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor, nn

from ..checkpoints.convert import write_diffusers, write_original
from ..checkpoints.hints import VAE_OF_SCALE, Hints
from ..checkpoints.load import prepare
from ..config import Variant, get_variant
from ..errors import ConfigError
from .bases import DTYPES
from .recipe import Recipe
from .shard import full_state

DEMO = "demo"  # the only model whose licence is this project's to say
LAYOUTS = ("original", "diffusers")
IMPLEMENTATIONS = {"alpha": "https://github.com/PixArt-alpha/PixArt-alpha", "sigma": "https://github.com/PixArt-alpha/PixArt-sigma"}
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt")


def check_saving(layout: str, dtype: str, *others: str) -> None:
    """Raises ConfigError for a layout or dtype that no result has. others: more names of dtypes that this method writes."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    if dtype not in (*DTYPES, *others):
        raise ConfigError(f"save_dtype is {dtype!r}; expected one of {', '.join((*DTYPES, *others))}.")


def weights_of(network: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of a network, with the averages in the place of what was trained."""
    return {**full_state(network), **averages}


def write_model(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], hints: Hints, layout: str, dtype: str) -> None:
    """A whole transformer, checked before it is written. path: a file, or, for diffusers, a folder too."""
    stored = {key: value.detach().to("cpu", DTYPES[dtype]) for key, value in weights.items()}
    prepared = prepare(stored, source=str(path), hints=hints, ema=hints.ema)
    write = write_diffusers if layout == "diffusers" else write_original
    write(prepared.state_dict, path, prepared.detection, metadata)


def hints_of(recipe: Recipe, variant: Variant, config: Any) -> Hints:
    """What the weights of a run's transformer don't tell by themselves."""
    return Hints(
        num_heads=config.num_heads, base_size=variant.base_size, position_range=config.position_range, family=variant.family,
        family_reason="the recipe's variant", compressed_blocks=config.compressed_blocks, ema=recipe.ema_decay > 0,
        compression_mode=config.compression_mode if config.compressed_blocks else None,
        vae=variant.vae if variant.vae in VAE_OF_SCALE.values() else None, where="the recipe",
    )  # fmt: skip


def describe(recipe: Recipe, kind: str, given: Mapping[str, str], **more: str) -> dict[str, str]:
    """The metadata of a result: modelspec (https://github.com/Stability-AI/ModelSpec), the recipe, and what it began from.

    kind: "" for a whole model, "lora", "controlnet". given: of the loop, such as the step. more: facts of the method.
    """
    variant = get_variant(recipe.variant)
    start = recipe.initialize
    base = {"file": PurePath(start).name, "sha256": content_hash(start)} if start else None
    size = recipe.stages[-1].base_size
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"pixart-{variant.family}" + (f"/{kind}" if kind else ""),
        "modelspec.implementation": IMPLEMENTATIONS[variant.family],
        "modelspec.title": PurePath(recipe.output or recipe.variant).stem,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "pixart.variant": recipe.variant,
        "pixart.recipe": json.dumps(without_places(recipe.to_dict())),
        "pixart.base": json.dumps(base),
        **{f"pixart.{name}": value for name, value in more.items()},
    }
    return {**{name: value for name, value in given.items() if name != "license" or recipe.variant == DEMO}, **facts}


def without_places(values: Any) -> Any:
    """The same with the last name of every absolute path alone: results are shared, and folders tell of their owner."""
    if isinstance(values, Mapping):
        return {key: without_places(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_places(value) for value in values]
    if isinstance(values, str) and (PurePath(values).is_absolute() or values[:1] in ("~", "\\") or values[1:3] == ":\\"):
        return values.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return values


def content_hash(path: str | Path) -> str:
    """SHA-256 of a weight file, or of a folder's weight files one after the other in order of their names."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_FILES) if path.is_dir() else [path]
    return _hash(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _hash(files: tuple[tuple[str, int, int], ...]) -> str:
    """Computed once a run: gigabytes take seconds."""
    digest = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
