"""What the decoder is trained on: scenes that the transformer draws again, kept in files."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import WEIGHTS
from demo.training import redrawn
from demo.training.autoencoder import encode

pytest.importorskip("transformers")
TRANSFORMER = WEIGHTS["diffusion_models"]


@pytest.fixture(autouse=True)
def two_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redrawn, "BATCH", 2)
    monkeypatch.setattr(redrawn, "batch_size", lambda *_: (128, 256))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_what_is_drawn_again_has_its_place_and_the_transformers_own_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    monkeypatch.setattr(redrawn, "GUIDANCE", (guidance,))
    batches = redrawn.Redrawn(tmp_path, 1, seed=1)
    batches.draw(TRANSFORMER)
    scenes, pictures, latents = batches.load(0)
    assert len(scenes) == 2 and latents.shape == (2, 4, 16, 32) and pictures.shape == (2, 3, 128, 256)
    meant = encode(pictures)
    error = (latents - meant).square().mean().sqrt()
    other = (latents - meant.flip(0)).square().mean().sqrt()
    assert 0.001 < error < 0.5 * other


def test_what_is_missing_is_drawn_as_it_would_have_been(tmp_path: Path) -> None:
    batches = redrawn.Redrawn(tmp_path, 2)
    batches.draw(TRANSFORMER)
    wanted = [batches.load(number)[2] for number in range(2)]
    assert not torch.equal(wanted[0], wanted[1])
    kept, lost = sorted(tmp_path.iterdir())
    written = kept.stat().st_mtime_ns
    for spoil in (lost.unlink, lambda: lost.write_bytes(lost.read_bytes()[:100])):
        spoil()
        batches.draw(TRANSFORMER)
        assert kept.stat().st_mtime_ns == written
        assert all(torch.equal(batches.load(number)[2], wanted[number]) for number in range(2))
    fewer = redrawn.Redrawn(tmp_path, 1)
    fewer.draw(TRANSFORMER)
    assert len(fewer) == 1  # what lies there beyond is not looked at


def test_what_another_transformer_drew_or_for_other_scenes_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, drawn = redrawn.Redrawn(tmp_path, 1), []
    redraw = redrawn.Painter.redraw
    monkeypatch.setattr(redrawn.Painter, "redraw", lambda *given: (drawn.append(1), redraw(*given))[1])
    batches.draw(TRANSFORMER)
    batches.draw(TRANSFORMER)
    assert len(drawn) == 1
    other = tmp_path / "other.safetensors"
    shutil.copy(TRANSFORMER, other)
    with other.open("r+b") as file:  # one weight
        file.seek(-2, 2)
        last = file.read()
        file.seek(-2, 2)
        file.write(bytes([last[0] ^ 1, last[1]]))
    marks = [batches.mark(TRANSFORMER), batches.mark(other), redrawn.Redrawn(tmp_path, 2).mark(TRANSFORMER)]
    batches.draw(other)
    assert len(drawn) == 2
    monkeypatch.setattr(redrawn, "batch_size", lambda *_: (256, 128))
    batches.draw(other)
    assert len(drawn) == 3
    redrawn.Redrawn(tmp_path, 1, seed=9).draw(other)
    assert len(drawn) == 4
    assert len({*marks, batches.mark(TRANSFORMER)}) == 4


def test_every_size_is_drawn_and_the_square_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    sizes = [redrawn.batch_size(rng) for _ in range(2000)]
    assert {(128, 512), (512, 128), (176, 352), (256, 256)} <= set(sizes)
    assert 0.3 < sizes.count((256, 256)) / 2000 < 0.4 and sizes.count((128, 512)) > 15
