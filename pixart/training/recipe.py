"""A training run as data: `configs/train/*.json`."""
from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import get_variant
from ..errors import ConfigError
from .fields import typed
from .parts import KINDS, Chosen, choose, part_module
from .taught import check_teacher

EXAMPLE = "configs/train/demo.json"
OPTIMIZERS = ("adamw", "adamw8bit", "came", "prodigy", "muon")


@dataclass(frozen=True)
class Stage:
    """Some steps at one base size; a recipe goes from low to high, as the paper does."""

    base_size: int  # pixels; the bins of the variant's base size are scaled to this
    steps: int
    batch_size: int  # of one update, over all processes, which share it evenly
    learning_rate: float
    accumulation: int = 1  # each process computes its share of the batch in so many parts, one after the other, to save memory
    schedule: str | None = None  # constant, linear or cosine; null is linear if there is a final_learning_rate, else constant
    final_learning_rate: float | None = None  # reached at the stage's end; null is 0 for linear and cosine
    objective: dict[str, Any] = field(default_factory=dict)  # settings that differ from the recipe's objective in this stage
    source: dict[str, Any] = field(default_factory=dict)  # likewise of its source


@dataclass(frozen=True)
class Samples:
    """Pictures that a run draws as it goes, always from the same noise, with the averaged weights."""

    prompts: tuple[str, ...]
    every: int = 500  # steps
    ratios: tuple[float, ...] = (1.0,)  # height / width, one prompt after the other; the nearest bin of the stage's base size is drawn
    steps: int | None = None  # null: 20, or what a model in distillation is made for
    guidance: float | None = None  # null: 4.5, or 1 for a model in distillation
    negative: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on; unknown fields are refused by name."""

    variant: str
    method: Chosen  # what is trained
    objective: Chosen  # what a step computes
    source: Chosen  # where pictures come from
    stages: tuple[Stage, ...]
    output: str | None = None  # the averaged weights; --output
    run_dir: str | None = None  # states to go on from, the log, samples; null lies beside the output, NAME-run
    initialize: str | None = None  # start from these weights; --transformer
    from_scratch: bool = False  # random first weights where initialize is null; sources that draw their pictures don't ask
    seed: int = 0
    precision: str = "bf16"  # of the products; "fp16" scales the loss, "fp32" is exact
    optimizer: str = "adamw"  # one of OPTIMIZERS, see `optimizers.py`
    betas: tuple[float, float] | tuple[float, float, float] = (0.9, 0.99)  # came has a third, 0.9999 by itself
    epsilon: float | None = None  # of the optimizer's division; null is its library's own
    weight_decay: float = 0.0
    learning_rate_scaling: str = "none"  # "sqrt" multiplies by sqrt(batch_size / 256), as the reference's auto_lr does
    warmup_steps: int = 300
    clip_norm: float = 1.0  # of the gradient; 0 doesn't clip
    ema_decay: float = 0.999  # 0 keeps no average, and saves its memory
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    dropped_mask: str = "empty"  # what an empty caption is masked with: "empty", its own mask, or "caption", the one it replaces
    save_every: int = 250  # steps
    log_every: int = 25  # steps
    compile_blocks: bool = False  # torch.compile, which needs a C++ compiler
    trim_memory: bool = False  # on a CPU under Linux: what blocks freed goes back to the system; less memory, up to an eighth more time
    checkpoint_blocks: bool = False  # blocks keep little, and compute anew in the backward pass: up to a third more time, little memory
    shard: bool = False  # FSDP2: processes share weights, gradients and the optimizer's state instead of each holding all
    samples: Samples | None = None  # null draws none
    validation_every: int | None = None  # steps between looks at held-out pictures, at fixed noise and timesteps; null never looks
    trackers: tuple[str, ...] = ()  # tensorboard, wandb, trackio; beside log.jsonl
    notes: dict[str, str] = field(default_factory=dict)  # field -> where its value comes from, for readers: JSON has no comments

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
        """Linear warm-up over the run's first steps, then the stage's own schedule; scaled by the batch if asked."""
        number, inside = self.stage_at(step)
        stage = self.stages[number]
        rate = scheduled(stage, inside) * min(1.0, (step + 1) / max(1, self.warmup_steps))
        return rate * (math.sqrt(stage.batch_size / SCALED_BATCH) if self.learning_rate_scaling == "sqrt" else 1.0)

    def part_at(self, kind: str, stage: int) -> Chosen:
        """The objective or source with the settings of one stage."""
        return getattr(self, kind).changed(getattr(self.stages[stage], kind), f"stages.{stage}.{kind}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe's file has them."""
        values = asdict(self)
        for kind in KINDS:
            chosen = getattr(self, kind)
            values[kind] = {"name": chosen.name, **asdict(chosen.settings)}
        return json.loads(json.dumps(values))


CHOICES = {
    "precision": ("bf16", "fp16", "fp32"),
    "dropped_mask": ("empty", "caption"),
    "learning_rate_scaling": ("none", "sqrt"),
    "optimizer": OPTIMIZERS,
}
SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb", "trackio")
SCALED_BATCH = 256  # the batch that a learning rate is meant for, in the reference's diffusion/utils/optimizer.py
AT_LEAST = {"seed": 0, "warmup_steps": 0, "save_every": 1, "log_every": 1, "clip_norm": 0, "weight_decay": 0}
STAGE_AT_LEAST = {"base_size": 1, "steps": 1, "batch_size": 1, "accumulation": 1, "learning_rate": 0}
MOST_SEED = 2**63


def scheduled(stage: Stage, inside: int) -> float:
    """The learning rate at a step of a stage, from 0, without warm-up."""
    schedule = stage.schedule or ("constant" if stage.final_learning_rate is None else "linear")
    if schedule == "constant":
        return stage.learning_rate
    done, final = inside / stage.steps, stage.final_learning_rate or 0.0
    gone = done if schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return stage.learning_rate + (final - stage.learning_rate) * gone


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
    if values.get("samples") is not None:
        values["samples"] = typed(Samples, values["samples"], f"{source}, samples")
    if values.get("run_dir") is None and isinstance(values.get("output"), str):
        values["run_dir"] = f"{Path(values['output']).with_suffix('')}-run"
    recipe = typed(Recipe, values, source)
    get_variant(recipe.variant)
    _check(recipe, source)
    return recipe


def _check(recipe: Recipe, source: str) -> None:
    """Values that their types allow and that no run can have."""
    for name, known in CHOICES.items():
        if getattr(recipe, name) not in known:
            raise ConfigError(f"{source}: {name} is {getattr(recipe, name)!r}; expected one of {', '.join(known)}.")
    for name in recipe.trackers:
        if name not in TRACKERS:
            raise ConfigError(f"{source}: trackers has {name!r}; expected some of {', '.join(TRACKERS)}.")
    _at_least(recipe, AT_LEAST, source)
    if not 0 <= recipe.caption_dropout <= 1:
        raise ConfigError(f"{source}: caption_dropout is {recipe.caption_dropout}; expected 0 to 1.")
    if not 0 <= recipe.ema_decay < 1:  # at 1 the average would never move
        raise ConfigError(f"{source}: ema_decay is {recipe.ema_decay}; expected 0 to below 1.")
    if recipe.seed >= MOST_SEED:
        raise ConfigError(f"{source}: seed is {recipe.seed}; expected a whole number below 2^63.")
    if recipe.epsilon is not None and not recipe.epsilon > 0:
        raise ConfigError(f"{source}: epsilon is {recipe.epsilon}; expected a number above 0, or null for the optimizer's own.")
    if any(not 0 <= beta < 1 for beta in recipe.betas):
        raise ConfigError(f"{source}: betas are {list(recipe.betas)}; expected numbers from 0 to below 1.")
    if recipe.validation_every is not None:
        _at_least(recipe, {"validation_every": 1}, source)
    if recipe.samples is not None:
        _at_least(recipe.samples, {"every": 1} if recipe.samples.steps is None else {"every": 1, "steps": 1}, f"{source}, samples")
        if not recipe.samples.prompts or not recipe.samples.ratios or min(recipe.samples.ratios) <= 0:
            raise ConfigError(f"{source}, samples: expected at least one prompt and ratios above 0, height / width.")
    for number, stage in enumerate(recipe.stages):
        _check_stage(stage, f"{source}, stage {number}")
        for kind in ("objective", "source"):
            recipe.part_at(kind, number)  # names are checked here, not hours later
    endless = next(_endless(recipe.to_dict()), None)
    if endless:
        raise ConfigError(f"{source}: {endless}; expected a finite number.")


def _endless(value: Any, name: str = "") -> Iterator[str]:
    """Every number that is infinite or none at all, as "stages.0.learning_rate is inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _endless(part, f"{name}.{key}" if name else str(key))


def _check_stage(stage: Stage, source: str) -> None:
    _at_least(stage, STAGE_AT_LEAST, source)
    if stage.final_learning_rate is not None:
        _at_least(stage, {"final_learning_rate": 0}, source)
    if stage.batch_size % stage.accumulation:
        raise ConfigError(f"{source}: a batch of {stage.batch_size} doesn't divide into {stage.accumulation} parts (accumulation).")
    if stage.schedule not in (None, *SCHEDULES):
        raise ConfigError(f"{source}: schedule is {stage.schedule!r}; expected one of {', '.join(SCHEDULES)}.")
    if stage.schedule == "constant" and stage.final_learning_rate is not None:
        raise ConfigError(f"{source}: a constant schedule has no final_learning_rate; choose linear or cosine, or leave it out.")


def _at_least(settings: Any, least: Mapping[str, float], source: str) -> None:
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:  # NaN too
            raise ConfigError(f"{source}: {name} is {getattr(settings, name)}; expected {bound} or more.")


def check_given(recipe: Recipe) -> None:
    """Raises ConfigError naming the flag for what a recipe leaves to the command line and nobody gave; sources name their own."""
    missing = ["--output"] if recipe.output is None else []
    if recipe.initialize is None and not recipe.from_scratch and hasattr(recipe.source.settings, "data"):
        missing.append("--transformer (or from_scratch true)")
    if getattr(part_module("objective", recipe.objective.name), "NEEDS_TEACHER", False):
        teacher = recipe.objective.settings.teacher or recipe.initialize
        if teacher is None:
            raise ConfigError(
                f"Objective {recipe.objective.name} learns from a trained model, and the recipe names none: random weights have nothing "
                "to teach. Give --transformer, or set the objective's teacher."
            )
        check_teacher(teacher, recipe.objective.name)
    if missing:
        raise ConfigError(f"The recipe leaves {' and '.join(missing)} to the command line; add {'it' if len(missing) == 1 else 'them'}.")


def read_values(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's values, on top of those of the recipe that it `extends`, a path beside it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
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
