"""Writes pictures and data sets of every layout."""
from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from pixart.training.draws import Draws
from pixart.training.sources.pictures import Part

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg", "camera.png", "horse.png")


def real_photographs(folder: Path) -> Path:
    """Those that ship with scikit-image and scikit-learn, each with a caption."""
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    places = [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]
    places += [Path(sklearn.__file__).parent / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    folder.mkdir()
    for place in places:
        if place.is_file():  # older and newer releases ship a few others
            (folder / place.name).write_bytes(place.read_bytes())
            (folder / place.with_suffix(".txt").name).write_text(f"a picture of {place.stem}", encoding="utf-8")
    return folder


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Soft colours, another picture for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def folder(root: Path, sizes: list[tuple[int, int]], caption: str | None = "a red circle") -> Path:
    """p0.png, p1.png ... of (width, height), each with a caption that ends in its number."""
    root.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        picture(width, height, number).save(root / f"p{number}.png")
        if caption is not None:
            (root / f"p{number}.txt").write_text(f"{caption} {number}", encoding="utf-8")
    return root


def data_info(root: Path, rows: list[dict[str, Any]], place: str = ".", pictures: bool = True) -> Path:
    """InternData/data_info.json and, if asked, the pictures in InternImgs; returns InternData."""
    data = root / "InternData"
    (data / place).mkdir(parents=True, exist_ok=True)
    full = [{"ratio": row["height"] / row["width"], "prompt": "a red circle", **row} for row in rows]
    (data / place / "data_info.json").write_text(json.dumps(full), encoding="utf-8")
    for number, row in enumerate(rows if pictures else ()):
        path = root / "InternImgs" / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(row["width"], row["height"], number).save(path)
    return data


def stored_latent(path: Path, height: int, width: int, seed: int = 0, channels: int = 8) -> np.ndarray:
    """An npy as the reference's extractor writes it; returns it."""
    found = np.random.default_rng(seed).normal(size=(channels, height // 8, width // 8)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, found)
    return found


def stored_states(path: Path, tokens: int, real: int, seed: int = 0, width: int = 128, dtype: type = np.float16) -> np.ndarray:
    """An npz as the reference's extractor writes it; returns the states of the real tokens."""
    states = np.random.default_rng(seed).normal(size=(1, tokens, width)).astype(dtype)
    states[0, real:] = states[0, real - 1]  # as its data set pads
    mask = (np.arange(tokens) < real).astype(np.int16)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, caption_feature=states, attention_mask=mask)
    return states[0, :real].astype(np.float32)


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """An archive of files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def prepared(source: Part, *prompts: str) -> Part:
    """The source with its features."""
    source.prepare(prompts, Accelerator(cpu=True))
    return source


def batches(source: Part, recipe: Any, count: int, stage: int = 0, seed: int = 0) -> list[Any]:
    """The first batches of a stage, as one process has them."""
    own = recipe.stages[stage]
    settings = recipe.part_at("source", stage).settings
    return [source.batch(settings, own, Draws(seed, stage, number, range(own.batch_size))) for number in range(count)]
