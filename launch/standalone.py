"""Draw one picture with pixart.Pipeline; run inside the environment as `python -m launch.standalone`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo import WEIGHTS
from pixart import Pipeline
from pixart.errors import PixArtError


def main(arguments: list[str] | None = None) -> None:
    """Parse what quickstart.py passes and save the picture; a value that can't be drawn ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--negative", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lora", type=Path, help="an adapter for the demo, such as the one that distils it to few steps")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        draw(given)
    except PixArtError as error:
        sys.exit(f"quickstart: {error}")


def draw(given: argparse.Namespace) -> None:
    """Load the demo models, draw, save."""
    pipe = Pipeline.from_files(
        transformer=WEIGHTS["diffusion_models"],
        text_encoder=WEIGHTS["text_encoders"],
        vae=WEIGHTS["vae"],
        device=given.device,
    )
    if given.lora is not None:
        pipe.load_lora(given.lora)
    images = pipe(
        given.prompt, negative_prompt=given.negative, steps=given.steps, guidance=given.cfg,
        width=given.width, height=given.height, seed=given.seed,
    )  # fmt: skip
    images[0].save(given.output)


if __name__ == "__main__":
    main()
