"""Runs of a few steps on a tiny model."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pixart.checkpoints import load_transformer
from pixart.training import initialize
from pixart.training.methods import full
from pixart.training.sources import scenes
from tests.support.tiny_methods import use_variant, write_base
from tests.support.tiny_training import VARIANT, TwoPictures, recipe_values


@pytest.fixture
def recipe_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a recipe of the tiny model and returns its path; `initialize` takes any file."""
    monkeypatch.setattr(full, "get_variant", lambda name: VARIANT)
    monkeypatch.setattr(scenes, "Part", TwoPictures)
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))

    def write(steps: int = 6, **changes: object) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(recipe_values(tmp_path, steps, **changes)))
        return path

    return write


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's weights in a file."""
    use_variant(monkeypatch)
    return write_base(tmp_path / "base")
