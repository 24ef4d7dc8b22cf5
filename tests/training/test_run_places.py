"""Where a run reads and writes: nothing of others is lost, and what can't be written is told before anything is computed."""
from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from pixart.errors import ConfigError
from pixart.training.loop import Loop
from pixart.training.recipe import load_recipe
from pixart.training.run import dry_run, train
from pixart.training.run_places import locked
from tests.support.tiny_training import VARIANT, TwoPictures


def test_two_runs_in_one_folder(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path())
    with locked(Path(recipe.run_dir)), pytest.raises(ConfigError, match="Another run is using"):
        train(recipe_path())
    assert train(recipe_path()).is_file()


def test_files_of_others_stay(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine" / "samples").mkdir(parents=True)
    (tmp_path / "mine" / "samples" / "a.png").touch()
    with pytest.raises(ConfigError, match="holds samples, but no run of training"):
        train(recipe_path(run_dir=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "samples" / "a.png").is_file()


@pytest.mark.parametrize("output", ["model.pth", "model.png", "model", "file/model.safetensors", "folder.safetensors"])
def test_outputs_that_can_not_be(recipe_path: Callable[..., Path], tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    monkeypatch.setattr(Loop, "__init__", lambda *_: pytest.fail("it is told before anything is computed"))
    for run in (train, dry_run):
        with pytest.raises(ConfigError, match="--output is"):
            list(run(recipe_path(output=str(tmp_path / output))))


def test_what_is_read_is_never_written(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"weights")
    with pytest.raises(ConfigError, match="which the run reads as initialize"):
        train(recipe_path(initialize=str(base), output=str(base)), overwrite=True)
    assert base.read_bytes() == b"weights"


def test_a_run_dir_that_is_a_file(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run_dir is .* which is a file"):
        train(recipe_path(run_dir=str(tmp_path / "file")))


def test_weights_that_are_not_there_are_told_first(recipe_path: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="not here.safetensors, which is not there"):
        train(recipe_path(initialize="not here.safetensors"))


def test_settings_that_dont_fit_the_network_are_told_before_features_are_computed(
    recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TwoPictures, "prepare", lambda *_: pytest.fail("it is told before anything is computed"))
    with pytest.raises(ConfigError, match="compressed_blocks"):
        train(recipe_path(method={"name": "kv", "blocks": [[99, 2]]}, initialize=None))


def test_a_changed_recipe_is_told_before_features_are_computed(
    recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe_path())
    monkeypatch.setattr(importlib.import_module("pixart.training.dry_run"), "get_variant", lambda name: VARIANT)
    assert any("goes on from step 6 of 9" in line for line in dry_run(recipe_path(9), accept_changes=True))
    monkeypatch.setattr(Loop, "__init__", lambda *_: pytest.fail("it is told before anything is computed"))
    for run in (train, dry_run):
        with pytest.raises(ConfigError, match="trained with another recipe: seed"):
            list(run(recipe_path(seed=5)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "seed is -1"), ("seed", 2**70, "expected a whole number below 2"), ("epsilon", -1.0, "epsilon is -1.0"),
        ("epsilon", float("nan"), "epsilon is nan"), ("ema_decay", 1.0, "ema_decay is 1.0; expected 0 to below 1"),
        ("weight_decay", float("inf"), "weight_decay is inf; expected a finite number"), ("learning_rate", float("inf"), "is inf"),
        ("final_learning_rate", -0.1, "final_learning_rate is -0.1"), ("final_learning_rate", float("nan"), "final_learning_rate is nan"),
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_have(recipe_path: Callable[..., Path], field: str, value: float, message: str) -> None:
    path = recipe_path()
    values = json.loads(path.read_text())
    (values["stages"][0] if "learning" in field else values)[field] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)
