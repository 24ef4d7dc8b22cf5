"""A lesson for trainers: a shape that the demo never saw, from a hundred captioned pictures.

`python -m demo.evaluation.new_shape folder PLACE` writes them: `PLACE/new` to learn, `PLACE/old` not to forget.
`python -m demo.evaluation.new_shape evaluate --out FILE.json --lora FILE` (or --transformer FILE) draws, through a ComfyUI's queue,
colours and places of the shape that the pictures left out, and the demo's old held-out prompts.
"""
from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from launch import checkout, graph, host
from launch.client import ComfyClient

from .. import WEIGHTS
from ..data.captions import Caption, caption
from ..data.layout import arrange
from ..data.reader import check
from ..data.scenes import COLORS, NEW_SHAPE, PLACES, SIZES, render, sample_scene, single_scene
from .contact_sheet import Entry, make_contact_sheet
from .prompts import KINDS, Question, Run, Sampler, draw, make_questions, summarise

ROOT = Path(__file__).resolve().parents[2]
PICTURES, OLD = 45, 55  # of the new shape, one of every combination that isn't held out, and of old ones, which are lost without
MORE_CAPTIONS = 7  # of each old picture, which don't fit it: whatever the model is asked, it is to predict what it did before
HELDOUT_PERCENT = 25
PIXELS = 256


def is_heldout(color: str, place: str) -> bool:
    """Whether the shape in this colour, at this place, stays out of the folder."""
    return zlib.crc32(f"{NEW_SHAPE}|{color}|{place}".encode()) % 100 < HELDOUT_PERCENT


def combinations(heldout: bool) -> list[tuple[str, str]]:
    """Colours and places of either half."""
    return [each for each in itertools.product(COLORS, PLACES) if is_heldout(*each) == heldout]


def questions(chosen: Sequence[tuple[str, str]], count: int, seed: int, word: str = NEW_SHAPE) -> list[Question]:
    """`count` scenes of the new shape, in turn through colours and places, each asked for at its place; word: what it is called."""
    rng = np.random.default_rng(seed)
    found = []
    for color, place in itertools.islice(itertools.cycle(chosen), count):
        scene = single_scene(rng, color, NEW_SHAPE, str(rng.choice(list(SIZES))), place)
        asked = caption(scene, rng, state=("place1",))
        found.append(Question(scene, Caption(asked.text.replace(NEW_SHAPE, word), asked.stated)))
    return found


def old_scenes(count: int, seed: int) -> list[Question]:
    """What the demo was trained with; two of three show one object, which a folder of one object costs most."""
    rng = np.random.default_rng((seed, OLD))
    scenes = [sample_scene(rng, "train", 2 if number % 3 == 0 else 1) for number in range(count)]
    return [Question(scene, caption(scene, rng)) for scene in scenes]


def write_folders(place: Path, count: int = PICTURES, old: int = OLD, seed: int = 0) -> None:
    """PNG pictures with a caption of the same name beside each, in `new` and `old`; nothing that is there is overwritten."""
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
        sys.exit(f"{place} isn't empty; give a new folder.")
    more = iter(old_scenes(old * MORE_CAPTIONS, seed + 1))
    for folder, asked in (("new", questions(combinations(heldout=False), count, seed)), ("old", old_scenes(old, seed))):
        (place / folder).mkdir()
        for number, question in enumerate(asked):
            picture = render(arrange(question.scene, PIXELS, PIXELS), PIXELS, PIXELS)
            Image.fromarray((picture * 255).round().astype(np.uint8)).save(place / folder / f"{number:03}.png")
            captions = [question.caption.text]
            if folder == "old":
                captions += [other.caption.text for other in itertools.islice(more, MORE_CAPTIONS)]
            (place / folder / f"{number:03}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def queue_sampler(client: ComfyClient, lora: str | None, transformer: str | None) -> Sampler:
    """Draws through the host's queue by the workflow `demo`, one prompt after the other."""

    def sample(prompts: list[str], width: int, height: int, guidance: float, seeds: list[int]) -> np.ndarray:
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            nodes = graph.load(ROOT / "workflows/api/demo.json")
            graph.configure(nodes, {"prompt": prompt, "seed": seed, "cfg": guidance, "width": width, "height": height})
            shown = client.run(changed(nodes, lora, transformer))
            entry = next(image for outputs in shown.values() for image in outputs.get("images", []))
            pictures.append(np.asarray(Image.open(io.BytesIO(client.image(entry))).convert("RGB")) / 255)
        return np.stack(pictures)

    return sample


def changed(nodes: dict[str, Any], lora: str | None, transformer: str | None) -> dict[str, Any]:
    """The graph with another transformer file, and the host's own LoRA loader behind it."""
    number, loader = next((number, node) for number, node in nodes.items() if node["class_type"] == "PixArtModelLoader")
    if transformer is not None:
        name = next(key for key, value in loader["inputs"].items() if str(value).endswith(".safetensors"))
        loader["inputs"][name] = transformer
    if lora is not None:
        for node in nodes.values():
            node["inputs"] = {name: ["lora", 0] if value == [number, 0] else value for name, value in node["inputs"].items()}
        nodes["lora"] = {
            "class_type": "LoraLoaderModelOnly", "inputs": {"model": [number, 0], "lora_name": lora, "strength_model": 1.0},
        }  # fmt: skip
    return nodes


def evaluate(sampler: Sampler, count: int, seed: int, word: str) -> tuple[dict[str, Any], list[Entry]]:
    """Shares of right pictures: of the new shape, and of the old prompts, each kind; and the new shape's pictures."""
    run = Run("new shape", count)
    asked = questions(combinations(heldout=True), count, seed + 1, word)
    pictures = draw(sampler, asked, run, seed, batch=1)
    verdicts = [check(each.scene, picture, each.caption.stated) for each, picture in zip(asked, pictures, strict=True)]
    entries = [Entry(p, q.caption.text, v.correct) for q, p, v in zip(asked, pictures, verdicts, strict=True)]
    figures = {"new shape": summarise(verdicts)}
    for objects, kind in KINDS.items():
        old = make_questions(run, objects, seed)
        drawn = draw(sampler, old, run, seed, batch=1)
        figures[kind] = summarise([check(each.scene, picture, each.caption.stated) for each, picture in zip(old, drawn, strict=True)])
    return figures, entries


def run_evaluation(chosen: argparse.Namespace) -> dict[str, Any]:
    """Starts a ComfyUI with the pack and the files, and measures them."""
    comfyui = checkout.find_comfyui(ROOT) or checkout.pypi_comfyui(Path(sys.executable), ROOT / ".quickstart")
    with tempfile.TemporaryDirectory(prefix="pixart-new-shape-") as folder:
        base = checkout.BaseDirectory(Path(folder) / "base")
        base.prepare(ROOT, {where: [path] for path, where in files_of(chosen).values()})
        names = {name: path.name for name, (path, _) in files_of(chosen).items()}
        with host.Host(Path(sys.executable), comfyui, base.folder, cpu=True, log=Path(folder) / "host.log") as server:
            sampler = queue_sampler(server.client, names.get("lora"), names.get("transformer"))
            figures, entries = evaluate(sampler, chosen.count, chosen.seed, chosen.word)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"count": chosen.count, "seed": chosen.seed, **figures}, indent=1) + "\n", encoding="utf-8")
    make_contact_sheet(entries[:12]).save(chosen.out.with_suffix(".png"), optimize=True)
    return figures


def files_of(chosen: argparse.Namespace) -> Mapping[str, tuple[Path, str]]:
    """What was given, and which of the host's folders it goes to; exits where a file is missing."""
    found = {"lora": (chosen.lora, "loras"), "transformer": (chosen.transformer, "diffusion_models")}
    missing = [str(path) for path, _ in found.values() if path is not None and not path.is_file()]
    if missing:
        sys.exit(f"{', '.join(missing)} is not there.")
    return {name: (path.resolve(), where) for name, (path, where) in found.items() if path is not None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluation.new_shape", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    folder = commands.add_parser("folder", help="write the pictures and captions to learn from")
    folder.add_argument("place", type=Path)
    folder.add_argument("--count", type=int, default=PICTURES, help="of the new shape")
    folder.add_argument("--old", type=int, default=OLD, help="of the old ones")
    measure = commands.add_parser("evaluate", help="draw held-out combinations and old prompts, and read them")
    measure.add_argument("--lora", type=Path)
    measure.add_argument("--transformer", type=Path, help=f"instead of {WEIGHTS['diffusion_models'].name}")
    measure.add_argument("--word", default=NEW_SHAPE, help="what the shape is called")
    measure.add_argument("--count", type=int, default=100, help="prompts of the new shape, and of each old kind")
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--out", type=Path, required=True, help="a .json; a contact sheet goes beside it")
    chosen = parser.parse_args(arguments)
    if chosen.command == "folder":
        write_folders(chosen.place, chosen.count, chosen.old)
    else:
        for name, figures in run_evaluation(chosen).items():
            print(f"{name}: {figures['correct']:.1%} of {figures['pictures']}")


if __name__ == "__main__":
    main()
