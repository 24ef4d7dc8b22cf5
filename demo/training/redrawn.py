"""Latents as sampling leaves them, with wobbling edges, beside the scenes that were meant: what the decoder is trained on.

Scenes are noised to a timestep of 250 to 650 and drawn again from there in five steps by the transformer itself, with and
without guidance. What comes out has the scene's place and size, and the transformer's own faults. Each batch is one file, so
drawing is done once and goes on where it was stopped. What another transformer drew, or from other scenes, is drawn anew.
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from pixart import load_text_encoder
from pixart.checkpoints import load_transformer
from pixart.config import get_variant
from pixart.model import PixArtTransformer
from pixart.training.base import file_mark
from pixart.training.buckets import bucket_sizes, draw_size
from pixart.training.diffusion import NoiseSchedule

from .. import WEIGHTS
from ..data.captions import caption
from ..data.layout import arrange
from ..data.scenes import Scene, render, sample_scene
from .autoencoder import encode

TIMESTEPS, STEPS = (250, 650), 5  # from where scenes are drawn again, and how often the transformer looks
GUIDANCE = (1.0, 4.5, 4.5)  # one of them for each batch
SQUARE_SHARE = 0.3  # of batches; the others take any size, narrow ones as often as near squares
BATCH = 8


def batch_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of a batch in pixels."""
    base = get_variant("demo").base_size
    return draw_size(bucket_sizes(base, base), rng, SQUARE_SHARE, even=True)


def arranged_scenes(rng: np.random.Generator, count: int, height: int, width: int) -> tuple[list[Scene], Tensor]:
    """Training scenes as the transformer is taught to place them, and their pictures (B, 3, height, width)."""
    arranged = [arrange(sample_scene(rng), width, height) for _ in range(count)]
    pictures = np.stack([render(scene, width, height) for scene in arranged])
    return arranged, torch.from_numpy(pictures).permute(0, 3, 1, 2)


class Redrawn:
    """`count` batches of redrawn latents in `folder`, one file each, named by their number."""

    def __init__(self, folder: Path, count: int, seed: int = 0) -> None:
        self.folder, self.count, self.seed = folder, count, seed

    def __len__(self) -> int:
        return self.count

    def scenes(self, number: int) -> tuple[list[Scene], Tensor, list[str]]:
        """Scenes, pictures and prompts of a batch."""
        rng = np.random.default_rng((self.seed, number))
        height, width = batch_size(rng)
        arranged, pictures = arranged_scenes(rng, BATCH, height, width)
        return arranged, pictures, [caption(scene, rng).text for scene in arranged]

    def load(self, number: int) -> tuple[list[Scene], Tensor, Tensor]:
        """Scenes, pictures (B, 3, H, W) in [0, 1] and what the transformer made of them, latents (B, 4, H/8, W/8)."""
        arranged, pictures, _ = self.scenes(number)
        return arranged, pictures, load_file(self._file(number))["latents"].float()

    def draw(self, transformer: Path) -> None:
        """Draw what is missing."""
        painter, models = None, _marks(transformer)
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(self.count), desc="redrawing"):
            _, pictures, prompts = self.scenes(number)
            clean = encode(pictures)
            origin = self._origin(clean, prompts, models)
            if self._origin_kept(number) == origin:
                continue
            painter = painter or Painter(transformer)
            latents = painter.redraw(clean, prompts, np.random.default_rng((self.seed, number, 1)))
            part = self._file(number).with_suffix(".part")
            save_file({"latents": latents.half().contiguous()}, part, metadata={"origin": origin})
            part.replace(self._file(number))

    def mark(self, transformer: Path) -> str:
        """Tells these batches from others, by the first of them."""
        _, pictures, prompts = self.scenes(0)
        return f"{self.count} {self._origin(encode(pictures), prompts, _marks(transformer))}"

    def _origin(self, clean: Tensor, prompts: list[str], models: str) -> str:
        """Tells what a batch is drawn from, and how."""
        given = (prompts, self.seed, BATCH, GUIDANCE, TIMESTEPS, STEPS, models)
        return hashlib.sha256(clean.half().numpy().tobytes() + repr(given).encode()).hexdigest()[:32]

    def _origin_kept(self, number: int) -> str | None:
        """Of a batch that is there, and whole."""
        if not self._file(number).exists():
            return None
        try:
            with safe_open(self._file(number), framework="pt") as opened:
                return (opened.metadata() or {}).get("origin")
        except SafetensorError:
            return None

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"


def _marks(transformer: Path) -> str:
    """Of the models that draw."""
    return f"{file_mark(transformer)} {file_mark(WEIGHTS['text_encoders'])}"


class Painter:
    """The demo's transformer and T5, drawing noised latents again."""

    def __init__(self, transformer: Path) -> None:
        self.model: PixArtTransformer = load_transformer(transformer, dtype=torch.bfloat16).eval().requires_grad_(False)
        self.encoder = load_text_encoder(WEIGHTS["text_encoders"])
        self.schedule = NoiseSchedule()

    @torch.no_grad()
    def redraw(self, latents: Tensor, prompts: list[str], rng: np.random.Generator) -> Tensor:
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
