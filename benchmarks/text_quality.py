"""What T5's precision does to the demo's pictures: alignment score, and distance from the pictures of fp32.

`python -m benchmarks text_quality` draws the held-out prompts of demo.evaluation.prompts with each precision of the demo's T5, from
the same noise, and writes text_quality.json and text_quality.md after each; run again, it measures what is missing.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from benchmarks.report import machine
from demo import WEIGHTS
from demo.evaluation.prompts import KINDS, Run, measure, wilson_interval
from demo.evaluation.prompts import make_sampler as demo_sampler
from pixart import Pipeline
from pixart.text.encoder import load_text_encoder
from pixart.text.names import PRECISIONS

RESULTS = Path(__file__).parent / "results"
FP32 = "fp32"
DTYPES = {FP32: torch.float32, "bf16": torch.bfloat16}  # of an encoder that is not quantized
ALL = (FP32, "bf16", *PRECISIONS)
SETTINGS = ("count", "steps", "size", "cfg", "seed", "dtype")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the precisions that have no result yet; fp32 goes first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks text_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=ALL, default=list(ALL), help="only these, and fp32")
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the transformer and the VAE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    chosen = parser.parse_args(arguments)
    dtype = DTYPES[chosen.dtype]
    drawing = Pipeline.from_files(WEIGHTS["diffusion_models"], None, WEIGHTS["vae"], dtype=dtype, device=chosen.device, variant="demo")
    run(lambda precision: with_text_encoder(drawing, precision), [name for name in ALL if name in (FP32, *chosen.precision)], chosen)


def with_text_encoder(drawing: Pipeline, precision: str) -> Pipeline:
    """The pipeline with the demo's T5 in a precision."""
    plain = DTYPES.get(precision)
    encoder = load_text_encoder(WEIGHTS["text_encoders"], None, plain, drawing.device, None if plain else precision)
    return Pipeline(drawing.transformer, encoder, drawing.vae, base_size=drawing.base_size, max_tokens=drawing.max_tokens)


def run(make: Callable[[str], Pipeline], wanted: Sequence[str], chosen: argparse.Namespace) -> None:
    """Measures what is missing. The pictures of fp32 stay beside the report, to be compared with when it goes on."""
    file, kept = chosen.out / "text_quality.json", chosen.out / ".text_quality-fp32.safetensors"
    settings = {name: getattr(chosen, name) for name in SETTINGS}
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if report.get("settings") != settings or not kept.is_file():
        report = {"results": {}}
    report |= {"settings": settings, "machine": {**machine(), "device": chosen.device}, "note": chosen.note}
    chosen.out.mkdir(parents=True, exist_ok=True)
    for precision in wanted:
        if precision in report["results"]:
            continue
        row, pictures = measure_precision(make(precision), precision, chosen)
        if precision == FP32:
            save_file({"pictures": np.ascontiguousarray(pictures)}, kept)  # other layouts would be mixed up in silence
        distance = np.abs(pictures.astype(np.int16) - load_file(kept)["pictures"])
        report["results"][precision] = row | {"difference": round(float(distance.mean()) / 255, 5)}
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        print(_row(precision, report["results"][precision]), flush=True)
    if set(ALL) <= set(report["results"]):
        kept.unlink()


def measure_precision(pipeline: Pipeline, precision: str, chosen: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one precision, and its pictures, uint8 (count, height, width, 3)."""
    sample, pictures = demo_sampler(pipeline, chosen.steps), []

    def sampler(*asked: Any) -> np.ndarray:
        found = sample(*asked)
        pictures.append((found * 255).round().astype(np.uint8))
        return found

    figures, _, _ = measure(sampler, Run(precision, chosen.count, chosen.size, chosen.size, chosen.cfg), chosen.seed, chosen.batch)
    right = sum(round(figures[kind]["correct"] * figures[kind]["pictures"]) for kind in KINDS.values())
    count = sum(figures[kind]["pictures"] for kind in KINDS.values())
    row = {"alignment": round(right / count, 4), "interval": wilson_interval(right, count), "seconds": figures["seconds"]}
    return row | {kind: figures[kind] for kind in KINDS.values()}, np.concatenate(pictures)


def markdown(report: dict[str, Any]) -> str:
    """The table with what one must know to read it."""
    settings, facts = report["settings"], report["machine"]
    lines = [
        "# T5's precision and the demo's pictures",
        "",
        f"{settings['count']} held-out prompts of each kind, the same noise for every precision; {settings['size']} px, {settings['steps']} "
        f"steps, cfg {settings['cfg']:g}, transformer in {settings['dtype']}. \"Alignment\" is the share of pictures that are all right, with its "
        "95 % interval; \"difference\" the mean over all pixels of the distance from the pictures of fp32, 1 being black to white. Written by "
        "`python -m benchmarks text_quality`.",
        "",
        "| T5 | alignment | one object | two objects | difference |",
        "|---|---|---|---|---|",
        *(_row(precision, report["results"][precision]) for precision in ALL if precision in report["results"]),
        "",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}. {report['note']}".rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _row(precision: str, row: dict[str, Any]) -> str:
    low, high = row["interval"]
    kinds = " | ".join(f"{row[kind]['correct']:.0%}" for kind in KINDS.values())
    return f"| {precision} | {row['alignment']:.1%} ({low:.0%} to {high:.0%}) | {kinds} | {row['difference']:.4f} |"


if __name__ == "__main__":
    main()
