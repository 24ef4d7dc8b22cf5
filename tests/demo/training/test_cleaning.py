"""The decoder's further training: what it is shown, and going on where it stopped."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo import WEIGHTS
from demo.training import cleaning
from demo.training.autoencoder import encode, load_decoder

pytest.importorskip("transformers")


class Given:
    """Latents and pictures by chance, in place of what the transformer draws."""

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pictures = torch.from_numpy(rng.random((2, 3, 32, 32), np.float32))
        return encode(pictures), pictures


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_what_is_drawn_again_has_its_place_and_the_transformers_own_faults(monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    monkeypatch.setattr(cleaning, "GUIDANCE", (guidance,))
    monkeypatch.setattr(cleaning, "CLEAN_SHARE", 0.0)
    monkeypatch.setattr(cleaning, "draw_size", lambda *_: (128, 256))
    source = cleaning.Redrawn(WEIGHTS["diffusion_models"], 2)
    latents, pictures = source.draw(np.random.default_rng(1))
    again, _ = source.draw(np.random.default_rng(1))
    assert torch.equal(latents, again) and latents.shape == (2, 4, 16, 32) and pictures.shape == (2, 3, 128, 256)
    meant = encode(pictures)
    error = (latents - meant).square().mean().sqrt()
    other = (latents - meant.flip(0)).square().mean().sqrt()
    assert 0.001 < error < 0.5 * other


def test_a_share_is_only_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "CLEAN_SHARE", 1.0)
    latents, pictures = cleaning.Redrawn(WEIGHTS["diffusion_models"], 1).draw(np.random.default_rng(1))
    assert torch.equal(latents, encode(pictures))


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "SAVE_EVERY", 2)
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:  # the rate depends on the steps in all, so that the whole is stopped, not shortened
            source = Given()
            if stop == 2:
                monkeypatch.setattr(source, "draw", stopping(source, 2))
            try:
                cleaning.train(source, 4, tmp_path / f"{name}.safetensors", tmp_path / f"{name}.pt", 1e-3)
            except KeyboardInterrupt:
                assert stop == 2
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    before, after = load_decoder().state_dict(), load_decoder(tmp_path / "whole.safetensors").state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def stopping(source: Given, after: int):
    """Its `draw`, which Ctrl-C ends after so many batches."""
    drawn: list[int] = []

    def draw(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if len(drawn) == after:
            raise KeyboardInterrupt
        drawn.append(1)
        return Given.draw(source, rng)

    return draw
