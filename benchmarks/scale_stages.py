"""The stages whose rates `benchmarks scale` measures: real ones, on the demo and on a random vision-language model."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from demo import WEIGHTS
from demo.data.captions import caption
from demo.data.scenes import render, sample_scene
from pixart.config import get_variant
from pixart.scale.caption_stage import CaptionSettings, CaptionStage
from pixart.scale.draw_stage import DrawSettings, DrawStage
from pixart.scale.encode_stage import EncodeStage, TextSettings
from pixart.scale.extract_stage import FeatureStage
from pixart.scale.graph import GraphModels
from pixart.scale.prompt_rows import Picture
from pixart.scale.stage import Stage
from pixart.scale.where import Where, run
from pixart.training.data import features
from pixart.training.data.cache import Cache
from pixart.training.data.item import File

BATCH, SIDE, ANSWER = 2, 256, 32  # items, pixels, tokens
TEXTS_A_PICTURE = 16  # T5 is so much faster than the rest that it gets more items
ENCODED_A_PICTURE = 2  # the VAE's batches are long: with two workers each needs several
PICTURES_A_DRAWN = 4  # drawing is so much slower that it gets fewer
DEMO = "demo"


def stages(items: int, steps: int) -> dict[str, Callable[[Path], Stage]]:
    """Makers of stages in a folder, by the name in the table."""
    return {
        "captions (random model of 0.1 M)": lambda folder: _captions(folder, items),
        "T5 (demo)": lambda folder: EncodeStage(folder, _text_settings(), _prompts(items * TEXTS_A_PICTURE)),
        "VAE (demo)": lambda folder: _latents(folder, items * ENCODED_A_PICTURE),
        f"drawing (demo, {steps} steps)": lambda folder: _drawing(folder, -(-items // PICTURES_A_DRAWN), steps),
    }


def _prompts(count: int) -> list[str]:
    """Different ones: what a scene says of itself, and its number."""
    rng = np.random.default_rng(0)
    return [f"{caption(sample_scene(rng), rng).text} {number}" for number in range(count)]


def _pictures(folder: Path, count: int) -> list[str]:
    """Scenes as PNG; their names."""
    folder.mkdir()
    rng, names = np.random.default_rng(0), [f"{number:05}.png" for number in range(count)]
    for name in names:
        Image.fromarray((render(sample_scene(rng), SIDE, SIDE) * 255).astype(np.uint8)).save(folder / name)
    return names


def _captions(folder: Path, count: int) -> Stage:
    from tests.support.tiny_vlm import save_vlm

    model = save_vlm(folder / "model")
    settings = CaptionSettings(str(model), max_tokens=ANSWER, batch=BATCH)
    return CaptionStage(folder / "pictures", settings, _pictures(folder / "pictures", count))


def _text_settings() -> TextSettings:
    return TextSettings.of(WEIGHTS["text_encoders"])


def _latents(folder: Path, count: int) -> Stage:
    names = _pictures(folder / "pictures", count)
    job = features.Latents(Cache(folder / "cache"), str(WEIGHTS["vae"]), get_variant(DEMO), None)
    work = [features.Picture(n, File(folder / "pictures" / name), (SIDE, SIDE), SIDE, f"{n:032}") for n, name in enumerate(names)]
    stage = FeatureStage(job, work, "pictures")
    stage.place.mkdir(parents=True)
    return stage


def _drawing(folder: Path, count: int, steps: int) -> Stage:
    """Prompts are encoded before, untimed."""
    prompts = _prompts(count)
    encode = EncodeStage(folder, _text_settings(), [*prompts, ""])
    run([encode], Where())
    graph = GraphModels("demo", "demo", "demo", DEMO, base_size=SIDE)
    settings = DrawSettings(WEIGHTS["diffusion_models"], WEIGHTS["vae"], DEMO, batch=BATCH, graph=graph)
    rows = [Picture(f"{n:05}.png", n, prompt, "", n, SIDE, SIDE, steps, 4.5) for n, prompt in enumerate(prompts)]
    return DrawStage(encode, settings, rows)
