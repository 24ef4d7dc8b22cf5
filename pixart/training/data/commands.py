"""`python -m pixart extract`: the features of a run's pictures and captions, and nothing else."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...scale.where import add_where_options, where

PLACES = {
    "data": "the pictures", "text_encoder": "T5: folder or weight file", "vae": "folder or weight file", "cache": "folder for features",
}  # fmt: skip


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Adds `extract` to the command line."""
    extract = commands.add_parser(
        "extract", help="compute the T5 states and latents that a recipe trains on; run again to resume",
        description="Fills the cache that `train` reads, so that training needn't hold T5 and VAE in memory. With --on, "
        "several GPUs or machines that share the cache fill it together.",
    )  # fmt: skip
    extract.add_argument("recipe", type=Path, help="the recipe that will be trained; its sizes and settings are used")
    add_places(extract)
    extract.add_argument("--output", metavar="FILE", help="output of the training; without --cache, features go to cache beside its run")
    extract.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes", help="change one field of the recipe")
    extract.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    add_where_options(extract)
    extract.add_argument("--dry-run", action="store_true", help="only say what would be computed")
    extract.set_defaults(run=_extract)


def add_places(parser: argparse.ArgumentParser) -> None:
    """A flag for each place of the source."""
    for name, what in PLACES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PLACE", help=f"{what}; sets source.{name}")


def _extract(given: argparse.Namespace) -> None:
    output = [f"output={json.dumps(given.output)}"] if given.output else []
    changes = [*given.changes, *place_changes(given), *output]
    if given.dry_run:
        from ..recipe import load_recipe

        recipe = load_recipe(given.recipe, changes)
        source = recipe.source.make(recipe)
        sys.stdout.write("".join(f"{line}\n" for line in source.report()))
        source.check()
        return
    from ...scale.extract_stage import extract_over

    folder = extract(given.recipe, changes, extract_over(where(given)))
    if folder is not None:
        sys.stdout.write(f"{folder}\n")


def place_changes(given: argparse.Namespace) -> list[str]:
    """The places of the command line as changes of a recipe."""
    return [f"source.{name}={json.dumps(value)}" for name in PLACES if (value := getattr(given, name, None)) is not None]


def extract(path: str | Path, changes: list[str], over: Callable[..., list[Any]] | None = None) -> Path | None:
    """Computes every feature that a recipe's source lacks; returns the cache's folder, in the first process alone.

    over: applies one function to all of the work, `spread` by default. Raises PixArtError.
    """
    import torch
    from accelerate import Accelerator

    from ...errors import ConfigError
    from ..recipe import load_recipe
    from .spread import is_first, spread

    recipe = load_recipe(path, changes)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    source = recipe.source.make(recipe)
    if not hasattr(source, "album"):
        raise ConfigError(f"The source {recipe.source.name!r} computes no features; there is nothing to extract.")
    samples = getattr(recipe, "samples", None)
    prompts = [*samples.prompts, samples.negative] if samples else []
    source.prepare(prompts, accelerator, over or spread)
    first = is_first()
    accelerator.end_training()
    return source.album.cache.folder if first else None
