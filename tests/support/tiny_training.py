"""A tiny model and a source of two pictures, for runs of a few steps."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pixart.config import TransformerConfig, Variant
from pixart.training.batch import Batch
from pixart.training.draws import Draws
from pixart.training.recipe import Recipe, Stage

TINY = TransformerConfig(hidden_size=72, depth=2, num_heads=1, mlp_hidden=144, caption_channels=8)
VARIANT = Variant("demo", "tiny", "sigma", 256, 300, 0.13025, "demo", TINY)


class TwoPictures:
    """A context of ones means a bright latent, of minus ones a dark one; the hint says the same."""

    feature_count = 0
    settled = True

    def __init__(self, settings: Any, recipe: Recipe) -> None:
        self.null_context = torch.zeros(1, 8)

    def report(self) -> list[str]:
        """Nothing to count."""
        return ["two pictures"]

    def check(self) -> None:
        """Nothing can be broken."""

    def prepare(self, prompts: Any, accelerator: Any) -> None:
        """Nothing to compute."""

    def contents(self) -> list[str]:
        """No pictures are kept."""
        return []

    def encode(self, prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """"bright" is ones, anything else minus ones."""
        sign = torch.tensor([1.0 if prompt == "bright" else -1.0 for prompt in prompts])
        return sign[:, None, None].expand(-1, 2, 8), torch.ones(len(sign), 2, dtype=torch.bool)

    def validation(self, settings: Any, stage: Stage, rows: range) -> list[Batch]:
        """Eight pictures, always the same."""
        return [self.batch(settings, replace(stage, batch_size=1), Draws(0, 1_000_000, row, range(1))) for row in rows if row < 8]

    def decode(self, latents: torch.Tensor) -> list[Any]:
        """Grey pictures, as bright as the latents."""
        from PIL import Image

        levels = ((latents.mean((1, 2, 3)) + 1) * 127.5).clamp(0, 255).int().tolist()
        return [Image.new("RGB", (latents.shape[3] * 8, latents.shape[2] * 8), (level,) * 3) for level in levels]

    def batch(self, settings: Any, stage: Stage, draws: Draws) -> Batch:
        """Squares of the stage's size."""
        sign = torch.where(draws.uniform("sign") < 0.5, -1.0, 1.0).float()
        latent = sign[:, None, None, None].expand(-1, 4, stage.base_size // 8, stage.base_size // 8).clone()
        captions = tuple("bright" if value > 0 else "dark" for value in sign.tolist())
        context, size = sign[:, None, None].expand(-1, 2, 8), torch.full((len(sign), 2), float(stage.base_size))
        mask = torch.ones(len(sign), 2, dtype=torch.bool)
        hint = latent.clone() if settings.hints else None
        return Batch(latent, context, mask, size, torch.ones(len(sign)), float(stage.batch_size), hint=hint, captions=captions)


def recipe_values(folder: Any, steps: int = 6, **changes: Any) -> dict[str, Any]:
    """A recipe's values; its files lie in `folder`."""
    return {
        "variant": "demo", "method": "full", "objective": {"name": "denoise", "timesteps": "logit_normal"},
        "source": {"name": "scenes", "text_encoder": ""}, "output": str(folder / "out.safetensors"), "run_dir": str(folder / "run"),
        "precision": "fp32", "warmup_steps": 2, "ema_decay": 0.9, "save_every": 1000, "caption_dropout": 0.0,
        "stages": [{"base_size": 64, "steps": steps, "batch_size": 8, "learning_rate": 2e-3}], **changes,
    }  # fmt: skip
