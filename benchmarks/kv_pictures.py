"""Pictures of the demo model with KV compression beside the uncompressed ones, from the same noise.

`python -m benchmarks kv_pictures` draws held-out prompts with some of kv_quality's settings, one row a prompt, and writes
kv_pictures.png; the frame says whether the picture is as asked. `--recipe` as for kv_quality.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.kv_quality import EXACT, RESULTS, Setting, make_sampler, pipeline_of, settings, sides, trained_settings
from demo import WEIGHTS
from demo.data.reader import check
from demo.evaluation.contact_sheet import Entry, make_contact_sheet
from demo.evaluation.prompts import KINDS, Run, draw, make_questions
from pixart import Pipeline

SHOWN = (EXACT, "mean 2, 0% to 50% of sampling", "mean 2, first half", "mean 2, last half", "mean 2, all", "stride 2, all", "mean 4, all")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_pictures", description=__doc__)
    parser.add_argument("--count", type=int, default=3, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="256", help="in pixels: a side, or WIDTHxHEIGHT")
    parser.add_argument("--settings", nargs="+", default=SHOWN, help="names of kv_quality's table")
    parser.add_argument("--recipe", type=Path, help="a training recipe, of demo-kv or its control")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    known = {one.name: one for one in settings()}
    unknown = [name for name in chosen.settings if name not in known]
    if unknown:
        parser.error(f"unknown settings {unknown}; expected some of {sorted(known)}")
    wanted = [*(known[name] for name in chosen.settings), *(trained_settings(chosen.recipe) if chosen.recipe else ())]
    weights = (WEIGHTS[kind] for kind in ("diffusion_models", "text_encoders", "vae"))
    pipeline = Pipeline.from_files(*weights, dtype=torch.float32, variant="demo")
    columns = [pictures(pipeline, one, chosen) for one in wanted]
    sheet = make_contact_sheet([entry for row in zip(*columns, strict=True) for entry in row], columns=len(columns))
    chosen.out.mkdir(parents=True, exist_ok=True)
    sheet.save(chosen.out / "kv_pictures.png", optimize=True)


def pictures(pipeline: Pipeline, setting: Setting, chosen: argparse.Namespace) -> list[Entry]:
    """One setting's pictures of the first questions that kv_quality asks; its name is the first caption."""
    run = Run(setting.name, chosen.count, *sides(chosen.size))
    sampler = make_sampler(pipeline_of(pipeline, setting), setting.compression, chosen.steps, [])
    entries = []
    for objects in KINDS:
        questions = make_questions(run, objects, 0)
        drawn = draw(sampler, questions, run, 0, len(questions))
        entries += [Entry(p, q.caption.text, check(q.scene, p, q.caption.stated).correct) for q, p in zip(questions, drawn)]
    return [replace(entries[0], prompt=setting.name), *(replace(entry, prompt="") for entry in entries[1:])]


if __name__ == "__main__":
    main()
