"""A training run as data: `configs/train/*.json`."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import from_fields, get_variant
from ..errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """Some steps at one base size; a recipe goes from low to high, as the paper does."""

    base_size: int  # pixels; the bins of the variant's base size are scaled to this
    steps: int
    batch_size: int  # over all processes, which share it evenly
    learning_rate: float
    final_learning_rate: float | None = None  # reached linearly at the stage's end; None stays constant
    timestep_mean: float = 0.0  # timesteps are 1000 * sigmoid(normal(mean, std)): where composition is decided
    timestep_std: float = 1.0
    square_share: float = 0.0  # of the batches, on top of what the square gets as one bin among the others


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on; unknown fields are refused by name."""

    variant: str
    source: str  # a name of `data.SOURCES`
    text_encoder: str
    output: str  # the EMA weights, in the project's format
    run_dir: str  # full state for resuming, and the log
    stages: tuple[Stage, ...]
    initialize: str | None = None  # start from these weights instead of random ones
    compressed_blocks: tuple[tuple[int, int], ...] = ()  # (block, ratio) of KV compression, which the start may lack
    pass_noise: bool = False  # begin as the identity on noise, see `initialize.pass_noise_through`
    seed: int = 0
    precision: str = "bf16"  # or "no" for fp32
    optimizer: str = "adamw"  # or "muon"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 300
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    max_loss_weight: float = 1.0  # noise loss is weighted by min(1/alpha_bar, this); 1 is the plain loss
    align_weight: float = 0.0  # of the auxiliary loss, see `alignment.py`; 0 is without
    align_block: int = 0  # whose tokens are aligned
    control_blocks: int = 0  # train a ControlNet of so many blocks beside `initialize`; 0 trains the transformer
    save_every: int = 250
    compile_blocks: bool = False  # torch.compile, which needs a C++ compiler

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage that `step` (from 0) belongs to, and the step within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ConfigError(f"Step is past the recipe's {self.steps} steps.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the run's first steps, then the stage's own line."""
        stage, inside = self.stage_at(step)
        final = stage.learning_rate if stage.final_learning_rate is None else stage.final_learning_rate
        rate = stage.learning_rate + (final - stage.learning_rate) * inside / stage.steps
        return rate * min(1.0, (step + 1) / max(1, self.warmup_steps))


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe; raises ConfigError naming the file and the field."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"Can't read the training recipe {path}: {error}. Expected a JSON file like configs/train/demo.json.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected an object like configs/train/demo.json.")
    stages = values.get("stages") or []
    if not stages:
        raise ConfigError(f"{path}: no stages; expected a list with base_size, steps, batch_size, learning_rate.")
    values["stages"] = tuple(from_fields(Stage, stage, f"{path}, stage {i}") for i, stage in enumerate(stages))
    values["betas"] = tuple(values.get("betas", (0.9, 0.99)))
    pairs = values.get("compressed_blocks", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and [type(n) for n in pair] == [int, int] for pair in pairs):
        raise ConfigError(f"{path}: compressed_blocks is {pairs!r}; expected pairs [block, ratio], like [[4, 2], [5, 2]].")
    values["compressed_blocks"] = tuple(tuple(pair) for pair in pairs)
    recipe = from_fields(Recipe, values, str(path))
    get_variant(recipe.variant)
    return recipe
