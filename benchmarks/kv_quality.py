"""What KV compression does to the demo's pictures: alignment score and distance from the uncompressed ones.

`python -m benchmarks kv_quality` draws the held-out prompts of demo.evaluation.prompts with each setting, from the same noise, and
writes kv_quality.json, .md and .png; settings already measured are kept, unless their weights have changed since. `--recipe
configs/train/demo-kv.json` adds the model of that recipe, trained and as it begins; configs/train/demo-kv-control.json adds the
uncompressed demo after as many further steps. `kv_pictures` shows some of the pictures.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import plots
from demo import WEIGHTS
from demo.evaluation.prompts import KINDS, Run, Sampler, measure
from demo.workflows.kv import falling
from pixart import Pipeline, load_transformer
from pixart.kv_compress import KVCompression
from pixart.model import PixArtTransformer
from pixart.training.recipe import Recipe, load_recipe

RESULTS = Path(__file__).parent / "results"
EXACT = "uncompressed"
PARTS = {"all": (0, -1), "first half": (0, 3), "last half": (4, -1), "without ends": (1, 6)}  # of the demo's 8 blocks
TOKEN = 16  # pixels of a side
PERCENTS = ((0.0, 0.5), (0.2, 1.0), (0.5, 1.0))
EARLY = ((2, 0.3), (2, 0.7), (2, 0.85), (4, 0.3), (4, 0.5))  # ratio, and until which part of sampling
ALL = {"start_percent": 0.0, "end_percent": 1.0}  # of sampling
KEYS = {"length kept": {"keep_length": True}, "keys x 1.15": {"key_scale": 1.15}, "keys x 1.3": {"key_scale": 1.3}}
EDGES = {"edges as whole cells": {"size_bias": False}}  # differs only where the ratio doesn't divide the grid of tokens


@dataclass(frozen=True)
class Setting:
    """One way to draw: patches for the demo's transformer, or another transformer."""

    name: str
    group: str  # colour of the plot
    compression: tuple[KVCompression, ...] = ()
    transformer: PixArtTransformer | None = None


def settings(size: str = "256") -> Iterator[Setting]:
    """The grid: method, ratio and blocks in full; parts of sampling and keys at each method's ratio 2."""
    keys_of_size = KEYS | (EDGES if any(side % (2 * TOKEN) for side in sides(size)) else {})
    yield Setting(EXACT, EXACT)
    for method in ("mean", "stride"):
        for ratio in (2, 4):
            for part, (first, last) in PARTS.items():
                yield Setting(f"{method} {ratio}, {part}", f"{method} {ratio}", (KVCompression(ratio, method, first, last, **ALL),))
        for start, end in PERCENTS:
            one = KVCompression(2, method, start_percent=start, end_percent=end)
            yield Setting(f"{method} 2, {start:.0%} to {end:.0%} of sampling", f"{method}, part of sampling", (one,))
    for part in ("all", "last half"):
        for keys, values in keys_of_size.items():
            first, last = PARTS[part]
            yield Setting(f"mean 2, {part}, {keys}", "mean 2, other keys", (KVCompression(2, "mean", first, last, **ALL, **values),))
    for ratio, end in EARLY:
        one = KVCompression(ratio, "mean", end_percent=end)
        yield Setting(f"mean {ratio}, 0% to {end:.0%} of sampling", "mean, part of sampling", (one,))
    first, last = PARTS["first half"], PARTS["last half"]
    both = (KVCompression(2, "mean", *first, **ALL), KVCompression(4, "mean", *last, **ALL))
    yield Setting("mean 2 first half, mean 4 last half", "mean, mixed", both)
    longer = (KVCompression(2, "mean", *first, **ALL), KVCompression(2, "mean", *last, end_percent=0.5))
    yield Setting("mean 2, first half always, last half to 50%", "mean, mixed", longer)
    yield Setting("mean 4 to 50%, then mean 2", "mean, mixed", tuple(falling(0.5)))


def trained_settings(recipe_path: Path) -> Iterator[Setting]:
    """The model that a recipe makes: where it is compressed as it begins, and its result if there is one."""
    from pixart.training.loop import Loop

    recipe = replace(load_recipe(recipe_path), compile_blocks=False, precision="no")
    name, group = f"{EXACT}, trained further", EXACT
    if recipe.method.name == "kv":
        name, group = "conv, trained", "conv"
        begun = Loop(recipe).network.cpu().eval().requires_grad_(False)
        yield Setting("conv, not yet trained", group, transformer=begun)
    if Path(recipe.output).is_file():
        name += unfinished(recipe)
        yield Setting(name, group, transformer=load_transformer(recipe.output, variant=recipe.variant))


def unfinished(recipe: Recipe) -> str:
    """", 250 of 4700 steps" while the recipe's training is under way, else nothing."""
    with safe_open(recipe.output, "pt") as file:
        done = int((file.metadata() or {}).get("step", recipe.steps))
    return f", {done} of {recipe.steps} steps" if done < recipe.steps else ""


def sides(size: str) -> tuple[int, int]:
    """Width and height of "256" or "272x240", in pixels."""
    width, _, height = size.partition("x")
    return int(width), int(height or width)


def share_of_attention(setting: Setting, config: Any) -> float:
    """Work of self-attention beside the uncompressed model's: mean of 1 / R² over blocks and sampling."""
    saved = sum(1 - ratio**-2 for _, ratio in config.compressed_blocks)
    for one in setting.compression:
        saved += (1 - one.ratio**-2) * len(one.blocks(config.depth)) * (one.end_percent - one.start_percent)
    return 1 - saved / config.depth


def make_sampler(pipeline: Pipeline, compression: tuple[KVCompression, ...], steps: int, latents: list[Tensor]) -> Sampler:
    """As demo.evaluation.prompts's; the final latents are added to `latents`."""

    def sample(prompts: list[str], width: int, height: int, guidance: float, seeds: list[int]) -> np.ndarray:
        last: list[Tensor] = []

        def keep(_: int, __: int, found: Tensor) -> None:
            last[:] = [found]

        pictures = pipeline(
            prompts, steps=steps, guidance=guidance, width=width, height=height, use_bins=False, seed=seeds,
            output="np", progress=False, kv_compression=compression, callback=keep,
        )  # fmt: skip
        latents.append(last[0].cpu())
        return pictures

    return sample


def pipeline_of(pipeline: Pipeline, setting: Setting) -> Pipeline:
    """The pipeline, or one like it with the setting's own transformer."""
    if setting.transformer is None:
        return pipeline
    other = setting.transformer.to(pipeline.device, pipeline.dtype)
    return Pipeline(other, pipeline.text_encoder, pipeline.vae, base_size=pipeline.base_size, max_tokens=pipeline.max_tokens)


def measure_setting(pipeline: Pipeline, setting: Setting, chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Figures of one setting, and the latents of all its pictures."""
    latents: list[Tensor] = []
    run = Run(setting.name, chosen.count, *sides(chosen.size), chosen.cfg)
    sampler = make_sampler(pipeline, setting.compression, chosen.steps, latents)
    figures, entries, _ = measure(sampler, run, chosen.seed, chosen.batch)
    row = {
        "name": setting.name,
        "group": setting.group,
        "compression": [asdict(one) for one in setting.compression],
        "share_of_attention": round(share_of_attention(setting, pipeline.transformer.config), 4),
        "alignment": round(float(np.mean([figures[kind]["correct"] for kind in KINDS.values()])), 4),
        "right": "".join(str(int(entry.correct)) for entry in entries),  # picture by picture
        **{kind: figures[kind] for kind in KINDS.values()},
    }
    return row, torch.cat(latents)


def fingerprint(transformer: PixArtTransformer) -> str:
    """Of its weights and where they are compressed."""
    digest = hashlib.sha256(repr(transformer.config.compressed_blocks).encode())
    for name, weight in sorted(transformer.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def paired_difference(right: str, exact: str) -> tuple[float, float]:
    """Alignment beside the uncompressed model's on the same prompts and noise, and half of its 95 % interval."""
    each = np.array([int(a) - int(b) for a, b in zip(right, exact, strict=True)])
    return float(each.mean()), float(1.96 * each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else 1.0


def choose(known: Sequence[Setting], texts: Sequence[str]) -> list[Setting]:
    """The uncompressed setting, and those with one of the texts as their name; where none has, as a part of it."""
    names = {one.name for one in known}
    return [one for one in known if one.name == EXACT or any(one.name == t if t in names else t in one.name for t in texts)]


def run(pipeline: Pipeline, wanted: Sequence[Setting], chosen: argparse.Namespace) -> None:
    """Measures the settings that are missing; the file is written after each."""
    file = chosen.out / "kv_quality.json"
    facts = {name: getattr(chosen, name) for name in ("count", "steps", "size", "cfg", "seed", "dtype")}
    report = {"settings": facts, "machine": {"torch": torch.__version__, "device": chosen.device}, "results": {}}
    if file.is_file():
        report = json.loads(file.read_text(encoding="utf-8"))
    if report["settings"] != facts:
        sys.exit(f"{file} was measured with {report['settings']}, not {facts}; choose another folder by --out, or delete the file.")
    exact: Tensor | None = None
    for setting in wanted:
        drawing = pipeline_of(pipeline, setting)
        weights = fingerprint(drawing.transformer)
        if setting.name != EXACT and report["results"].get(setting.name, {}).get("weights") == weights:
            continue
        row, latents = measure_setting(drawing, setting, chosen)
        exact = latents if exact is None else exact  # the first setting is the uncompressed one
        row["latent_mse"] = round(float((latents - exact).square().mean()), 6)
        row["latent_error"] = round(float((latents - exact).norm() / exact.norm()), 4)
        report["results"][setting.name] = row | {"weights": weights}
        for found in report["results"].values():  # all: the uncompressed pictures may be new
            difference, half = paired_difference(found["right"], report["results"][EXACT]["right"])
            found |= {"difference": round(difference, 4), "difference_half_interval": round(half, 4)}
        chosen.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(report) + "\n", encoding="utf-8")
        print(f"{setting.name:<44} alignment {row['alignment']:.1%}  latent error {row['latent_error']:.3f}", flush=True)
    plots.quality(report, report["results"][EXACT]["alignment"], chosen.out / "kv_quality.png")


def markdown(report: dict[str, Any]) -> str:
    """One row a setting."""
    heads = ("setting", "work of self-attention", "pictures as asked", "beside uncompressed, points", "latent error")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in report["results"].values():
        points = f"{100 * row['difference']:+.1f} ± {100 * row['difference_half_interval']:.1f}"
        lines.append(
            f"| {row['name']} | {row['share_of_attention']:.0%} | {row['alignment']:.1%} | {points} | {row['latent_error']:.3f} |"
        )
    facts = report["settings"]
    lines += [
        "", f"Demo model, {2 * facts['count']} held-out prompts, {facts['size']} px, {facts['steps']} steps, cfg {facts['cfg']:g}, "
        f"{facts['dtype']}. Points: of the same prompts and noise, with the 95 % interval of the pairs. Latent error: relative distance "
        "from the uncompressed model's latent from the same noise. Compression by mean and stride is an approximation without training.",
    ]  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_quality", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="256", help="in pixels: a side, or WIDTHxHEIGHT")
    parser.add_argument("--cfg", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="settings of these names, or, where none is called so, "
                        "whose name holds the text (default: all)")
    parser.add_argument("--recipe", type=Path, help="a training recipe, of demo-kv or its control")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    pipeline = Pipeline.from_files(
        WEIGHTS["diffusion_models"], WEIGHTS["text_encoders"], WEIGHTS["vae"],
        dtype=getattr(torch, chosen.dtype), device=chosen.device, variant="demo",
    )  # fmt: skip
    wanted = [*settings(chosen.size), *(trained_settings(chosen.recipe) if chosen.recipe else ())]
    if chosen.only is not None:
        wanted = choose(wanted, chosen.only)
    run(pipeline, wanted, chosen)


if __name__ == "__main__":
    main()
