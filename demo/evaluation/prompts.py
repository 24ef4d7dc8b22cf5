"""How often the demo model draws what was asked: held-out prompts, sampled, and read by the checker.

`python -m demo.evaluation.prompts` writes demo/results/evaluation.json, after every run, and contact sheets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pixart import Pipeline
from pixart.model import PixArtTransformer
from pixart.training.initialize import initialize_weights

from .. import RESULTS, WEIGHTS
from ..data.captions import Caption, caption
from ..data.reader import Verdict, check, overlap_with_ideal
from ..data.scenes import Scene, Split, sample_scene
from .contact_sheet import Entry, make_contact_sheet

KINDS = {1: "one_object", 2: "two_objects"}
ASPECT_SIZES = ((512, 128), (352, 176), (256, 256), (208, 304), (128, 512))
PARTS = ("count", "color", "shape", "place", "relation", "size", "background")
Sampler = Callable[[list[str], int, int, float, list[int]], np.ndarray]


@dataclass(frozen=True)
class Run:
    """One setting to measure, with `count` prompts of each kind."""

    name: str
    count: int
    width: int = 256
    height: int = 256
    guidance: float = 4.5
    split: Split = "heldout"
    trained: bool = True


@dataclass(frozen=True)
class Question:
    """A scene and the words that ask for it."""

    scene: Scene
    caption: Caption


def plan_runs(count: int, guidance: float, size: int = 256) -> list[Run]:
    """Every run of the report; the untrained baseline and the ratios take a fifth of the prompts."""
    main = Run("heldout", count, size, size, guidance=guidance)
    runs = [main, replace(main, name="cfg1", guidance=1.0), replace(main, name="seen", split="train")]
    runs.append(replace(main, name="untrained", count=max(1, count // 5), trained=False))
    for width, height in ASPECT_SIZES:
        runs.append(replace(main, name=f"{width}x{height}", count=max(1, count // 5), width=width, height=height))
    return runs


def make_questions(run: Run, objects: int, seed: int) -> list[Question]:
    """Scenes of the run's split in varied wording; one object is always asked for at a place."""
    rng = np.random.default_rng((seed, objects))
    scenes = [sample_scene(rng, run.split, objects) for _ in range(run.count)]
    return [Question(scene, caption(scene, rng, state=("place1",))) for scene in scenes]


def draw(
    sampler: Sampler, questions: Sequence[Question], run: Run, seed: int, batch: int
) -> list[np.ndarray]:
    """One uint8 picture (height, width, 3) for every question, each from a seed of its own."""
    pictures: list[np.ndarray] = []
    for start in tqdm(range(0, len(questions), batch), desc=run.name, leave=False):
        prompts = [question.caption.text for question in questions[start : start + batch]]
        seeds = [seed * 100_000 + start + index for index in range(len(prompts))]
        images = sampler(prompts, run.width, run.height, run.guidance, seeds)
        pictures.extend((np.asarray(images) * 255).round().astype(np.uint8))
    return pictures


def summarise(verdicts: Sequence[Verdict]) -> dict:
    """Share of right pictures with its 95 % interval (Wilson), and of each part that is right."""
    count, right = len(verdicts), sum(v.correct for v in verdicts)
    low, high = wilson_interval(right, count)
    parts = {part: round(float(np.mean([getattr(v, part) for v in verdicts])), 4) for part in PARTS}
    return {"pictures": count, "correct": round(right / count, 4), "interval": [low, high], "parts": parts}


def outlines(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Mean overlap (intersection over union) of what was drawn with the ideal shape at its place and size: of all, and by shape."""
    found: dict[str, list[float]] = {}
    for scene, verdict in zip(scenes, verdicts, strict=True):
        drawn = verdict.found or [None] * len(scene.objects)  # what is missing overlaps with nothing
        for wanted, seen in zip(scene.objects, drawn, strict=True):
            found.setdefault(wanted.shape, []).append(0.0 if seen is None else overlap_with_ideal(seen, wanted.shape))
    every = [value for values in found.values() for value in values]
    return {"all": round(float(np.mean(every)), 4)} | {name: round(float(np.mean(found[name])), 4) for name in sorted(found)}


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    reach = z * np.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)


def shift_questions(questions: Sequence[Question]) -> list[Question]:
    """Every picture's question replaced by the next one's: the wrong-prompt baseline."""
    return [*questions[1:], *questions[:1]]


def measure(sampler: Sampler, run: Run, seed: int, batch: int) -> tuple[dict, list[Entry], dict]:
    """Figures of a run, its pictures with verdicts, and the figures of the same pictures with wrong prompts."""
    figures, wrong, entries, started = {}, {}, [], time.monotonic()
    for objects, kind in KINDS.items():
        questions = make_questions(run, objects, seed)
        pictures = draw(sampler, questions, run, seed, batch)
        verdicts = [check(q.scene, p, q.caption.stated) for q, p in zip(questions, pictures)]
        figures[kind] = summarise(verdicts) | {"outlines": outlines([q.scene for q in questions], verdicts)}
        others = [check(q.scene, p, q.caption.stated) for q, p in zip(shift_questions(questions), pictures)]
        wrong[kind] = summarise(others)
        entries += [Entry(p, q.caption.text, v.correct) for q, p, v in zip(questions, pictures, verdicts)]
    settings = {"width": run.width, "height": run.height, "guidance": run.guidance, "split": run.split}
    seconds = round(time.monotonic() - started, 1)
    return settings | figures | {"seconds": seconds}, entries, settings | wrong


def make_sampler(pipeline: Pipeline, steps: int) -> Sampler:
    """Sampling through the pipeline, exactly at the given size."""

    def sample(prompts: list[str], width: int, height: int, guidance: float, seeds: list[int]) -> np.ndarray:
        return pipeline(
            prompts, steps=steps, guidance=guidance, width=width, height=height, use_bins=False, seed=seeds,
            output="np", progress=False,
        )

    return sample


def untrained_copy(pipeline: Pipeline, seed: int = 0) -> Pipeline:
    """The same pipeline around a transformer as training begins with it, but with a random output layer."""
    torch.manual_seed(seed)
    fresh = PixArtTransformer(pipeline.transformer.config)
    initialize_weights(fresh)
    with torch.no_grad():  # zeros would leave the noise as it is
        for parameter in fresh.final_layer.linear.parameters():
            parameter.normal_(std=0.02)
    fresh = fresh.to(pipeline.device, pipeline.dtype).eval().requires_grad_(False)
    return Pipeline(
        fresh, pipeline.text_encoder, pipeline.vae, base_size=pipeline.base_size, max_tokens=pipeline.max_tokens
    )


def pick_for_sheet(entries: Sequence[Entry], each: int) -> list[Entry]:
    """The first `each` pictures of both kinds, not chosen by how they look."""
    half = len(entries) // 2
    return [*entries[:half][:each], *entries[half:][:each]]


def evaluate(
    pipeline: Pipeline, runs: Sequence[Run], out: Path, steps: int = 20, seed: int = 0, batch: int = 16
) -> dict:
    """Measure all runs; results already in `out` are kept unless measured again."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evaluation.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": {}}
    report |= {"steps": steps, "seed": seed, "dtype": str(pipeline.dtype).removeprefix("torch.")}
    ratios: list[Entry] = []
    for run in runs:
        chosen = pipeline if run.trained else untrained_copy(pipeline, seed)
        figures, entries, wrong = measure(make_sampler(chosen, steps), run, seed, batch)
        report["runs"][run.name] = figures
        if run.name == "heldout":
            report["runs"]["wrong prompt"] = wrong
            make_contact_sheet(pick_for_sheet(entries, 12)).save(out / "contact-sheet.png", optimize=True)
        elif "x" in run.name:
            ratios += pick_for_sheet(entries, 3)
            make_contact_sheet(ratios).save(out / "contact-sheet-ratios.png", optimize=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def format_report(report: dict) -> str:
    """The report as a Markdown table."""
    lines = ["| run | size | cfg | one object | two objects |", "|---|---|---|---|---|"]
    for name, run in report["runs"].items():
        shares = [f"{run[kind]['correct']:.1%} of {run[kind]['pictures']}" for kind in KINDS.values()]
        lines.append(f"| {name} | {run['width']}x{run['height']} | {run['guidance']:g} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: evaluate the demo model, or another transformer trained on its scenes."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluation.prompts", description=main.__doc__)
    parser.add_argument("--transformer", type=Path, default=WEIGHTS["diffusion_models"])
    parser.add_argument("--text-encoder", type=Path, default=WEIGHTS["text_encoders"])
    parser.add_argument("--vae", type=Path, default=WEIGHTS["vae"])
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--size", type=int, default=256, help="side of square pictures; 128 for the first stage")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", metavar="RUN", help="names of the runs to make (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    runs = plan_runs(chosen.count, chosen.cfg, chosen.size)
    unknown = set(chosen.only or ()) - {run.name for run in runs}
    if unknown:
        parser.error(f"unknown runs {sorted(unknown)}; expected some of {[run.name for run in runs]}")
    dtype = torch.bfloat16 if chosen.dtype == "bf16" else torch.float32
    pipeline = Pipeline.from_files(
        chosen.transformer, chosen.text_encoder, chosen.vae, dtype=dtype, device=chosen.device, variant="demo"
    )
    runs = [run for run in runs if not chosen.only or run.name in chosen.only]
    report = evaluate(pipeline, runs, chosen.out, chosen.steps, chosen.seed, chosen.batch)
    sys.stdout.write(format_report(report) + "\n")


if __name__ == "__main__":
    main()
