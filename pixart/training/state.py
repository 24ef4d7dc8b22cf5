"""What a run needs to go on: tensors in safetensors shards by torch's distributed checkpoint, plain values in `info.json`.

A state is a folder that appears whole; a run that is killed at any moment has the one before. It can be read by another
number of processes than wrote it.
"""
from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, ConfigError
from .base import file_mark
from .recipe import Recipe, make_recipe

INFO, PARTIAL, AGAIN = "info.json", ".partial", "-again"
LEFT_FOLDERS, LEFT_FILES = ("states", "samples"), ("log.jsonl", "loss.png")
LEFT = (*LEFT_FOLDERS, *LEFT_FILES)  # what a run leaves in its folder, beside its contents
FREE = (  # fields of a recipe that change no weight, but for rounding
    "output", "run_dir", "save_every", "log_every", "compile_blocks", "checkpoint_blocks", "trim_memory", "shard", "accumulation",
    "samples", "validation_every", "trackers", "notes",
)  # fmt: skip


def newest_state(run_dir: Path) -> Path | None:
    """The folder of the last whole state of a run."""
    found = [folder for folder in (run_dir / "states").glob("*") if _is_state(folder) and (folder / INFO).is_file()]
    return max(found, key=lambda folder: int(folder.name.partition(AGAIN)[0]), default=None)


def clear_run(run_dir: Path) -> None:
    """Removes what a former run left in its folder: states, log and pictures."""
    for name in LEFT_FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in LEFT_FILES:
        (run_dir / name).unlink(missing_ok=True)


def write_state(run_dir: Path, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
    """Writes the state of a step and removes older ones; every process calls it. Raises OSError where it can't be written."""
    folder = run_dir / "states" / f"{step:08}"
    if folder.exists():  # the same step again: under another name, so that at every moment one of the two is whole
        folder = folder.with_name(folder.name + AGAIN)
    partial = folder.with_name(folder.name + PARTIAL)
    first = _rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            checkpoint.save(_apart(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except Exception as error:  # torch wraps what a full disk raises
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"The state of step {step} can't be written to {folder} ({error}); is the disk full?") from None
    if first:
        (partial / INFO).write_text(json.dumps({**info, "step": step}, indent=1), encoding="utf-8")
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in folder.parent.glob("*"):
            if old != folder and (_is_state(old) or old.name.endswith(PARTIAL)):
                shutil.rmtree(old, ignore_errors=True)
    _wait()
    return folder


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that share memory with another, as 8-bit optimizers' tables do, which safetensors refuses to write."""
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        place = 0 if isinstance(value, DTensor) or not value.numel() else value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in seen else value
        seen |= {place} - {0}
    return apart


def read_info(folder: Path) -> dict[str, Any]:
    """The plain values of a state; raises CheckpointError if they are damaged."""
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        return {**info, "step": int(info["step"]), "recipe": dict(info["recipe"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INFO} is damaged ({error}). Remove this folder, or start over with --overwrite.") from None


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place; raises CheckpointError unless the state has each of them in its shape."""
    stored = stored_tensors(folder)
    wrong = [name for name, value in tensors.items() if name not in stored or stored[name].shape != value.shape]
    wrong = [f"{name} {tuple(stored[name].shape) if name in stored else 'missing'}" for name in wrong]
    if wrong:
        raise CheckpointError(f"{folder} belongs to another model: found {', '.join(wrong[:4])}. Start over with --overwrite.")
    with _damage(folder):
        checkpoint.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> a tensor on the meta device, of all that a state holds; raises CheckpointError if it is damaged."""
    with _damage(folder):
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return {name: torch.empty(found.size, dtype=found.properties.dtype, device="meta") for name, found in stored.items()}


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever torch and safetensors raise while they read, as one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
            yield
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged ({error}). Remove it, or start over with --overwrite.") from None


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """`check_same` of the recipe, and of the weights to begin from, that a state was made with and of today's."""
    info, start = read_info(folder), "content of initialize"
    check_same(folder, {**completed(info["recipe"]), start: info.get("base")}, {**recipe.to_dict(), start: file_mark(recipe.initialize)})


def check_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError naming every field by which a recipe differs from the one that a state was made with."""
    changed = [text for text in differences(then, now) if not set(text.partition(":")[0].split(".")) & set(FREE)]
    if changed:
        raise ConfigError(
            f"The run in {folder.parent.parent} was trained with another recipe: {'; '.join(changed[:6])}. Continue with the changes by "
            "--accept-changes, start over with --overwrite, or give another run_dir."
        )


def completed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's `to_dict` by a former version, with today's values of fields that it did not have; as it is where it had others."""
    try:
        return make_recipe(values, "former recipe").to_dict()
    except ConfigError:
        return values


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Every value by which two recipes differ, as "stages.0.steps: 5 -> 6"."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        return [text for key in keys for text in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [text for number, pair in enumerate(zip(then, now)) for text in differences(*pair, f"{name}.{number}")]
    return [] if then == now else [f"{name}: {json.dumps(then)} -> {json.dumps(now)}"]


def _is_state(folder: Path) -> bool:
    return folder.name.removesuffix(AGAIN).isdigit()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _flush(folder: Path) -> None:
    """What is written reaches the disk before the folder gets its name."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
