"""Draws the pairs of `pairs.Pairs`."""
from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..config import get_variant
from ..errors import ConfigError
from ..model import PixArtTransformer
from ..sampling import denoise, make_scheduler
from ..text.encoder import TextEmbeddings
from .base import file_mark
from .batch import Batch, Source
from .draws import Draws
from .guided import captions_beside
from .initialize import load_base
from .methods import full
from .pair_commands import DRAWS_STAGE
from .pairs import INFO, SIZES, pair_files, probe, read_info
from .processes import make_accelerator
from .recipe import Recipe, check_given
from .write import replace_file

PLACES = ("data", "text_encoder", "vae", "cache", "hed", "class_data")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def draw_pairs(recipe: Recipe, out: Path, count: int, steps: int, guidance: float, batch_size: int, seed: int) -> int:
    """Draws what is missing of `count` pairs, rounded up to whole files of `batch_size`; returns the number of files.

    Several processes share the work. Raises ConfigError for a folder of pairs that were drawn otherwise.
    """
    check_given(recipe if recipe.output else replace(recipe, output=str(out)))
    if not _weights(recipe):
        raise ConfigError("pairs are drawn by a run's teacher; give --transformer, or set initialize or objective.teacher in the recipe.")
    accelerator = make_accelerator(replace(recipe, trackers=()))
    info = {
        "base": file_mark(_weights(recipe)), "variant": recipe.variant, "steps": steps, "guidance": guidance, "batch_size": batch_size,
        "seed": seed, "base_size": recipe.stages[-1].base_size, "precision": recipe.precision,
        "text_encoder": file_mark(getattr(recipe.source.settings, "text_encoder", None) or None), "source": _source_of(recipe),
    }  # fmt: skip
    if (out / INFO).exists():
        _check_same(out, info)
    source = recipe.source.make(recipe)
    source.prepare((), accelerator)
    teacher = _teacher(recipe, accelerator.device)
    files = math.ceil(count / batch_size)
    if accelerator.is_main_process:
        _write_info(out, info, teacher, recipe.variant)
    teacher = teacher.to(DTYPES[recipe.precision])
    accelerator.wait_for_everyone()
    done = {int(file.stem) for file in pair_files(out)}
    mine = [number for number in range(files) if number not in done and number % accelerator.num_processes == accelerator.process_index]
    for number in tqdm(mine, desc="pairs", unit="file", disable=not accelerator.is_main_process):
        draws = Draws(seed, DRAWS_STAGE, number, range(batch_size))
        found = _draw(recipe, source, teacher, draws, steps, guidance)
        replace_file(out / f"{number:08}.safetensors", lambda partial, found=found: save_file(found, partial))
    accelerator.wait_for_everyone()
    return len(pair_files(out))


def _weights(recipe: Recipe) -> str | None:
    """The teacher's file: the objective's own, or what the run begins with."""
    return getattr(recipe.objective.settings, "teacher", None) or recipe.initialize


def _source_of(recipe: Recipe) -> dict[str, Any]:
    """What the source draws, without the places of its files."""
    settings = recipe.part_at("source", -1)
    values = json.loads(json.dumps(asdict(settings.settings)))
    return {"name": settings.name, **{name: value for name, value in values.items() if name not in PLACES}}


def _teacher(recipe: Recipe, device: torch.device) -> PixArtTransformer:
    """In fp32, in which weights are known again."""
    sizes = full.Part(recipe.method.settings, recipe).config()
    return load_base(_weights(recipe), recipe.variant, sizes, torch.float32, full.attention_of(device)).to(device).eval()


def _check_same(out: Path, info: dict[str, Any]) -> None:
    before = read_info(out)
    other = [f"{name} {before.get(name)} instead of {value}" for name, value in info.items() if before.get(name) != value]
    if other:
        raise ConfigError(f"{out} has pairs that were drawn with {', '.join(other)}. Draw into another folder, or as before.")


def _write_info(out: Path, info: dict[str, Any], teacher: PixArtTransformer, variant: str) -> None:
    space = get_variant(variant)
    sizes = {name: getattr(teacher.config, name) for name in SIZES}
    info = {**info, **sizes, "latent_scale": space.latent_scale, "latent_shift": space.latent_shift, "probe": probe(teacher, teacher)}
    text = json.dumps(info, indent=1) + "\n"
    replace_file(out / INFO, lambda partial: partial.write_text(text, encoding="utf-8"))


def _draw(
    recipe: Recipe, source: Source, teacher: PixArtTransformer, draws: Draws, steps: int, guidance: float
) -> dict[str, torch.Tensor]:
    """One file's tensors: all pictures of one size."""
    device, dtype = next(teacher.parameters()).device, next(teacher.parameters()).dtype
    stage = replace(recipe.stages[-1], batch_size=len(draws.rows))
    batch: Batch = source.batch(recipe.part_at("source", -1).settings, stage, draws).to(device)
    noise = draws.normal("pair noise", batch.latent.shape[1:]).to(device)
    context, mask = batch.context, batch.mask.bool()
    if guidance > 1:
        if source.null_context is None:
            raise ConfigError("No text encoder was given, which makes the empty caption; give --text-encoder, or --cfg 1.")
        both = captions_beside(context, mask, source.null_context)
        both = {name: torch.cat(value.chunk(2)[::-1]) for name, value in both.items()}  # the empty ones first
        context, mask = both["context"], both["context_mask"]
    size = batch.size.repeat(2 if guidance > 1 else 1, 1) if teacher.config.micro_condition else None
    with torch.no_grad():
        latent = denoise(
            teacher, noise, TextEmbeddings(context.to(dtype), mask), make_scheduler(), steps=steps,
            guidance=guidance if guidance > 1 else None, size=size,
        )  # fmt: skip
    if not bool(torch.isfinite(latent).all()):
        raise ConfigError(f"The teacher's pictures are not finite numbers in {recipe.precision}; choose --set precision=bf16 or fp32.")
    kept = {"noise": noise, "latent": latent, "context": batch.context, "context_mask": batch.mask.bool(), "size": batch.size}
    half = {"latent": torch.float32, "noise": torch.float32, "context": torch.float16}
    return {name: value.to("cpu", half.get(name, value.dtype)).contiguous() for name, value in kept.items()}
