"""The decoder, trained on: on latents as sampling leaves them, with wobbling edges, and the clean picture as the target.

Scenes are noised to a timestep of 250 to 650 and drawn again from there in five steps by the transformer itself, with and
without guidance. What comes out has the scene's place and size, and the transformer's own faults. The decoder learns to draw
the outline that was meant. `python -m demo.training.cleaning` goes on where it was stopped; the transformer stays as it is.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixart import load_text_encoder
from pixart.checkpoints import load_transformer
from pixart.config import get_variant
from pixart.model import PixArtTransformer
from pixart.training.buckets import bucket_sizes, draw_size
from pixart.training.diffusion import NoiseSchedule

from .. import WEIGHTS
from ..data.captions import caption
from ..data.layout import arrange
from ..data.scenes import render, sample_scene
from .autoencoder import descend, encode, load_decoder, save_autoencoder, save_state

TIMESTEPS, STEPS = (250, 650), 5  # from where scenes are drawn again, and how often the transformer looks
GUIDANCE = (1.0, 4.5)
CLEAN_SHARE = 0.2  # of batches that are only encoded, so that pictures as they are stay exact
SQUARE_SHARE = 0.4
SAVE_EVERY = 50
WARMUP = 50


class Redrawn:
    """Batches of latents (B, 4, H/8, W/8) that the transformer drew again, and the pictures (B, 3, H, W) that were meant."""

    def __init__(self, transformer: Path, batch: int) -> None:
        self.model: PixArtTransformer = load_transformer(transformer, dtype=torch.bfloat16).eval().requires_grad_(False)
        self.encoder = load_text_encoder(WEIGHTS["text_encoders"])
        self.schedule = NoiseSchedule()
        self.sizes = bucket_sizes(get_variant("demo").base_size, get_variant("demo").base_size)
        self.batch = batch

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One batch, of one size."""
        height, width = draw_size(self.sizes, rng, SQUARE_SHARE)
        scenes = [sample_scene(rng) for _ in range(self.batch)]
        prompts = [caption(scene, rng).text for scene in scenes]
        pictures = np.stack([render(arrange(scene, width, height), width, height) for scene in scenes])
        clean = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        latents = encode(clean)
        if rng.random() >= CLEAN_SHARE:
            latents = self._redraw(latents, prompts, rng)
        return latents, clean

    @torch.no_grad()
    def _redraw(self, latents: Tensor, prompts: list[str], rng: np.random.Generator) -> Tensor:
        """Noised, then DDIM (Song 2020, eta 0) back to nothing."""
        guidance = GUIDANCE[int(rng.integers(len(GUIDANCE)))]
        text = self.encoder.encode(prompts + [""] * len(prompts) * (guidance != 1))
        context, mask = text.states.to(torch.bfloat16), text.mask
        first = int(rng.integers(*TIMESTEPS))
        timesteps = [round(float(t)) for t in np.linspace(first, 0, STEPS + 1)[:-1]]
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        x = self.schedule.add_noise(latents, noise, torch.tensor([first]))
        for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            found = self._noise(x, now, context, mask, guidance)
            clean = self.schedule.predicted_latent(x, found, torch.tensor([now]))
            x = clean if after is None else self.schedule.add_noise(clean, found, torch.tensor([after]))
        return x

    def _noise(self, x: Tensor, timestep: int, context: Tensor, mask: Tensor, guidance: float) -> Tensor:
        """The prediction, guided where captions come with empty ones behind them."""
        rows = len(context)
        given = x.repeat(rows // len(x), 1, 1, 1).to(torch.bfloat16)
        predicted = self.model(given, torch.full((rows,), timestep), context, mask)[:, : x.shape[1]].float()
        if rows == len(x):
            return predicted
        with_text, without = predicted.chunk(2)
        return without + guidance * (with_text - without)


def train(source: Redrawn, steps: int, out: Path, state: Path, learning_rate: float, seed: int = 0) -> None:
    """To `steps` in all, on from `state` if it exists; writes `out` with an average of the weights."""
    decoder = load_decoder().train().requires_grad_(True).to(memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in decoder.state_dict().items()}
    optimizer = torch.optim.Adam(decoder.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        first, average = saved["step"], saved["average"]
    losses: list[float] = []
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARMUP, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
        losses.append(descend(decoder, optimizer, *source.draw(np.random.default_rng((seed, step)))))
        for name, value in decoder.state_dict().items():
            average[name].lerp_(value, 0.01)
        bar.set_postfix(loss=round(float(np.mean(losses[-SAVE_EVERY:])), 5))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(state, {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step + 1})
            _save_average(average, out)


def _save_average(average: dict[str, Tensor], out: Path) -> None:
    decoder = load_decoder()
    decoder.load_state_dict(average)
    save_autoencoder(decoder, out)


def main(arguments: list[str] | None = None) -> None:
    """Command line: train the decoder on, on what the transformer draws."""
    parser = argparse.ArgumentParser(prog="python -m demo.training.cleaning", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--transformer", type=Path, default=WEIGHTS["diffusion_models"])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-cleaning/pixart-demo-vae.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("runs/demo-cleaning/state.pt"), help="checkpoint to resume from")
    chosen = parser.parse_args(arguments)
    train(Redrawn(chosen.transformer, chosen.batch), chosen.steps, chosen.out, chosen.state, chosen.learning_rate)


if __name__ == "__main__":
    main()
