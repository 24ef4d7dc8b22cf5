"""The places of a run, looked at before anything is computed: it can write there, and nobody else's files are lost."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError
from .contents import NAME as CONTENTS
from .recipe import Recipe
from .state import LEFT, check_recipe, newest_state, read_info

SUFFIX, LOCK = ".safetensors", ".lock"
SOURCE_PLACES = ("text_encoder", "vae", "data", "prior_data", "class_data")


def check_places(recipe: Recipe, overwrite: bool, accept_changes: bool) -> Path | None:
    """The state that the run goes on from, if any; raises ConfigError for a place that it can't have, or a state of another recipe."""
    run_dir, output = Path(recipe.run_dir), Path(recipe.output)
    _check_output(recipe, output)
    if not _is_folder_to_be(run_dir):
        raise ConfigError(f"run_dir is {run_dir}, which is a file, or lies below one; expected a folder for states, log and samples.")
    if overwrite:
        return None
    state = newest_state(run_dir)
    if state is None and not (run_dir / CONTENTS).is_file():
        foreign = [name for name in LEFT if (run_dir / name).exists()]
        if foreign:
            raise ConfigError(
                f"{run_dir} holds {', '.join(foreign)}, but no run of training: give another run_dir, or replace them by --overwrite."
            )
    for place in (output, *_folders(recipe, output)):
        if place.exists() and (state is None or not _wrote(state, output)):
            without = "has no saved state to resume from" if state is None else "has the state of a run that writes elsewhere"
            raise ConfigError(f"{place} exists, and {run_dir} {without}. --overwrite replaces it, --output writes elsewhere.")
    if state is not None and not accept_changes:
        check_recipe(state, recipe)
    return state


def check_start(recipe: Recipe) -> None:
    """Raises ConfigError where the weights to begin from are not there; a dry run doesn't need them."""
    if recipe.initialize is not None and not Path(recipe.initialize).exists():
        raise ConfigError(f"--transformer (initialize) is {recipe.initialize}, which is not there; expected weights, a file or a folder.")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """The folder is this run's alone, of all its processes; raises ConfigError where another run has it. A killed run leaves it free."""
    if int(os.environ.get("RANK", "0")):  # the first process has it for all
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"Another run is using {run_dir}. Wait for its end, or give another run_dir or --output.") from None
    try:
        yield
    finally:
        lock.release()


def _check_output(recipe: Recipe, output: Path) -> None:
    if output.suffix.lower() != SUFFIX and not (getattr(recipe.method.settings, "layout", None) == "diffusers" and not output.suffix):
        raise ConfigError(f"--output is {output}; expected a name that ends in {SUFFIX}, which is what is written.")
    if output.is_dir() and output.suffix:
        raise ConfigError(f"--output is {output}, which is a folder; expected a file in it, such as {output / f'style{SUFFIX}'}.")
    if not _is_folder_to_be(output.parent):
        raise ConfigError(f"--output is {output}, and {output.parent} is no folder and can't become one.")
    read = {"initialize": recipe.initialize, **{f"source.{name}": _place(recipe.source.settings, name) for name in SOURCE_PLACES}}
    read["objective.teacher"] = _place(recipe.objective.settings, "teacher")
    for name, place in read.items():
        if place and output.resolve() == Path(place).resolve():
            raise ConfigError(f"--output is {output}, which the run reads as {name}; write elsewhere.")


def _place(settings: Any, name: str) -> str | None:
    found = getattr(settings, name, None)
    return found if isinstance(found, str) else None


def _is_folder_to_be(folder: Path) -> bool:
    """Whether it is a folder that can be written to, or the nearest place above it is."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _folders(recipe: Recipe, output: Path) -> list[Path]:
    """What the method lora writes beside the output, if asked."""
    asked = getattr(recipe.method.settings, "peft_folder", False)
    return [output.with_name(output.stem + end) for end in ("-peft", "-peft-text")] if asked else []


def _wrote(state: Path, output: Path) -> bool:
    """Whether the run of a state writes to `output`."""
    return Path(str(read_info(state)["recipe"].get("output"))).resolve() == output.resolve()
