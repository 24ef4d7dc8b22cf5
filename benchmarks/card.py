"""Everything that a card is needed for, in at most 8 minutes: `python -m benchmarks card`.

Each stage is one of the other benchmarks, in a process of its own with a time limit of its own. What fails or is cut off is said in the
report, and what it had measured until then is kept; the others go on. `--dry-run` tries all of it in small on a machine without a card.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.card_report import SMALL, markdown
from pixart.training.write import replace_file
from tests.support.card import PRETEND

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
BUDGET = 480  # seconds
PATIENCE = 4  # times as much of all for a dry run, since main memory and a CPU stand for the card
SHORTEST = 20  # seconds; with less left a stage isn't begun
DONE, FAILED, CUT_OFF, NOT_BEGUN = "done", "failed", "cut off", "not begun"
LAYERS = "6"  # of T5's 24: writing 9 GB of random weights would take a minute


@dataclass(frozen=True)
class Stage:
    """A benchmark and its options; `small` replaces some of them where the card is pretended. limit: seconds."""

    name: str
    shows: str
    limit: int
    options: str
    small: str

    def arguments(self, dry_run: bool, work: Path) -> list[str]:
        """Of `python -m benchmarks`; what is given twice counts as given last. work: a folder of files that stages share."""
        options = [*self.options.split(), *(self.small.split() if dry_run else ())]
        return [option.replace("WORK", str(work)) for option in options]


TINY = f"--px {SMALL} --blocks 1 --rounds 1"
STAGES = (  # the most wanted first: what is late may find no time left
    Stage(
        "step", "a step at 512 and 1024 px beside the peers, the share of the card's rate, memory", 110,
        "forward --device cuda --px 512,1024 --rounds 9 --peers comfyui,diffusers", TINY,
    ),
    Stage(
        "lcm", "four steps without guidance to the picture at 1024 px, memory with the weights", 80,
        "pipeline --device cuda --px 1024 --guidance 1 --decode --peers diffusers", TINY,
    ),
    Stage(
        "4096", "twenty steps at 4096 px with KV compression, memory with the weights", 110,
        "pipeline --device cuda --px 4096 --steps 20 --kv 28:4 --no-plain --peers= --rounds 1 --warm-up 0", f"{TINY} --steps 2",
    ),
    Stage(
        "kv-pag", "a step at 1024 and 2048 px with KV compression and with perturbed-attention guidance, memory", 80,
        "forward --device cuda --px 1024,2048 --kv 14:2,28:2,28:4 --pag --peers= --rounds 5", f"{TINY} --kv 28:2",
    ),
    Stage(
        "t5", f"{LAYERS} layers of T5-XXL in every precision: loading, memory, seconds, cosine to fp32", 130,
        f"text --device cuda --layers {LAYERS} --precision bf16 fp8_e4m3fn int8 nf4 --loader pixart --work WORK",
        "--layers 1 --width 256 --precision bf16 int8",
    ),
    Stage(
        "compiled", "TorchCompileModel over sizes, prompts and PAG: graphs, seconds", 150,
        "compiled --device cuda --px 1024 --pag", f"--device cpu --backend eager --px {SMALL} --blocks 1",
    ),
    Stage(
        "lcm-compiled", "four steps to the picture, the transformer under torch.compile", 100,
        "pipeline --device cuda --px 1024 --guidance 1 --decode --compile --peers=", f"{TINY} --device cpu --steps 1",
    ),
    Stage(
        "graph", f"peak memory of each stage of the graph at 1024 px in ComfyUI, T5 of {LAYERS} layers", 100,
        f"graph_memory --device cuda --layers {LAYERS} --precision bf16 nf4 --work WORK", f"--layers 1 --px {SMALL} --precision bf16",
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 1 if a stage brought nothing."""
    chosen = parse(arguments)
    stages = [stage for stage in STAGES if stage.name in chosen.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops it gets the report too
    report = run(stages, chosen)
    sys.exit(0 if all(stage["state"] == DONE for stage in report["stages"]) else 1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits where there is no card."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks card", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the stages")
    parser.add_argument("--budget", type=int, help=f"seconds for all of them (default: {BUDGET}, {PATIENCE} times as many in a dry run)")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on a pretended card: whether it runs, no figures")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of card.json and card.md (dry run: card-dry-run)")
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA card here; --dry-run tries it without one.")
    if chosen.budget is None:
        chosen.budget = BUDGET * (PATIENCE if chosen.dry_run else 1)
    if chosen.budget < SHORTEST:
        parser.error(f"--budget is {chosen.budget}; expected at least {SHORTEST} seconds.")
    return chosen


def run(stages: Sequence[Stage], chosen: argparse.Namespace) -> dict[str, Any]:
    """Every stage in turn; the report is written after each, also when it is stopped."""
    report: dict[str, Any] = {"dry_run": chosen.dry_run, "budget": chosen.budget, "seconds": 0.0, "note": chosen.note, "stages": []}
    stages = [replace(stage, limit=stage.limit * PATIENCE) for stage in stages] if chosen.dry_run else stages
    report["stages"] = [{**asdict(stage), "state": NOT_BEGUN, "results": {}, "tables": {}, "error": "", "seconds": 0.0} for stage in stages]
    write(report, chosen.out)  # who can't write there learns it now
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pixart-card-", ignore_cleanup_errors=True) as folder:
        for stage, entry in zip(stages, report["stages"], strict=True):
            begun = time.monotonic()
            left = chosen.budget - (begun - started)
            place = Path(folder) / stage.name
            try:
                if left >= SHORTEST:
                    entry.update(run_stage(stage, min(stage.limit, left), place, chosen.dry_run))
                else:
                    entry["error"] = f"{max(left, 0):.0f} of {chosen.budget} s were left"
            except KeyboardInterrupt:
                entry.update(state=CUT_OFF, error="stopped from outside", **collect(place))
                raise
            except OSError as error:  # no process, no disk: the next may be luckier
                entry.update(state=FAILED, error=str(error), **collect(place))
            finally:
                entry["seconds"], report["seconds"] = time.monotonic() - begun, time.monotonic() - started
                write(report, chosen.out)
            print(f"{stage.name}: {entry['state']} after {entry['seconds']:.0f} s {entry['error']}".rstrip(), flush=True)
    return report


def run_stage(stage: Stage, limit: float, place: Path, dry_run: bool) -> dict[str, Any]:
    """What became of a stage, and all it wrote, within `limit` seconds; nothing that it started runs on."""
    place.mkdir(parents=True)
    pretended = dry_run and "cpu" not in stage.small  # torch.compile doesn't know the pretended card
    environment = {**os.environ, **({PRETEND: "1"} if pretended else {})}
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(
            command(stage, place, dry_run), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
            state = DONE if process.returncode == 0 else FAILED
            error = "" if state == DONE else _last_line(place / "log", process.returncode)
        except subprocess.TimeoutExpired:
            state, error = CUT_OFF, f"not done after {limit:.0f} s"
        finally:
            _end(process)
    found = collect(place)
    if state == DONE and not found["results"]:
        state, error = FAILED, "it wrote no results"
    return {"state": state, "error": error, **found}


def command(stage: Stage, place: Path, dry_run: bool) -> list[str]:
    """What is started for a stage; it writes into `place`."""
    return [sys.executable, "-m", "benchmarks", *stage.arguments(dry_run, place.parent / "work"), "--out", str(place)]


def _end(process: subprocess.Popen) -> None:
    """The process and all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path, status: int) -> str:
    """Of what it said, which after a Python error names it."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit status {status}: {lines[-1][:300] if lines else 'it said nothing'}"


def collect(place: Path) -> dict[str, dict[str, Any]]:
    """The reports that lie in a stage's folder: {"results": name -> JSON, "tables": name -> Markdown}. Half-written ones are left out."""
    results: dict[str, Any] = {}
    for file in sorted(place.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            results[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    tables = {name: place / f"{name}.md" for name in results}
    return {"results": results, "tables": {name: file.read_text(encoding="utf-8") for name, file in tables.items() if file.is_file()}}


def write(report: dict[str, Any], folder: Path) -> None:
    """The JSON with all that the stages wrote, and the summary; each whole or as before."""
    name = "card-dry-run" if report["dry_run"] else "card"
    for ending, text in (("json", json.dumps(report, indent=1)), ("md", markdown(report))):
        replace_file(folder / f"{name}.{ending}", lambda partial, text=text: partial.write_text(text.rstrip() + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
