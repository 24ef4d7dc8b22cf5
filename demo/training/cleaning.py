"""The decoder, trained on: it learns to draw the outline that was meant, in every size, from latents as sampling leaves them.

`python -m demo.training.cleaning` draws the latents (redrawn.py), then trains; it goes on where it was stopped. The
transformer stays as it is. The loss is taken in a window of each picture, around an object's outline, and weighs more at
corners: they are small, and a shape is known by them. The decoder's first layers see the whole latent, its later and
costlier ones the window alone, at a quarter of the work.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, autocast, nn
from tqdm import tqdm

from pixart.errors import InputError

from .. import WEIGHTS
from ..data.scenes import CORNERS, Scene
from .autoencoder import descend, encode, load_decoder, reconstruction_loss, sample_crops, save_autoencoder, save_state
from .redrawn import BATCH, Redrawn, arranged_scenes, batch_size

CLEAN_SHARE, TEXTURE_SHARE = 0.3, 0.08  # of batches: scenes that were encoded, with a little noise; crops of free scenes and textures
SPLIT, CELL = 11, 4  # layers before the window is cut, and pixels that one of their cells stands for
WINDOW, RIM = 28, 4  # cells of a window, and of its rim that is not looked at: zeros stand outside it
CORNER_PIXELS, CORNER_WEIGHT = 7, 5.0  # half the side of a square around each corner, and its weight; elsewhere it is 1
SAVE_EVERY = 100
WARMUP = 100
MEMORY = 0.005  # share of each step in the average that is written


class Batch(NamedTuple):
    """Latents (B, 4, H/8, W/8), the pictures (B, 3, H, W) meant, weights (B, H, W) of their pixels, and the windows' centres (y, x)."""

    latents: Tensor
    pictures: Tensor
    weights: Tensor
    centers: list[tuple[float, float]]

    def mirrored(self) -> Batch:
        """Left and right exchanged."""
        width = self.pictures.shape[3]
        flipped = [given.flip(-1) for given in self[:3]]
        return Batch(*flipped, [(y, width - x) for y, x in self.centers])


class Batches:
    """One for each step, by its number."""

    def __init__(self, redrawn: Redrawn, seed: int = 0) -> None:
        self.redrawn, self.seed = redrawn, seed

    def draw(self, number: int) -> Batch:
        """Crops, clean scenes or redrawn ones, mirrored half the time."""
        rng = np.random.default_rng((self.seed, number))
        kind = rng.random()
        if kind < TEXTURE_SHARE:
            pictures = sample_crops(rng, BATCH, CELL * WINDOW)
            weights, middle = torch.ones_like(pictures[:, 0]), CELL * WINDOW / 2
            batch = Batch(encode(pictures), pictures, weights, [(middle, middle)] * BATCH)
        else:
            if kind < TEXTURE_SHARE + CLEAN_SHARE:
                scenes, pictures = arranged_scenes(rng, BATCH, *batch_size(rng))
                latents = _disturbed(encode(pictures), rng)
            else:
                scenes, pictures, latents = self.redrawn.load(int(rng.integers(len(self.redrawn))))
            size = pictures.shape[2], pictures.shape[3]
            weights = torch.stack([_corner_weights(scene, *size) for scene in scenes])
            batch = Batch(latents, pictures, weights, [_on_outline(scene, *size, rng) for scene in scenes])
        return batch if rng.random() < 0.5 else batch.mirrored()


def _corner_weights(scene: Scene, height: int, width: int) -> Tensor:
    weights = torch.ones(height, width)
    for obj in scene.objects:
        radius = obj.radius * min(width, height)
        for x, y in CORNERS[obj.shape]:
            row, column = round(obj.center_y * height + y * radius), round(obj.center_x * width + x * radius)
            rows = slice(max(0, row - CORNER_PIXELS), max(0, row + CORNER_PIXELS))
            weights[rows, max(0, column - CORNER_PIXELS) : max(0, column + CORNER_PIXELS)] = CORNER_WEIGHT
    return weights


def _disturbed(latents: Tensor, rng: np.random.Generator) -> Tensor:
    strength = torch.from_numpy(rng.uniform(0, 0.1, (len(latents), 1, 1, 1)).astype(np.float32))
    return latents + strength * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))


def _on_outline(scene: Scene, height: int, width: int, rng: np.random.Generator) -> tuple[float, float]:
    """A point (y, x) about as far from an object's centre as its outline."""
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    angle, reach = rng.uniform(0, 2 * np.pi), obj.radius * min(width, height)
    return obj.center_y * height + np.sin(angle) * reach, obj.center_x * width + np.cos(angle) * reach


def window_loss(decoder: nn.Sequential, batch: Batch) -> Tensor:
    """As in the decoder's first training, but weighted, and in the windows alone."""
    with autocast("cpu", torch.bfloat16):
        hidden = decoder[:SPLIT](batch.latents.to(memory_format=torch.channels_last))
        cut = [_window(*hidden.shape[2:], y, x) for y, x in batch.centers]
        inside = torch.stack([cells[:, rows, columns] for cells, (rows, columns, _) in zip(hidden, cut, strict=True)])
        decoded = decoder[SPLIT:](inside.contiguous(memory_format=torch.channels_last))
    targets, weights = (
        torch.stack([whole[..., _pixels(rows), _pixels(columns)] for whole, (rows, columns, _) in zip(given, cut, strict=True)])
        for given in (batch.pictures, batch.weights)
    )
    looked_at = torch.stack([mask for _, _, mask in cut]).repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    return reconstruction_loss(decoded.float(), targets, (weights * looked_at)[:, None])


def _window(height: int, width: int, y: float, x: float) -> tuple[slice, slice, Tensor]:
    """Rows and columns of the window nearest to a point in pixels, and a mask without its rim, but for the picture's own border."""
    rows, columns = _along(height, y), _along(width, x)
    mask = torch.zeros(rows.stop - rows.start, columns.stop - columns.start)
    mask[_looked_at(rows, height), _looked_at(columns, width)] = 1
    return rows, columns, mask


def _along(length: int, at: float) -> slice:
    size = min(WINDOW, length)
    start = int(np.clip(round(at / CELL) - size // 2, 0, length - size))
    return slice(start, start + size)


def _looked_at(cut: slice, length: int) -> slice:
    size = cut.stop - cut.start
    return slice(RIM if cut.start else 0, size if cut.stop == length else size - RIM)


def _pixels(cells: slice) -> slice:
    return slice(CELL * cells.start, CELL * cells.stop)


def train(batches: Batches, steps: int, out: Path, state: Path, learning_rate: float, mark: str = "") -> None:
    """To `steps` in all, on from `state` if it exists; writes `out` with an average of the weights.

    mark: of what the batches depend on; InputError where `state` learnt from others.
    """
    decoder = load_decoder().train().requires_grad_(True).to(memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in decoder.state_dict().items()}
    optimizer = torch.optim.Adam(decoder.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    first = 0
    if (saved := read_state(state, steps, mark)) is not None:
        decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        first, average = saved["step"], saved["average"]
    losses: list[float] = []
    of_run = {"mark": mark, "steps": steps}
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARMUP, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
        losses.append(descend(decoder, optimizer, window_loss(decoder, batches.draw(step))))
        for name, value in decoder.state_dict().items():
            average[name].lerp_(value, max(MEMORY, 1 / (step + 1)))
        bar.set_postfix(loss=round(float(np.mean(losses[-SAVE_EVERY:])), 5))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            weights = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            save_state(state, {**weights, "step": step + 1, **of_run})
            _save_average(average, out)
    if not out.exists():
        _save_average(average, out)


def read_state(state: Path, steps: int, mark: str) -> dict[str, Any] | None:
    """Where a run stopped, if it did; InputError if it was another."""
    if not state.exists():
        return None
    saved = torch.load(state, weights_only=True)
    if (saved.get("mark"), saved.get("steps")) != (mark, steps):
        raise InputError(f"{state} is of other latents, or of another number of steps; remove it, or choose another --run-dir.")
    return saved


def _save_average(average: dict[str, Tensor], out: Path) -> None:
    decoder = load_decoder()
    decoder.load_state_dict(average)
    save_autoencoder(decoder, out)


def main(arguments: list[str] | None = None) -> None:
    """Command line: train the decoder on, on what the transformer draws."""
    parser = argparse.ArgumentParser(prog="python -m demo.training.cleaning", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--redrawn", type=int, default=700, help=f"batches of {BATCH} latents to draw before training")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--transformer", type=Path, default=WEIGHTS["diffusion_models"])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-cleaning"), help="where latents, the state and the result lie")
    chosen = parser.parse_args(arguments)
    if chosen.redrawn < 1:
        parser.error(f"--redrawn is {chosen.redrawn}; expected 1 or more")
    redrawn = Redrawn(chosen.run_dir / "redrawn", chosen.redrawn)
    out, state, mark = chosen.run_dir / "pixart-demo-vae.safetensors", chosen.run_dir / "state.pt", redrawn.mark(chosen.transformer)
    read_state(state, chosen.steps, mark)  # tells what is wrong before hours of drawing
    redrawn.draw(chosen.transformer)
    train(Batches(redrawn), chosen.steps, out, state, chosen.learning_rate, mark)


if __name__ == "__main__":
    main()
