"""Recipes: what they say, what they extend, what the command line changes, and how bad ones are refused."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from pixart.errors import ConfigError
from pixart.training.parts import KINDS, choose, part_names
from pixart.training.recipe import load_recipe, make_recipe, read_values
from tests.support.tiny_training import recipe_values

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/train").glob("*.json"))


def write(folder: Path, name: str = "r.json", **values: object) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder / name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_survive_being_written(path: Path) -> None:
    recipe = load_recipe(path)
    assert make_recipe(recipe.to_dict(), "again") == recipe
    assert recipe.steps > 0 and recipe.learning_rate(recipe.steps - 1) > 0


@pytest.mark.parametrize("path", [path for path in SHIPPED if not path.stem.startswith("demo")], ids=lambda path: path.stem)
def test_every_value_of_a_recipe_for_released_models_says_where_it_comes_from(path: Path) -> None:
    values = read_values(path)
    notes = values.pop("notes")
    named = {"variant", "source.name", "method.name", "stages.base_size"}  # what the recipe is for
    found = set()
    for name, value in values.items():
        parts = value[0] if name == "stages" else value if isinstance(value, dict) else None
        found |= {f"{name}.{part}" for part, each in parts.items() if each is not None} if parts else {name}
    assert found - named <= notes.keys(), sorted(found - named - notes.keys())
    recipe = load_recipe(path)
    assert recipe.initialize is None and recipe.output is None and recipe.source.settings.data is None
    assert all(recipe.to_dict().get(name.partition(".")[0]) is not None for name in notes)


def test_a_recipe_extends_another_and_overrides_what_it_names(tmp_path: Path) -> None:
    write(tmp_path, "base.json", **recipe_values(tmp_path, objective={"name": "denoise", "max_loss_weight": 5}))
    recipe = load_recipe(write(tmp_path, extends="base.json", seed=7, objective={"timestep_std": 2}, method={"name": "kv", "blocks": [[1, 2]]}))
    assert (recipe.seed, recipe.objective.settings.max_loss_weight, recipe.objective.settings.timestep_std) == (7, 5, 2)
    assert recipe.method.name == "kv" and recipe.method.settings.blocks == ((1, 2),)
    other = load_recipe(write(tmp_path, "o.json", extends="r.json", objective={"name": "aligned"}))
    assert other.objective.settings.max_loss_weight == 1  # another objective begins with its own settings


def test_the_command_line_reaches_every_field(tmp_path: Path) -> None:
    path = write(tmp_path, **recipe_values(tmp_path))
    changes = ["seed=3", "output=elsewhere.safetensors", "stages.0.steps=9", "method.pass_noise=true", "stages.0.objective.timestep_std=2"]
    recipe = load_recipe(path, changes)
    assert (recipe.seed, recipe.output, recipe.steps, recipe.method.settings.pass_noise) == (3, "elsewhere.safetensors", 9, True)
    assert recipe.part_at("objective", 0).settings.timestep_std == 2 and recipe.objective.settings.timestep_std == 1


def test_stages_have_their_own_settings_and_learning_rates(tmp_path: Path) -> None:
    stages = [
        {"base_size": 64, "steps": 100, "batch_size": 1, "learning_rate": 1.0, "objective": {"timesteps": "uniform"}},
        {"base_size": 128, "steps": 100, "batch_size": 1, "learning_rate": 1.0, "final_learning_rate": 0.0},
    ]
    recipe = make_recipe(recipe_values(tmp_path, stages=stages, warmup_steps=10), "r")
    rates = [recipe.learning_rate(step) for step in (0, 9, 99, 100, 150, 199)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.01])
    assert [recipe.part_at("objective", i).settings.timesteps for i in (0, 1)] == ["uniform", "logit_normal"]
    assert recipe.stage_at(99) == (0, 99) and recipe.stage_at(100) == (1, 0)
    with pytest.raises(ConfigError, match="past the recipe's 200 steps"):
        recipe.stage_at(200)


def stage_rates(tmp_path: Path, steps: tuple[int, ...], **fields: object) -> list[float]:
    stage = {"base_size": 64, "steps": 100, "batch_size": 64, "learning_rate": 1.0, **fields.pop("stage", {})}
    recipe = make_recipe(recipe_values(tmp_path, stages=[stage], **{"warmup_steps": 0, **fields}), "r")
    return [recipe.learning_rate(step) for step in steps]


def test_schedules_are_those_of_torch(tmp_path: Path) -> None:
    """Against torch's schedulers, stepped."""
    parameter = torch.nn.Parameter(torch.zeros(1))

    def stepped(make) -> list[float]:
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler, rates = make(optimizer), []
        for _ in range(100):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    every = tuple(range(100))
    cosine = stepped(lambda optimizer: CosineAnnealingLR(optimizer, 100, eta_min=0.2))
    linear = stepped(lambda optimizer: LinearLR(optimizer, 1.0, 0.2, total_iters=100))
    assert stage_rates(tmp_path, every, stage={"schedule": "cosine", "final_learning_rate": 0.2}) == pytest.approx(cosine)
    assert stage_rates(tmp_path, every, stage={"schedule": "linear", "final_learning_rate": 0.2}) == pytest.approx(linear)
    assert stage_rates(tmp_path, (0, 50), stage={"schedule": "cosine"}) == pytest.approx([1, 0.5])
    assert stage_rates(tmp_path, (0, 99), stage={"schedule": "constant"}) == [1, 1]
    assert stage_rates(tmp_path, (0, 9, 50), warmup_steps=20) == pytest.approx([0.05, 0.5, 1])


@pytest.mark.parametrize(("batch", "rate"), [(2, 1.77e-6), (16, 5e-6), (64, 1e-5), (1024, 4e-5)])
def test_the_square_root_rule_is_the_references(tmp_path: Path, batch: int, rate: float) -> None:
    stage = {"batch_size": batch, "learning_rate": 2e-5}
    assert stage_rates(tmp_path, (0,), stage=stage, learning_rate_scaling="sqrt") == pytest.approx([rate], rel=2e-3)
    assert stage_rates(tmp_path, (0,), stage=stage) == [2e-5]


def test_a_runs_folder_lies_beside_its_output(tmp_path: Path) -> None:
    values = {name: value for name, value in recipe_values(tmp_path).items() if name not in ("run_dir", "output")}
    path = write(tmp_path, **values)
    assert (load_recipe(path).output, load_recipe(path).run_dir) == (None, None)
    assert load_recipe(path, ["output=a/b.safetensors"]).run_dir == str(Path("a/b-run"))
    assert load_recipe(path, ["output=a/b.safetensors", "run_dir=c"]).run_dir == "c"


STAGE = {"base_size": 64, "steps": 5, "batch_size": 8, "learning_rate": 1e-3}
BAD = {
    "unknown field": ({"speed": 3}, "unknown field.*speed"),
    "no stages": ({"stages": []}, "no stages"),
    "stages are no list": ({"stages": {"steps": 3}}, "no stages"),
    "unknown field of a stage": ({"stages": [{**STAGE, "size": 3}]}, "stage 0: unknown field.*size"),
    "missing field of a stage": ({"stages": [{"base_size": 64}]}, "stage 0: field.*steps.*missing"),
    "a stage of no steps": ({"stages": [{**STAGE, "steps": 0}]}, "stage 0: steps is 0; expected 1 or more"),
    "text for a number": ({"seed": "one"}, "seed is 'one'; expected a whole number"),
    "truth for a number": ({"seed": True}, "seed is True; expected a whole number"),
    "a fraction of a step": ({"stages": [{**STAGE, "steps": 2.5}]}, "steps is 2.5; expected a whole number"),
    "one beta": ({"betas": [0.9]}, r"betas is .*; expected \[a number, a number\]"),
    "unknown variant": ({"variant": "sigma-9"}, "sigma-9"),
    "unknown method": ({"method": "dream"}, "Unknown method 'dream'; expected one of controlnet, full, kv"),
    "code for a method": ({"method": "os:system"}, "Unknown method 'os:system'"),
    "a path for a source": ({"source": {"name": "../scenes", "text_encoder": ""}}, "Unknown source '../scenes'"),
    "a part that is a number": ({"objective": 3}, "objective is 3; expected a name, or an object"),
    "unknown setting": ({"objective": {"name": "denoise", "snr": 5}}, "objective denoise: unknown field.*snr"),
    "unknown setting of a stage": ({"stages": [{**STAGE, "objective": {"snr": 5}}]}, "stages.0.objective, objective denoise: unknown field.*snr"),
    "missing setting": ({"source": "scenes"}, "source scenes: field.*text_encoder.*missing"),
    "blocks that are no pairs": ({"method": {"name": "kv", "blocks": [4, 5]}}, "method kv: blocks is"),
    "unknown precision": ({"precision": "fp64"}, "precision is 'fp64'; expected one of bf16, fp16, fp32"),
    "a share above 1": ({"caption_dropout": 1.5}, "caption_dropout is 1.5; expected 0 to 1"),
    "never saved": ({"save_every": 0}, "save_every is 0; expected 1 or more"),
    "unknown optimizer": ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adamw, adamw8bit, came, prodigy, muon"),
    "unknown schedule": ({"stages": [{**STAGE, "schedule": "step"}]}, "stage 0: schedule is 'step'; expected one of constant, linear, cosine"),
    "a constant schedule that ends elsewhere": ({"stages": [{**STAGE, "schedule": "constant", "final_learning_rate": 0}]}, "has no final_learning_rate"),
    "parts that don't divide the batch": ({"stages": [{**STAGE, "accumulation": 3}]}, "stage 0: a batch of 8 doesn't divide into 3 parts"),
    "a rate below 0": ({"stages": [{**STAGE, "learning_rate": -1}]}, "stage 0: learning_rate is -1; expected 0 or more"),
    "a rate that is no number": ({"stages": [{**STAGE, "learning_rate": float("nan")}]}, "learning_rate is nan; expected 0 or more"),
    "a beta above 1": ({"betas": [0.9, 1.5]}, r"betas are \[0.9, 1.5\]; expected numbers from 0 to below 1"),
    "an unknown scaling": ({"learning_rate_scaling": "linear"}, "learning_rate_scaling is 'linear'; expected one of none, sqrt"),
    "an unknown tracker": ({"trackers": ["comet"]}, "trackers has 'comet'; expected some of tensorboard, wandb, trackio"),
    "samples without prompts": ({"samples": {"prompts": []}}, "samples: expected at least one prompt"),
    "samples of no steps": ({"samples": {"prompts": ["x"], "steps": 0}}, "samples: steps is 0; expected 1 or more"),
    "an unknown field of samples": ({"samples": {"prompts": ["x"], "cfg": 3}}, "samples: unknown field.*cfg"),
    "a look at nothing": ({"validation_every": 0}, "validation_every is 0; expected 1 or more"),
    "unknown mask": ({"dropped_mask": "both"}, "dropped_mask is 'both'; expected one of empty, caption"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_are_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(write(tmp_path, **recipe_values(tmp_path, **changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [("{", "Can't read the training recipe"), ("[1]", "holds a list"), ('{"extends": 3}', "extends is 3"), ('{"extends": "r.json"}', "break the circle"),
     ('{"extends": "gone.json"}', "gone.json"), ("{}", "no stages")],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.json")


@pytest.mark.parametrize("change, message", [("seed", "expected field=value"), ("=3", "expected field=value"), ("stages.7.steps=3", "a number from 0 to 0"),
                                              ("seed.x=3", "seed is .*; expected a whole number")])  # fmt: skip
def test_bad_changes_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, **recipe_values(tmp_path)), [change])


def test_parts_are_found_by_their_files() -> None:
    for kind in KINDS:
        assert part_names(kind)
    assert choose("objective", "denoise", "x").settings.timesteps == "uniform"


def test_the_demos_recipe_compresses_its_last_half_and_keeps_the_demos_weights() -> None:
    recipe = load_recipe(ROOT / "configs/train/demo-kv.json")
    assert recipe.method.settings.blocks == ((4, 2), (5, 2), (6, 2), (7, 2))
    assert recipe.output != recipe.initialize and (ROOT / recipe.initialize).is_file()


def test_the_control_of_that_recipe_differs_in_the_compression_alone() -> None:
    compressed, control = (load_recipe(ROOT / f"configs/train/{name}.json").to_dict() for name in ("demo-kv", "demo-kv-control"))
    differing = {name for name in control if control[name] != compressed[name]}
    assert differing == {"method", "output", "run_dir"} and control["method"]["name"] == "full"
