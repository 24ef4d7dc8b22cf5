"""A training run as data: `configs/train/*.json`."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import get_variant
from ..errors import ConfigError
from .fields import typed
from .parts import KINDS, Chosen, choose

EXAMPLE = "configs/train/demo.json"


@dataclass(frozen=True)
class Stage:
    """Some steps at one base size; a recipe goes from low to high, as the paper does."""

    base_size: int  # pixels; the bins of the variant's base size are scaled to this
    steps: int
    batch_size: int  # over all processes, which share it evenly
    learning_rate: float
    final_learning_rate: float | None = None  # reached linearly at the stage's end; None stays constant
    objective: dict[str, Any] = field(default_factory=dict)  # settings that differ from the recipe's objective in this stage
    source: dict[str, Any] = field(default_factory=dict)  # likewise of its source


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on; unknown fields are refused by name."""

    variant: str
    method: Chosen  # what is trained
    objective: Chosen  # what a step computes
    source: Chosen  # where pictures come from
    output: str  # the averaged weights, in the project's format
    run_dir: str  # states to go on from, and the log
    stages: tuple[Stage, ...]
    initialize: str | None = None  # start from these weights instead of random ones
    seed: int = 0
    precision: str = "bf16"  # of the products; "fp16" scales the loss, "no" is fp32
    optimizer: str = "adamw"  # or "muon"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 300
    clip_norm: float = 1.0  # of the gradient
    ema_decay: float = 0.999
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    dropped_mask: str = "empty"  # what an empty caption is masked with: "empty", its own mask, or "caption", the one it replaces
    save_every: int = 250  # steps
    log_every: int = 25  # steps
    compile_blocks: bool = False  # torch.compile, which needs a C++ compiler

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Number of the stage that `step` (from 0) belongs to, and the step within it."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise ConfigError(f"Step is past the recipe's {self.steps} steps.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the run's first steps, then the stage's own line."""
        number, inside = self.stage_at(step)
        stage = self.stages[number]
        final = stage.learning_rate if stage.final_learning_rate is None else stage.final_learning_rate
        rate = stage.learning_rate + (final - stage.learning_rate) * inside / stage.steps
        return rate * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def part_at(self, kind: str, stage: int) -> Chosen:
        """The objective or source with the settings of one stage."""
        return getattr(self, kind).changed(getattr(self.stages[stage], kind), f"stage {stage}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe's file has them."""
        values = asdict(self)
        for kind in KINDS:
            chosen = getattr(self, kind)
            values[kind] = {"name": chosen.name, **asdict(chosen.settings)}
        return json.loads(json.dumps(values))


CHOICES = {"precision": ("bf16", "fp16", "no"), "dropped_mask": ("empty", "caption")}
AT_LEAST = {"warmup_steps": 0, "save_every": 1, "log_every": 1}
SHARES = ("ema_decay", "caption_dropout")


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; raises ConfigError naming the file and the field.

    changes: "field=value" each, as of `--set`; "stages.0.steps=10" reaches into lists and parts, values are JSON or plain text.
    """
    path = Path(path)
    values = read_values(path)
    for change in changes:
        _set(values, change)
    return make_recipe(values, str(path))


def make_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from plain values; `source` is named in errors."""
    values = dict(values)
    stages = values.get("stages") or []
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{source}: no stages; expected a list with base_size, steps, batch_size, learning_rate.")
    values["stages"] = tuple(typed(Stage, stage, f"{source}, stage {i}") for i, stage in enumerate(stages))
    for kind in KINDS:
        if kind not in values:
            raise ConfigError(f"{source}: field {kind!r} is missing; add it.")
        values[kind] = choose(kind, values[kind], source)
    recipe = typed(Recipe, values, source)
    get_variant(recipe.variant)
    _check(recipe, source)
    return recipe


def _check(recipe: Recipe, source: str) -> None:
    """Values that their types allow and that no run can have."""
    for name, known in CHOICES.items():
        if getattr(recipe, name) not in known:
            raise ConfigError(f"{source}: {name} is {getattr(recipe, name)!r}; expected one of {', '.join(known)}.")
    for name, least in AT_LEAST.items():
        if getattr(recipe, name) < least:
            raise ConfigError(f"{source}: {name} is {getattr(recipe, name)}; expected {least} or more.")
    for name in SHARES:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ConfigError(f"{source}: {name} is {getattr(recipe, name)}; expected 0 to 1.")
    for number, stage in enumerate(recipe.stages):
        for name in ("base_size", "steps", "batch_size"):
            if getattr(stage, name) < 1:
                raise ConfigError(f"{source}, stage {number}: {name} is {getattr(stage, name)}; expected 1 or more.")
        for kind in ("objective", "source"):
            recipe.part_at(kind, number)  # names are checked here, not hours later


def read_values(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's values, on top of those of the recipe that it `extends`, a path beside it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"Can't read the training recipe {path}: {error}. Expected a JSON file like {EXAMPLE}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected an object like {EXAMPLE}.")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}; expected the name of a recipe beside it.")
    parent = (path.parent / base).resolve()
    if parent in (*seen, path.resolve()):
        raise ConfigError(f"{path}: extends {base}, which extends it in turn; break the circle.")
    return merged(read_values(parent, (*seen, path.resolve())), values)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; objects are merged, unless they name another part."""
    result = dict(under)
    for name, value in over.items():
        below = result.get(name)
        same = isinstance(value, dict) and isinstance(below, dict) and value.get("name", below.get("name")) == below.get("name")
        result[name] = merged(below, value) if same else value
    return result


def _set(values: dict[str, Any], change: str) -> None:
    """One "field=value" of the command line, in place."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {change!r}: expected field=value, such as seed=1 or stages.0.steps=500.")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *path, last = name.split(".")
    place: Any = values
    for part in path:
        place = _inside(place, part, change)
    if isinstance(place, list):
        _inside(place, last, change)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"--set {change!r}: {'.'.join(path)} is {place!r}, which has no fields.")


def _inside(place: Any, part: str, change: str) -> Any:
    if isinstance(place, list):
        if not part.isdigit() or int(part) >= len(place):
            raise ConfigError(f"--set {change!r}: found {part!r}; expected a number from 0 to {len(place) - 1}.")
        return place[int(part)]
    if isinstance(place, dict):
        found = place.setdefault(part, {})
        if isinstance(found, str):  # a part by its name alone
            found = place[part] = {"name": found}
        return found
    raise ConfigError(f"--set {change!r}: there is nothing inside {part!r}.")
