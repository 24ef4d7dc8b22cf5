"""The decoder's further training: its windows, what it is shown, and going on where it stopped."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.data.scenes import SceneObject
from demo.training import cleaning
from demo.training.autoencoder import encode, load_decoder, reconstruction_loss
from demo.training.redrawn import Redrawn, arranged_scenes
from pixart.errors import InputError


class Given:
    """Batches by chance, in place of scenes."""

    def draw(self, number: int) -> cleaning.Batch:
        return batch_of(torch.from_numpy(np.random.default_rng(number).random((2, 3, 32, 32), np.float32)), [(16.0, 16.0)] * 2)


def batch_of(pictures: Tensor, centers: list[tuple[float, float]]) -> cleaning.Batch:
    """Pictures that are only encoded, every pixel of the same weight."""
    return cleaning.Batch(encode(pictures), pictures, torch.ones_like(pictures[:, 0]), centers)


def shown(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> cleaning.Batch:
    """One batch of a kind."""
    monkeypatch.setattr(cleaning, "TEXTURE_SHARE", float(kind == "textures"))
    monkeypatch.setattr(cleaning, "CLEAN_SHARE", float(kind == "clean"))
    return cleaning.Batches(Redrawn(folder, 1)).draw(number)


@pytest.mark.parametrize("center", [(0.0, 0.0), (130.0, 100.0), (256.0, 256.0)])
def test_a_windows_loss_is_that_of_the_whole_picture_there(center: tuple[float, float]) -> None:
    """At the picture's border and inside; the rim that lacks its surroundings doesn't count."""
    _, pictures = arranged_scenes(np.random.default_rng(3), 1, 256, 256)
    decoder = load_decoder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded = decoder(encode(pictures)).float()
    rows, columns = {(0.0, 0.0): (slice(0, 96),) * 2, (130.0, 100.0): (slice(88, 168), slice(60, 140))}.get(center, (slice(160, 256),) * 2)
    error = decoded[..., rows, columns] - pictures[..., rows, columns]
    wanted = error.abs().mean() + 0.5 * (error.diff(dim=-1).abs().sum() + error.diff(dim=-2).abs().sum()) / error.numel()
    with torch.no_grad():
        found = cleaning.window_loss(decoder, batch_of(pictures, [center]))
    assert found == pytest.approx(float(wanted), rel=0.05)


def test_corners_weigh_more() -> None:
    scenes, pictures = arranged_scenes(np.random.default_rng(3), 1, 128, 256)
    tip = SceneObject("red", "diamond", "small", 0.5, 0.5, 0.25)  # tips 35 pixels from the middle
    weights = cleaning._corner_weights(replace(scenes[0], objects=(tip,)), 128, 256)
    assert weights.shape == (128, 256) and set(weights.unique().tolist()) == {1.0, cleaning.CORNER_WEIGHT}
    assert all(weights[y, x] > 1 for y, x in ((64, 163), (64, 93), (29, 128), (99, 128))) and weights[64, 128] == 1
    assert float((weights > 1).sum()) == 4 * 14 * 14
    batch = batch_of(pictures, [(64.0, 128.0)])
    heavier = batch._replace(weights=weights[None])
    with torch.no_grad():
        assert cleaning.window_loss(load_decoder(), heavier) != cleaning.window_loss(load_decoder(), batch)


def test_narrow_pictures_are_narrower_than_a_window() -> None:
    _, pictures = arranged_scenes(np.random.default_rng(3), 2, 512, 96)
    with torch.no_grad():
        assert 0 < cleaning.window_loss(load_decoder(), batch_of(pictures, [(0.0, 0.0), (500.0, 48.0)])) < 0.1


def test_clean_scenes_are_nearly_what_was_encoded_and_windows_lie_on_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, pictures, _, centers = shown(tmp_path, "clean", monkeypatch)
    assert 0 < (latents - encode(pictures)).abs().max() < 0.6
    for picture, (y, x) in zip(pictures, centers, strict=True):
        near = picture[:, max(0, int(y) - 24) : int(y) + 24, max(0, int(x) - 24) : int(x) + 24]
        assert near.flatten(1).std(1).max() > 0.05  # an outline: more than one colour


def test_textures_are_only_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, pictures, *_ = shown(tmp_path, "textures", monkeypatch)
    assert torch.equal(latents, encode(pictures)) or torch.equal(latents, encode(pictures.flip(-1)).flip(-1))


def test_half_of_the_batches_are_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored = []
    monkeypatch.setattr(cleaning, "_on_outline", lambda *_: (10.0, 3.0))
    for number in range(12):
        _, pictures, _, centers = shown(tmp_path, "clean", monkeypatch, number)
        mirrored.append(centers[0] != (10.0, 3.0))
        assert centers[0] == ((10.0, pictures.shape[3] - 3.0) if mirrored[-1] else (10.0, 3.0))
    assert 2 < sum(mirrored) < 10
    batch = batch_of(torch.rand(1, 3, 16, 16), [(8.0, 3.0)])._replace(weights=torch.rand(1, 16, 16))
    flipped = batch.mirrored()
    assert all(torch.equal(after, before.flip(-1)) for after, before in zip(flipped[:3], batch[:3], strict=True))


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
    done = tmp_path / "whole.safetensors"
    done.unlink()
    cleaning.train(Given(), 4, done, tmp_path / "whole.pt", 1e-3)  # finished before: only written again
    assert all(torch.equal(value, whole[key]) for key, value in load_file(done).items())
    before, after = load_decoder().state_dict(), load_decoder(tmp_path / "whole.safetensors").state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_state_that_learnt_from_other_latents_or_for_other_steps_is_refused(tmp_path: Path) -> None:
    out, state = tmp_path / "vae.safetensors", tmp_path / "state.pt"
    cleaning.train(Given(), 1, out, state, 1e-3, "these")
    for steps, mark in ((1, "others"), (2, "these")):
        with pytest.raises(InputError, match="is of other latents, or of another number of steps; remove it"):
            cleaning.train(Given(), steps, out, state, 1e-3, mark)


def test_what_two_neighbours_differ_by_weighs_as_the_lesser() -> None:
    """Else a border of weights would itself be an edge: this error is flat."""
    pictures = torch.rand(1, 3, 8, 8)
    weights = torch.ones(1, 1, 8, 8)
    weights[..., 2:5] = 5
    assert reconstruction_loss(pictures + 0.1, pictures, weights) == pytest.approx(0.1, rel=1e-4)
    assert reconstruction_loss(pictures + 0.1, pictures) == pytest.approx(0.1, rel=1e-4)


def stopping(source: Given, after: int):
    """Its `draw`, which Ctrl-C ends after so many batches."""
    drawn: list[int] = []

    def draw(number: int) -> cleaning.Batch:
        if len(drawn) == after:
            raise KeyboardInterrupt
        drawn.append(1)
        return Given.draw(source, number)

    return draw
