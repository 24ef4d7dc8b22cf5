"""The demo in few steps: distilled and not, the same held-out prompts and seeds, read by the checker.

`python -m demo.evaluation.steps` writes demo/results/few-steps.json after every row, and a plot. Started again, it goes on.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors import safe_open

from pixart import Pipeline
from pixart.errors import InputError
from pixart.training.base import file_mark

from .. import DISTILLED, RESULTS, WEIGHTS
from .prompts import KINDS, Run, Sampler, make_sampler, measure

PLAIN, GUIDANCE, MANY, FEWER = "not distilled", 4.5, 20, 12
STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str  # PLAIN, or a name of DISTILLED
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """Of the results."""
        return f"{self.model}, {self.steps} steps, cfg {self.guidance:g}"


def plan_rows(steps: Sequence[int], distilled: Sequence[str]) -> list[Row]:
    """The model as it is in many steps and in quickstart's, then every number of steps beside it; DMD has but one."""
    rows = [Row(PLAIN, MANY, GUIDANCE), Row(PLAIN, FEWER, GUIDANCE)]
    for count in steps:
        rows.append(Row(PLAIN, count, GUIDANCE))
        rows += [Row(model, count, 1.0) for model in distilled if model != "dmd" or count == 1]
    return list(dict.fromkeys(rows))


def load_pipeline(transformer: Path, distilled: Path | None, dtype: torch.dtype) -> Pipeline:
    """The demo, with a distilled LoRA in it or with distilled weights in its place."""
    adapter = distilled is not None and is_adapter(distilled)
    weights = transformer if distilled is None or adapter else distilled
    pipeline = Pipeline.from_files(weights, WEIGHTS["text_encoders"], WEIGHTS["vae"], dtype=dtype, variant="demo")
    if adapter:
        pipeline.load_lora(distilled)
    if distilled is not None and pipeline.note is None:
        raise InputError(f"{distilled} doesn't say how it is sampled; expected what an objective lcm or dmd wrote.")
    return pipeline


def is_adapter(path: Path) -> bool:
    """Whether a file holds matrices of a LoRA."""
    with safe_open(str(path), framework="pt") as opened:
        return any(".lora_" in name for name in opened.keys())


def evaluate(
    files: dict[str, Path], transformer: Path, steps: Sequence[int], out: Path, count: int, seed: int, batch: int, dtype: torch.dtype
) -> dict:
    """Measures every row that `out` doesn't have yet; raises InputError for rows of other weights or settings.

    files: model -> its file, of those that are distilled.
    """
    settings = {"count": count, "seed": seed, "dtype": str(dtype).removeprefix("torch."), "transformer": file_mark(str(transformer))}
    report = _begun(out, settings)
    for model in (PLAIN, *files):
        rows = [row for row in plan_rows(steps, tuple(files)) if row.model == model]
        mark = file_mark(str(files.get(model, transformer)))
        missing = [row for row in rows if report["rows"].get(row.name, {}).get("file") != mark]
        if not missing:
            continue
        pipeline = load_pipeline(transformer, files.get(model), dtype)
        for row in missing:
            report["rows"][row.name] = {**asdict(row), "file": mark, **measure_row(pipeline, row, count, seed, batch)}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _begun(out: Path, settings: dict) -> dict:
    if not out.exists():
        return {**settings, "rows": {}}
    report = json.loads(out.read_text(encoding="utf-8"))
    other = [f"{name} {report.get(name)} instead of {value}" for name, value in settings.items() if report.get(name) != value]
    if other:
        raise InputError(f"{out} was measured with {', '.join(other)}; remove it, or give another --out.")
    return report


def measure_row(pipeline: Pipeline, row: Row, count: int, seed: int, batch: int) -> dict:
    """Figures of both kinds, and the seconds that a picture takes in such batches."""
    sampler, spent = timed(make_sampler(pipeline, row.steps))
    figures, _, _ = measure(sampler, Run(row.name, count, guidance=row.guidance), seed, batch)
    return {kind: figures[kind] for kind in KINDS.values()} | {"seconds": round(sum(spent) / (count * len(KINDS)), 4)}


def timed(sampler: Sampler) -> tuple[Sampler, list[float]]:
    """The sampler, and a list that its seconds are put into."""
    spent: list[float] = []

    def sample(prompts: list[str], width: int, height: int, guidance: float, seeds: list[int]) -> np.ndarray:
        started = time.monotonic()
        pictures = sampler(prompts, width, height, guidance, seeds)
        spent.append(time.monotonic() - started)
        return pictures

    return sample, spent


def format_report(report: dict) -> str:
    """A Markdown table."""
    lines = ["| model | steps | cfg | one object | two objects | seconds a picture |", "|---|---|---|---|---|---|"]
    for row in sorted(report["rows"].values(), key=lambda row: (row["model"] != PLAIN, row["model"], -row["steps"])):
        shares = " | ".join(f"{row[kind]['correct']:.1%}" for kind in KINDS.values())
        lines.append(f"| {row['model']} | {row['steps']} | {row['guidance']:g} | {shares} | {row['seconds']:.2f} |")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Right pictures against seconds a picture, with their intervals; the dotted line is the model in many steps."""
    figure, axes = plt.subplots(1, len(KINDS), figsize=(10, 3.8), sharey=True, constrained_layout=True)
    rows = list(report["rows"].values())
    for axis, kind in zip(axes, KINDS.values(), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["steps"])
            seconds, shares = [row["seconds"] for row in own], np.array([row[kind]["correct"] for row in own])
            low, high = (np.array([row[kind]["interval"][end] for row in own]) for end in (0, 1))
            errors = np.abs(np.stack([shares - low, high - shares]))
            axis.errorbar(seconds, shares, errors, marker="o", capsize=3, label=model)
            for row, x, y in zip(own, seconds, shares, strict=True):
                axis.annotate(str(row["steps"]), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        whole = next((row for row in rows if row["model"] == PLAIN and row["steps"] == MANY), None)
        if whole is not None:
            axis.axhline(whole[kind]["correct"], color="0.5", ls=":")
        axis.set(xscale="log", xlabel="seconds a picture (steps beside the points)", title=kind.replace("_", " "))
        axis.set(ylim=(0, 1.09), yticks=np.linspace(0, 1, 6))
    axes[0].set_ylabel("right pictures")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: measure the demo in few steps."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluation.steps", description=main.__doc__)
    parser.add_argument("--transformer", type=Path, default=WEIGHTS["diffusion_models"], help="what was distilled")
    for model, path in DISTILLED.items():
        parser.add_argument(f"--{model}", type=Path, default=path, help="LoRA or whole weights (default: the demo's; none: leave it out)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "few-steps.json", help="the plot lies beside it")
    chosen = parser.parse_args(arguments)
    files = {model: getattr(chosen, model) for model in DISTILLED if str(getattr(chosen, model)) != "none"}
    absent = [str(path) for path in files.values() if not path.is_file()]
    if absent:
        parser.error(f"no file {', '.join(absent)}; configs/train/demo-lcm-lora.json and demo-dmd.json make them, 'none' leaves one out")
    dtype = torch.bfloat16 if chosen.dtype == "bf16" else torch.float32
    try:
        report = evaluate(files, chosen.transformer, chosen.steps, chosen.out, chosen.count, chosen.seed, chosen.batch, dtype)
    except InputError as error:
        parser.error(str(error))
    plot(report, chosen.out.with_suffix(".png"))
    sys.stdout.write(format_report(report) + "\n")


if __name__ == "__main__":
    main()
