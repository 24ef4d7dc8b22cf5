"""Which files of a folder are the weights: one file, or the shards that an index names; variants and leftovers set aside."""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, PixArtError
from ..json_files import shard_files

WEIGHTS_NAME = "diffusion_pytorch_model"
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt")
SAFE_SUFFIXES = (".safetensors", ".sft")
_SHARD = re.compile(r"\d{5}-of-\d{5}")
_VARIANT = re.compile(r"[._-](fp16|bf16|fp32|fp8|non_ema|ema)\b", re.IGNORECASE)
NO_WEIGHTS = re.compile(r"optimizer|scheduler|random_states|scaler|training_args|rng_state", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """One complete set of weights in a folder."""

    files: tuple[Path, ...]
    label: str  # name of the file, or of the index

    def rank(self, name: str) -> tuple[bool, bool, bool]:
        """The smallest is the best: safetensors, full precision, the usual name."""
        first = self.files[0].name.lower()
        variant = bool(_VARIANT.search(self.label))
        return not first.endswith(SAFE_SUFFIXES), variant, not first.startswith(name)


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name: model.safetensors.index.json, ....index.fp16.json."""
    return path.suffix == ".json" and ".index" in path.name


def weight_files(folder: Path, name: str = WEIGHTS_NAME, error: type[PixArtError] = CheckpointError) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a folder's weights, and what to note where there was a choice; raises `error` where that isn't clear.

    name: how weights of this kind are usually called.
    """
    inside = sorted(file for file in folder.iterdir() if file.is_file())
    sets, broken = _indexed([file for file in inside if is_index(file)], error)
    singles = [file for file in inside if file.suffix.lower() in WEIGHT_SUFFIXES and not _SHARD.search(file.name)]
    sets += [Found((file,), file.name) for file in singles if not NO_WEIGHTS.search(file.name)]
    if not sets and broken:
        raise broken[0]
    ranked = sorted(sets, key=lambda one: one.rank(name))
    best = [one for one in ranked if one.rank(name) == ranked[0].rank(name)] if ranked else []
    if len(best) > 1:
        best = [one for one in best if one.label.partition(".")[0] == name] or best
    if len(best) != 1:
        names = ", ".join(one.label for one in best) or ", ".join(file.name for file in inside) or "nothing"
        whole = " or the folder of a PixArt pipeline or transformer" if name == WEIGHTS_NAME else " itself"
        raise error(f"{folder}: found {names}; expected one weight file, {name}.safetensors (with config.json). Choose the file{whole}.")
    others = [one.label for one in ranked if one is not best[0]]
    note = (f"{best[0].label} is used; the folder also holds {', '.join(others)}.",) if others else ()
    return list(best[0].files), note


def _indexed(indexes: Iterable[Path], error: type[PixArtError]) -> tuple[list[Found], list[PixArtError]]:
    """The sets of shards that are complete, and what is wrong with the others."""
    sets, broken = [], []
    for index in indexes:
        try:
            sets.append(Found(tuple(shard_files(index, error=error)), index.name))
        except PixArtError as reason:
            if "outside" in str(reason):
                raise  # no leftover
            broken.append(reason)
    return sets, broken
