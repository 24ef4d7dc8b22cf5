"""The decoder's further training: its windows, what it is shown, and going on where it stopped."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.training import cleaning
from demo.training.autoencoder import encode, load_decoder
from demo.training.redrawn import Redrawn, arranged_scenes


class Given:
    """Latents, pictures and windows by chance, in place of scenes."""

    def draw(self, number: int) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
        pictures = torch.from_numpy(np.random.default_rng(number).random((2, 3, 32, 32), np.float32))
        return encode(pictures), pictures, [(16.0, 16.0)] * 2


def shown(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, number: int = 0):
    """One batch of a kind."""
    monkeypatch.setattr(cleaning, "TEXTURE_SHARE", float(kind == "textures"))
    monkeypatch.setattr(cleaning, "CLEAN_SHARE", float(kind == "clean"))
    return cleaning.Batches(Redrawn(folder)).draw(number)


@pytest.mark.parametrize("center", [(0.0, 0.0), (130.0, 100.0), (256.0, 256.0)])
def test_a_windows_loss_is_that_of_the_whole_picture_there(center: tuple[float, float]) -> None:
    """At the picture's border and inside; the rim that lacks its surroundings doesn't count."""
    _, pictures = arranged_scenes(np.random.default_rng(3), 1, 256, 256)
    decoder, latents = load_decoder(), encode(pictures)
    with torch.no_grad():
        found = cleaning.window_loss(decoder, latents, pictures, [center])
        with torch.autocast("cpu", torch.bfloat16):
            error = (decoder(latents).float() - pictures).abs()
    rows, columns, mask = cleaning._window(64, 64, *center)
    assert mask.shape == (28, 28) and mask.sum() == (20 * 20 if center == (130.0, 100.0) else 24 * 24)
    inside = error[:, :, cleaning._pixels(rows), cleaning._pixels(columns)] * mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    wanted = inside.sum() / (mask.sum() * 16 * 3)
    edges = cleaning.window_loss(decoder, latents, pictures, [center]) - wanted
    assert wanted < found and 0 < edges < 3 * wanted
    assert wanted == pytest.approx(plain_loss(decoder, latents, pictures, center), rel=0.03)


def plain_loss(decoder: torch.nn.Sequential, latents: Tensor, pictures: Tensor, center: tuple[float, float]) -> float:
    """L1 of colours alone, from the windowed decoding."""
    seen: list[Tensor] = []
    hook = decoder[-1].register_forward_hook(lambda *given: seen.append(given[2].float()))
    with torch.no_grad():
        cleaning.window_loss(decoder, latents, pictures, [center])
    hook.remove()
    rows, columns, mask = cleaning._window(64, 64, *center)
    target = pictures[:, :, cleaning._pixels(rows), cleaning._pixels(columns)]
    return float(((seen[0] - target).abs() * mask.repeat_interleave(4, 0).repeat_interleave(4, 1)).sum() / (mask.sum() * 16 * 3))


def test_narrow_pictures_are_narrower_than_a_window() -> None:
    _, pictures = arranged_scenes(np.random.default_rng(3), 2, 512, 96)
    with torch.no_grad():
        assert 0 < cleaning.window_loss(load_decoder(), encode(pictures), pictures, [(0.0, 0.0), (500.0, 48.0)]) < 0.1


def test_clean_scenes_are_nearly_what_was_encoded_and_windows_lie_on_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, pictures, centers = shown(tmp_path, "clean", monkeypatch)
    assert 0 < (latents - encode(pictures)).abs().max() < 0.6
    for picture, (y, x) in zip(pictures, centers, strict=True):
        near = picture[:, max(0, int(y) - 24) : int(y) + 24, max(0, int(x) - 24) : int(x) + 24]
        assert near.flatten(1).std(1).max() > 0.05  # an outline: more than one colour


def test_textures_are_only_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, pictures, _ = shown(tmp_path, "textures", monkeypatch)
    assert torch.equal(latents, encode(pictures)) or torch.equal(latents, encode(pictures.flip(-1)).flip(-1))


def test_half_of_the_batches_are_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored = []
    monkeypatch.setattr(cleaning, "_on_outline", lambda *_: (10.0, 3.0))
    for number in range(12):
        _, pictures, centers = shown(tmp_path, "clean", monkeypatch, number)
        mirrored.append(centers[0] != (10.0, 3.0))
        assert centers[0] == ((10.0, pictures.shape[3] - 3.0) if mirrored[-1] else (10.0, 3.0))
    assert 2 < sum(mirrored) < 10


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

    def draw(number: int) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
        if len(drawn) == after:
            raise KeyboardInterrupt
        drawn.append(1)
        return Given.draw(source, number)

    return draw
