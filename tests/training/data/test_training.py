"""A run on pictures: stopped, it goes on to the bit; a picture that has gone since is named."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo import WEIGHTS
from pixart.cli import main
from pixart.errors import ConfigError
from pixart.training.run import train
from tests.support.data_sets import folder

SIZES = [(64, 64), (96, 64), (64, 96), (64, 64)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder(tmp_path / "data", SIZES)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({
        "variant": "demo", "method": "full", "objective": "denoise", "source": {"name": "pictures", "validation": 0.25},
        "precision": "fp32", "warmup_steps": 0, "caption_dropout": 0.3, "validation_every": 3, "save_every": 100, "log_every": 1,
        "stages": [{"base_size": 64, "steps": 3, "batch_size": 2, "learning_rate": 1e-3}],
    }))  # fmt: skip
    return path


def given(tmp_path: Path, name: str) -> list[str]:
    places = {
        "data": tmp_path / "data", "text-encoder": WEIGHTS["text_encoders"], "vae": WEIGHTS["vae"], "transformer": WEIGHTS["diffusion_models"],
        "cache": tmp_path / "cache", "output": tmp_path / f"{name}.safetensors",
    }  # fmt: skip
    return [part for flag, place in places.items() for part in (f"--{flag}", str(place))]


def test_a_run_on_pictures_goes_on_to_the_bit(tmp_path, recipe, capsys):
    assert main(["train", str(recipe), *given(tmp_path, "whole")]) == 0
    losses = [json.loads(line) for line in (tmp_path / "whole-run/log.jsonl").read_text().splitlines()]
    assert any("validation" in key for row in losses for key in row)
    for _ in range(3):
        assert main(["train", str(recipe), *given(tmp_path, "parts"), "--stop-after", "0"]) == 0
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert main(["train", str(recipe), *given(tmp_path, "new"), "--dry-run"]) == 0
    assert "0 captions by T5, 0 pictures by the VAE" in capsys.readouterr().out


def test_a_picture_that_has_gone_since_is_named(tmp_path, recipe):
    changes = [f"source.{name}={json.dumps(str(place))}" for name, place in (
        ("data", tmp_path / "data"), ("text_encoder", WEIGHTS["text_encoders"]), ("vae", WEIGHTS["vae"]), ("cache", tmp_path / "cache"),
    )]  # fmt: skip
    changes += [f"initialize={WEIGHTS['diffusion_models']}", f"output={tmp_path / 'out.safetensors'}"]
    train(recipe, changes, stop_after=0)
    (tmp_path / "data/p1.png").unlink()
    (tmp_path / "data/p2.txt").write_text("another text")
    with pytest.raises(ConfigError, match="gone p1.png; changed p2.png.*--accept-changes"):
        train(recipe, changes, stop_after=0)
    train(recipe, changes, accept_changes=True, stop_after=0)


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_new_picture_is_told_before_its_features_are_computed(tmp_path, recipe, capsys, dry):
    assert main(["train", str(recipe), *given(tmp_path, "made"), "--stop-after", "0"]) == 0
    before = sorted((tmp_path / "cache").rglob("*.safetensors"))
    (tmp_path / "data/p9.png").write_bytes((tmp_path / "data/p0.png").read_bytes()[:-1] + b"x")
    (tmp_path / "data/p9.txt").write_text("another text")
    assert main(["train", str(recipe), *given(tmp_path, "made"), *dry]) == 2
    assert "new p9.png" in capsys.readouterr().err
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == before
    if dry:
        assert main(["train", str(recipe), *given(tmp_path, "made"), *dry, "--accept-changes"]) == 0
        assert "goes on from step 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(("flag", "wrong", "message"), [
    ("transformer", "vae", "this is a VAE; expected a PixArt transformer"),
    ("vae", "text_encoders", "is not a VAE"),
    ("text-encoder", "vae", "is not a T5"),
])  # fmt: skip
def test_weights_of_another_kind_are_told_before_anything_is_computed(tmp_path, recipe, capsys, dry, flag, wrong, message):
    places = given(tmp_path, "made")
    places[places.index(f"--{flag}") + 1] = str(WEIGHTS[wrong])
    assert main(["train", str(recipe), *places, *dry]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_run_tells_what_may_not_be_meant_once(tmp_path, recipe, caplog):
    folder(tmp_path / "data/2023_rome", [(64, 64)], caption=None)
    folder(tmp_path / "data", SIZES)
    (tmp_path / "data/p0.txt").unlink()
    (tmp_path / "data/p9.bmp").touch()
    assert main(["train", str(recipe), *given(tmp_path, "made"), "--stop-after", "0"]) == 0
    text = caplog.text
    assert text.count("left out: 1 of other formats") == text.count("without caption: 1, which are trained as the empty prompt: p0.png") == 1
    assert text.count("repeats: 1 pictures count up to 2023 times") == 1 and "2023_rome/p0.png" in text


@pytest.mark.parametrize("command", ["train", "extract"])
def test_a_dry_run_with_too_many_broken_pictures_fails_in_the_end(tmp_path, recipe, capsys, command):
    (tmp_path / "data/bad.png").write_bytes(b"no")
    places = given(tmp_path, "made")
    if command == "extract":
        where = places.index("--transformer")
        del places[where : where + 2]
    assert main([command, str(recipe), *places, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "This is more than one in a hundred, and an error." in said.out and "captions by T5" in said.out
    assert "bad.png" in said.err and "source.allow_broken" in said.err


@pytest.mark.parametrize("seconds", ["nan", "-5", "soon"])
def test_times_to_stop_after_that_can_not_be(tmp_path, recipe, capsys, seconds):
    with pytest.raises(SystemExit):
        main(["train", str(recipe), *given(tmp_path, "made"), f"--stop-after={seconds}"])
    assert "expected seconds, 0 or more" in capsys.readouterr().err
