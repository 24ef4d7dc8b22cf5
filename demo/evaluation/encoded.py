"""What the demo's autoencoder alone loses: held-out scenes as the transformer is taught to place them, encoded, decoded and read.

`python -m demo.evaluation.encoded` writes demo/results/encoded.json.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import RESULTS, WEIGHTS
from ..data.layout import arrange
from ..data.reader import Verdict, check
from ..data.scenes import render
from ..training.autoencoder import encode, load_decoder
from .prompts import ASPECT_SIZES, KINDS, Question, Run, make_questions, outlines, summarise


def measure(decoder: nn.Module, width: int, height: int, count: int, seed: int = 0) -> dict:
    """Figures of `count` scenes of each kind at a size in pixels."""
    figures = {}
    for objects, kind in KINDS.items():
        questions = make_questions(Run("encoded", count, width, height), objects, seed)
        verdicts = [read_back(decoder, question, width, height) for question in tqdm(questions, desc=f"{width}x{height}", leave=False)]
        figures[kind] = summarise(verdicts) | {"outlines": outlines([question.scene for question in questions], verdicts)}
    return figures


@torch.no_grad()
def read_back(decoder: nn.Module, question: Question, width: int, height: int) -> Verdict:
    """What the reader says of one scene."""
    picture = torch.from_numpy(render(arrange(question.scene, width, height), width, height)).permute(2, 0, 1)
    decoded = decoder(encode(picture[None]))[0].permute(1, 2, 0).clamp(0, 1)
    return check(question.scene, (decoded.numpy() * 255).round().astype(np.uint8), question.caption.stated)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: measure the autoencoder at five sizes."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluation.encoded", description=main.__doc__)
    parser.add_argument("--vae", type=Path, default=WEIGHTS["vae"])
    parser.add_argument("--count", type=int, default=100, help="scenes of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "encoded.json")
    chosen = parser.parse_args(arguments)
    decoder = load_decoder(chosen.vae)
    report = {"seed": chosen.seed, "runs": {}}
    for width, height in ASPECT_SIZES:
        report["runs"][f"{width}x{height}"] = measure(decoder, width, height, chosen.count, chosen.seed)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
