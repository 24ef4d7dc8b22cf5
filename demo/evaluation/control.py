"""What the demo's ControlNet adds: the same held-out prompts and seeds, with outlines and without, read by the checker.

`python -m demo.evaluation.control` writes demo/results/controlnet.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixart import Pipeline
from pixart.checkpoints.controlnet import load_controlnet
from pixart.controlnet import ControlledTransformer
from pixart.errors import InputError

from .. import CONTROLNET, RESULTS, WEIGHTS
from ..data.dataset import edge_grid
from ..data.layout import arrange
from ..data.reader import check
from ..data.scenes import render
from .prompts import KINDS, Question, Run, make_questions, summarise


class Hinted(ControlledTransformer):
    """A controlled transformer with the hints of one batch; guidance repeats them for the negative prompts."""

    hint: Tensor
    strength: float = 1.0

    def forward(self, latent, timestep, context, mask=None, size=None, kv_compression=(), **same_in_every_step) -> Tensor:
        if kv_compression:
            raise InputError("The ControlNet is evaluated without KV compression; leave kv_compression out.")
        hint = self.hint.to(latent).repeat(latent.shape[0] // self.hint.shape[0], 1, 1, 1)
        return super().forward(latent, timestep, context, mask, size, hint=hint, strength=self.strength, **same_in_every_step)


def hints(questions: Sequence[Question], width: int, height: int) -> Tensor:
    """Latents (B, 4, height/8, width/8) of the outlines of each question's scene, one pixel wide."""
    grids = [edge_grid(arrange(question.scene, width, height), height, width, 1) for question in questions]
    return torch.from_numpy(np.stack(grids)).permute(0, 3, 1, 2).contiguous()


def measure(pipeline: Pipeline, run: Run, steps: int, seed: int, batch: int) -> dict:
    """Shares of right pictures of each kind, and how well their objects lie on those whose outlines were given."""
    figures = {}
    for objects, kind in KINDS.items():
        questions = make_questions(run, objects, seed)
        verdicts, overlaps = [], []
        for start in tqdm(range(0, len(questions), batch), desc=f"{run.name}, {kind}", leave=False):
            part = questions[start : start + batch]
            pipeline.transformer.hint = hints(part, run.width, run.height)
            images = pipeline(
                [question.caption.text for question in part], steps=steps, guidance=run.guidance, width=run.width, height=run.height,
                use_bins=False, seed=[seed * 100_000 + start + i for i in range(len(part))], output="np", progress=False,
            )  # fmt: skip
            pictures = (np.asarray(images) * 255).round().astype(np.uint8)
            verdicts += [check(q.scene, p, q.caption.stated) for q, p in zip(part, pictures, strict=True)]
            overlaps += [overlap(p / 255, target(q, run.width, run.height)) for q, p in zip(part, pictures, strict=True)]
        figures[kind] = summarise(verdicts) | {"overlap": round(float(np.mean(overlaps)), 4)}
    return figures


def target(question: Question, width: int, height: int) -> np.ndarray:
    """The picture (height, width, 3) in [0, 1] whose outlines are given."""
    return render(arrange(question.scene, width, height), width, height)


def overlap(picture: np.ndarray, wanted: np.ndarray) -> float:
    """Of the objects' pixels in two pictures (H, W, 3) in [0, 1]: what both have over what either has."""
    first, second = object_pixels(picture), object_pixels(wanted)
    return float((first & second).sum() / max(1, (first | second).sum()))


def object_pixels(picture: np.ndarray) -> np.ndarray:
    """Pixels (H, W) that have another colour than the upper edge."""
    return np.abs(picture - np.median(picture[:4].reshape(-1, 3), axis=0)).max(-1) > 0.25


def evaluate(pipeline: Pipeline, controlnet: Path, run: Run, steps: int = 20, seed: int = 0, batch: int = 16) -> dict:
    """Figures with the ControlNet at strength 1, and at 0."""
    model = Hinted(pipeline.transformer, load_controlnet(controlnet, dtype=pipeline.dtype, device=pipeline.device))
    controlled = Pipeline(model, pipeline.text_encoder, pipeline.vae, base_size=pipeline.base_size, max_tokens=pipeline.max_tokens)
    dtype = str(pipeline.dtype).removeprefix("torch.")
    report = {"dtype": dtype, "steps": steps, "seed": seed, "guidance": run.guidance, "width": run.width, "height": run.height, "runs": {}}
    for name, strength in (("with outlines", 1.0), ("without", 0.0)):
        model.strength = strength
        report["runs"][name] = measure(controlled, replace(run, name=name), steps, seed, batch)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: evaluate the demo's ControlNet."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluation.control", description=main.__doc__)
    parser.add_argument("--controlnet", type=Path, default=CONTROLNET)
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "controlnet.json")
    chosen = parser.parse_args(arguments)
    dtype = torch.bfloat16 if chosen.dtype == "bf16" else torch.float32
    weights = (WEIGHTS[kind] for kind in ("diffusion_models", "text_encoders", "vae"))
    pipeline = Pipeline.from_files(*weights, dtype=dtype, variant="demo")
    report = evaluate(pipeline, chosen.controlnet, Run("heldout", chosen.count), chosen.steps, chosen.seed, chosen.batch)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report["runs"], indent=1) + "\n")


if __name__ == "__main__":
    main()
