"""Small data sets, with the demo's T5 and VAE as encoders."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo import WEIGHTS
from pixart.training.recipe import Recipe, make_recipe
from pixart.training.sources.pictures import Part


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of the demo model on pictures in tmp_path/data, at 64 px unless `stages` says otherwise."""

    def made(stages: list[dict[str, Any]] | None = None, variant: str = "demo", **source: Any) -> Recipe:
        given = {
            "data": str(tmp_path / "data"), "text_encoder": str(WEIGHTS["text_encoders"]), "vae": str(WEIGHTS["vae"]),
            "cache": str(tmp_path / "cache"), **source,
        }  # fmt: skip
        values = {
            "variant": variant, "method": "full", "objective": "denoise", "source": {"name": "pictures", **given},
            "output": str(tmp_path / "out.safetensors"), "run_dir": str(tmp_path / "run"),
            "stages": stages or [{"base_size": 64, "steps": 10, "batch_size": 4, "learning_rate": 1e-3}],
        }  # fmt: skip
        return make_recipe(values, "test")

    return made


@pytest.fixture
def source_of(recipe_of: Callable[..., Recipe]) -> Callable[..., Part]:
    """The source of such a recipe; nothing is computed yet."""

    def made(**changes: Any) -> Part:
        recipe = recipe_of(**changes)
        return recipe.source.make(recipe)

    return made
