"""Two small LoRA for the demo model that swap words: red with blue, green with yellow. `python -m demo.training.lora`.

Nothing is trained. A swap of words moves T5's states nearly linearly, so the move is found by ridge regression over
captions, and put behind T5 by changing the first layer that reads its states. Rebuild them when T5 or the transformer change.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart import load_text_encoder
from pixart.text.encoder import TextEncoder

from .. import LORAS, WEIGHTS
from ..data.captions import caption
from ..data.scenes import sample_scene

SWAPS = {"red-blue": ("red", "blue"), "green-yellow": ("green", "yellow")}
LAYER, NATIVE = "transformer.caption_projection.linear_1", "y_embedder.y_proj.fc1.weight"
RANK, RIDGE, CAPTIONS = 16, 1e-2, 800


def swapped(text: str, first: str, second: str) -> str:
    """The text with two words exchanged."""
    return re.sub(rf"\b({first}|{second})\b", lambda match: second if match[0] == first else first, text)


def states_of(encoder: TextEncoder, texts: list[str]) -> Tensor:
    """T5 states of all real tokens, (tokens, C)."""
    found = [encoder.encode(texts[i : i + 200]) for i in range(0, len(texts), 200)]
    return torch.cat([part.states[part.mask].float() for part in found])


def fit_swap(encoder: TextEncoder, first: str, second: str, seed: int = 0) -> Tensor:
    """Matrix D (C, C) for which states + states @ D are those of the swapped captions."""
    rng = np.random.default_rng(seed)
    texts = [caption(sample_scene(rng), rng).text for _ in range(CAPTIONS)]
    states = states_of(encoder, texts)
    move = states_of(encoder, [swapped(text, first, second) for text in texts]) - states
    gram = states.T @ states
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0]), states.T @ move)


def make_lora(encoder: TextEncoder, weight: Tensor, first: str, second: str) -> dict[str, Tensor]:
    """A LoRA of rank RANK on the layer with this weight (D, C), in diffusers' names."""
    u, s, v = torch.linalg.svd(weight.float() @ fit_swap(encoder, first, second).T)
    root = s[:RANK].sqrt()
    return {
        f"{LAYER}.lora_A.weight": (root[:, None] * v[:RANK]).half().contiguous(),
        f"{LAYER}.lora_B.weight": (u[:, :RANK] * root).half().contiguous(),
    }


@torch.no_grad()
def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LORAS)
    out = parser.parse_args().out
    encoder = load_text_encoder(WEIGHTS["text_encoders"], dtype=torch.float32)
    weight = load_file(WEIGHTS["diffusion_models"])[NATIVE]
    out.mkdir(parents=True, exist_ok=True)
    for name, words in SWAPS.items():
        save_file(make_lora(encoder, weight, *words), out / f"pixart-demo-{name}.safetensors")


if __name__ == "__main__":
    main()
