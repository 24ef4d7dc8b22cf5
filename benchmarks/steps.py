"""The best picture for a given time: `python -m benchmarks steps`.

Distance to the picture that 200 steps converge to, against forward passes, for solvers, schedules, numbers of steps, and tricks that
spare passes: on the demo's held-out prompts, and on mixtures of Gaussians with an exact denoiser. Every way is measured once and kept in
steps.json, so that a stopped run goes on; writes steps.md and steps.png too.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import step_plot
from benchmarks.report import machine
from benchmarks.step_problems import DemoPictures, Problem, Way, mixtures
from benchmarks.step_ways import BASELINE, SCHEDULES, SOLVERS, TRICKS, sigmas_of, solver
from demo import WEIGHTS
from pixart.schedules import MOST, OPTIMIZED
from tests.support import host

RESULTS = Path(__file__).parent / "results"
STEPS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20)
TRICK_STEPS = (20, 14, 10)
CONVERGED = 200
DEMO = "demo"
OF_ATTENTION = "KV"  # tricks that change nothing where there is no network


@dataclass(frozen=True)
class Case:
    """One way to sample, by its names."""

    solver: str
    schedule: str
    steps: int
    trick: str = ""

    @property
    def key(self) -> str:
        """Of the report."""
        return " / ".join(filter(None, (self.solver, self.schedule, str(self.steps), self.trick)))

    def way(self, model: Any) -> Way:
        """What the host is given; some solvers need a step of the schedule left out, as its KSampler does."""
        return Way(solver(self.solver), sigmas_of(model, self.schedule, self.steps), TRICKS.get(self.trick))


def cases(steps: Sequence[int] = STEPS) -> Iterator[Case]:
    """The baseline first; solvers on its schedule, its solver and two more on all schedules, then the tricks."""
    for count in steps:
        yield Case(*BASELINE, count)
    for name in SOLVERS[1:]:
        yield from (Case(name, BASELINE[1], count) for count in steps)
    for schedule in SCHEDULES[1:]:
        yield from (Case(BASELINE[0], schedule, count) for count in steps if schedule != OPTIMIZED or count <= MOST)
    for name in ("uni_pc", "deis"):
        yield from (Case(name, OPTIMIZED, count) for count in steps if count <= MOST)
    for trick in TRICKS:
        yield from (Case(*BASELINE, count, trick) for count in TRICK_STEPS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    chosen = parse(arguments)
    host.start_host()
    host.quiet_host()
    logging.getLogger(f"{host.PACK_NAME}").setLevel(logging.ERROR)  # the mixtures' sizes are none that a model was trained at
    demo = DemoPictures(chosen.count, chosen.seed, chosen.transformer, chosen.dtype)
    problems: list[Problem] = [*mixtures(demo.model), demo] if chosen.problem == "all" else pick(chosen, demo)
    wanted = [case for case in cases() if not chosen.only or any(re.search(text, case.key) for text in chosen.only)]
    settings = {"count": 2 * chosen.count, "seed": chosen.seed, "weights": fingerprint(chosen.transformer), "converged": CONVERGED}
    settings |= {} if chosen.dtype == "fp32" else {"dtype": chosen.dtype}
    report = open_report(chosen.out / "steps.json", settings)
    for problem in problems:
        measure(problem, wanted, report, chosen.out)
    print(markdown(report))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks steps", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="of the demo's prompts of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--transformer", type=Path, default=WEIGHTS["diffusion_models"], help="of the demo")
    dtypes = "of the demo; bf16 is faster on CPUs that have it, but its rounding is in the distances"
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help=dtypes)
    parser.add_argument("--problem", choices=("all", DEMO, "mixtures"), default="all")
    ways = "ways whose name, such as 'deis / sgm_uniform / 8', matches one of these patterns; a $ at the end leaves out tricks"
    parser.add_argument("--only", nargs="*", metavar="PATTERN", help=ways)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def pick(chosen: argparse.Namespace, demo: DemoPictures) -> list[Problem]:
    """The problems of one kind."""
    return [demo] if chosen.problem == DEMO else list(mixtures(demo.model))


def fingerprint(path: Path) -> str:
    """Of a file's content."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def open_report(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, or an empty report; exits where it was measured with other settings."""
    if not file.is_file():
        return {"settings": settings, "machine": machine(), "results": {}}
    report = json.loads(file.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        sys.exit(f"{file} was measured with {report['settings']}, not {settings}; choose another folder by --out, or delete the file.")
    return report


def measure(problem: Problem, wanted: Sequence[Case], report: dict[str, Any], out: Path) -> None:
    """Every case of a problem that the report lacks; it is written after each."""
    found = report["results"].setdefault(problem.name, {})
    missing = [case for case in wanted if case.key not in found and (problem.name == DEMO or not case.trick.startswith(OF_ATTENTION))]
    if not missing:
        return
    converged, _ = problem.solve(Case(*BASELINE, CONVERGED).way(problem.model))
    for case in tqdm(missing, desc=problem.name):
        result, passes = problem.solve(case.way(problem.model))
        figures = {name: round(value, 4) for name, value in judge(problem, result, converged).items()}
        found[case.key] = {**asdict(case), "passes": round(passes, 2), **figures}
        write(report, out)


def judge(problem: Problem, result: Tensor, converged: Tensor) -> dict[str, float]:
    """The problem's figures; a solver that diverged is infinitely far."""
    if not torch.isfinite(result).all():
        return {"db": -99.0}
    return problem.figures(result, converged)


def write(report: dict[str, Any], out: Path) -> None:
    """steps.json, .md and .png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "steps.md").write_text(markdown(report) + "\n", encoding="utf-8")
    step_plot.draw(plot_points(report), out / "steps.png")


def plain_steps(found: dict[str, dict[str, Any]], db: float) -> float | None:
    """How many steps of the baseline come as near, between its measured ones; None where it was measured too little."""
    rows = [row for row in found.values() if (row["solver"], row["schedule"], row["trick"]) == (*BASELINE, "")]
    line = sorted((row["db"], row["steps"]) for row in rows)
    if len(line) < 2:
        return None
    return float(np.interp(db, *zip(*line, strict=True)))


def plot_points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A point for every way and kind of problem: passes and mean distance."""
    points = []
    for kind, names in kinds(report).items():
        shared = set.intersection(*(set(report["results"][name]) for name in names)) if names else set()
        for key in shared:
            rows = [report["results"][name][key] for name in names]
            points.append({**rows[0], "kind": kind, "db": float(np.mean([row["db"] for row in rows]))})
    return points


def kinds(report: dict[str, Any]) -> dict[str, list[str]]:
    """Names of problems by kind."""
    names = list(report["results"])
    return {"demo": [name for name in names if name == DEMO], "mixtures": [name for name in names if name != DEMO]}


def markdown(report: dict[str, Any]) -> str:
    """One row a way, by passes; how near it comes and how many plain steps would."""
    results, by_kind = report["results"], kinds(report)
    heads = ["solver", "schedule", "steps", "trick", "passes", "demo, dB", "as plain steps", "changed visibly", "as asked", "mixtures, dB", "as plain steps"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    keys = dict.fromkeys(key for found in results.values() for key in found)
    rows = {key: next(found[key] for found in results.values() if key in found) for key in keys}
    for key, row in sorted(rows.items(), key=lambda item: (item[1]["passes"], item[0])):
        demo = results.get(DEMO, {}).get(key, {})
        mixed = [(results[name][key]["db"], plain_steps(results[name], results[name][key]["db"])) for name in by_kind["mixtures"] if key in results[name]]
        cells = [row["solver"], row["schedule"], row["steps"], row["trick"], passes_of(key, demo, results, by_kind["mixtures"])]
        cells += [shown(demo.get("db")), shown(plain_steps(results[DEMO], demo["db"]) if demo else None)]
        cells += [f"{demo[name]:.0%}" if name in demo else "" for name in ("changed", "right")]
        cells += [shown(np.mean([db for db, _ in mixed]) if mixed else None), shown(mean_of([steps for _, steps in mixed]))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    facts, exact = report["settings"], by_kind["mixtures"]
    lines += [
        "", f"Distance to {facts['converged']} steps of {BASELINE[0]} with {BASELINE[1]}; demo: median PSNR of {facts['count']} held-out "
        f"pictures at 256 px, cfg 4.5, {facts.get('dtype', 'fp32')}; changed visibly: over 1 % of the pixels by over a fifth of the "
        "range; as asked: by the demo's reader. " + ("Mixtures: mean over " + "; ".join(exact) + ". " if exact else "") + "Passes: forward passes of prompt and negative prompt "
        "together (demo; mixtures). As plain steps: how many steps of the baseline come as near. Solvers that add noise run without it.",
    ]  # fmt: skip
    return "\n".join(lines)


def passes_of(key: str, demo: dict[str, Any], results: dict[str, Any], mixtures: list[str]) -> str:
    """Of the demo, and of the mixtures where they differ: how much a cache spares depends on what it is asked."""
    mixed = [results[name][key]["passes"] for name in mixtures if key in results[name]]
    found = [*([demo["passes"]] if demo else []), *([round(float(np.mean(mixed)), 1)] if mixed else [])]
    return "; ".join(dict.fromkeys(f"{each:g}" for each in found))


def shown(value: float | None) -> str:
    """A figure of a table, or nothing."""
    return "" if value is None else f"{value:.1f}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of numbers; None if any is missing."""
    return None if not values or None in values else float(np.mean([value for value in values if value is not None]))


if __name__ == "__main__":
    main()
