"""Photographs that ship with scikit-image and scikit-learn, from files to batches, by the command line."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import WEIGHTS
from pixart.cli import main
from pixart.training.data.picture import fitted, read_picture, to_tensor
from pixart.vae import load_vae
from tests.support.data_sets import batches, prepared, real_photographs


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return real_photographs(tmp_path / "data")


def test_photographs_go_from_files_to_batches(tmp_path, photographs, recipe_of, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({
        "variant": "demo", "method": "full", "objective": "denoise", "output": "o", "run_dir": str(tmp_path / "run"), "source": "pictures",
        "stages": [{"base_size": 64, "steps": 10, "batch_size": 4, "learning_rate": 1e-3}],
    }))  # fmt: skip
    places = ["--data", str(photographs), "--text-encoder", str(WEIGHTS["text_encoders"]), "--vae", str(WEIGHTS["vae"])]
    given = ["extract", str(recipe), *places, "--cache", str(tmp_path / "cache")]
    count = len(list(photographs.glob("*.txt")))
    assert count >= 6
    assert main([*given, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"data: folder of pictures, {count} pictures\n" in told and f"{count} captions by T5, {count} pictures by the VAE" in told
    assert not (tmp_path / "cache").exists()
    assert main(given) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache'}\n"

    made = recipe_of()
    source = made.source.make(made)
    assert source.album.missing_texts([""]) == [] and source.album.missing_pictures() == []
    prepared(source)
    plan, _ = source._plan(next(iter(source.album.bins)), 4)
    seen = batches(source, made, plan.batches)
    captions = {caption: (batch, row) for batch in seen for row, caption in enumerate(batch.captions)}
    assert len(captions) == count and sum(batch.total for batch in seen) == count
    vae = load_vae(WEIGHTS["vae"], 0.13025)
    for name in ("chelsea", "camera"):  # one in colour, one in grey
        batch, row = captions[f"a picture of {name}"]
        file = next(photographs.glob(f"{name}.png"))
        with Image.open(file) as original:
            assert batch.size[row].tolist() == [original.height, original.width]
        height, width = (side * 8 for side in batch.latent.shape[2:])
        pixels = to_tensor(fitted(read_picture(file.read_bytes()), height, width, 64))
        torch.testing.assert_close(batch.latent[row], vae.encode(pixels[None])[0], atol=3e-3, rtol=3e-3)
        shown = np.asarray(source.decode(batch.latent[row : row + 1])[0]).astype(float) / 255
        assert np.abs(shown - pixels.permute(1, 2, 0).numpy()).mean() < 0.12  # the demo's VAE is a small one


def test_what_has_nothing_to_extract_says_so(tmp_path, capsys):
    assert main(["extract", "configs/train/demo.json"]) == 2
    assert "The source 'scenes' computes no features" in capsys.readouterr().err
