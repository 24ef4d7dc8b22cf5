"""Pictures a second and peak memory of training steps beside a plain diffusers + peft loop: `python -m benchmarks train --px 512`.

Each contender trains in a process of its own. For the rate they take turns, step by step; memory is measured in fresh processes.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.forward import at_least, device_name, parse_sides
from benchmarks.peers import TOKENS, XL_BLOCKS
from benchmarks.report import machine
from benchmarks.timing import keep_freed_memory, ratio, take_turns
from benchmarks.train_peers import OURS, PLAIN, RANK, Case, make_step

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
RATE_GOAL, MEMORY_GOAL = 1.15, 0.8
WARM_UP = 2  # the first step makes the optimizer's state, the second what is freed and taken again
CHOICES = {
    "methods": ("lora", "full"), "precisions": ("bf16", "fp32"), "optimizers": ("adamw", "adamw8bit", "came", "prodigy"),
    "checkpointing": ("on", "off"), "trim": ("off", "on"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--child"]:
        serve(*arguments[1:])
        return
    chosen = parse(arguments)
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "card": chosen.device == "cuda", "tokens": TOKENS[0],
        "rank": RANK, "cases": [],
    }  # fmt: skip
    name = f"train-{chosen.device}{chosen.suffix}"
    report["cases"] = earlier_cases(chosen.out / f"{name}.json", report)
    for case in cases_of(chosen):
        add(report["cases"], case, measure(case, chosen))
        write(report, chosen.out, name)
        print(markdown(report), flush=True)


def earlier_cases(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What a report there has already, so that one table can be made in several runs; exits if it is of another machine."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if (found["machine"], found["device"]) != (report["machine"], report["device"]):
        sys.exit(f"{path} has figures of another machine, or of other versions. Move it away, or choose another --suffix.")
    return found["cases"]


def add(cases: list[dict[str, Any]], case: Case, measured: dict[str, Any]) -> None:
    """Rate or memory that was measured before stays, unless it was measured again."""
    facts = case.to_dict()
    known = next((each for each in cases if facts.items() <= each.items()), None)
    if known is None:
        cases.append(facts | measured)
    else:
        known.update(measured)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, lists split."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument("--px", type=parse_sides, default=[512], metavar="SIDE,...", help="in pixels")
    for name, known in CHOICES.items():
        default = {"precisions": ["bf16"], "optimizers": ["adamw"], "trim": ["off"]}.get(name, list(known))
        parser.add_argument(f"--{name}", type=some_of(known), default=default, metavar="NAME,...", help=f"some of {', '.join(known)}")
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--blocks", type=at_least(1), default=XL_BLOCKS, help="of the 28")
    parser.add_argument("--rounds", type=at_least(1), default=5, help=f"steps of each that count, after {WARM_UP} of warm-up")
    parser.add_argument("--apart", action="store_true", help="one contender after the other, where both together don't fit into memory")
    parser.add_argument("--only", choices=("rate", "memory"), help="measure but one of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suffix", default="", help="of the report's name, e.g. -optimizers")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def some_of(known: Sequence[str]) -> Any:
    """A list of names with commas, as an option's type."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(known)}")
        return found

    return names


def cases_of(chosen: argparse.Namespace) -> list[Case]:
    """Every combination that was asked for."""
    return [
        Case(method, precision, optimizer, pixels, chosen.batch, chosen.blocks, kept == "on", chosen.device, trim == "on")
        for pixels in chosen.px for method in chosen.methods for precision in chosen.precisions for optimizer in chosen.optimizers
        for kept in chosen.checkpointing for trim in chosen.trim
    ]  # fmt: skip


def measure(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each contender's steps, and the peak of its memory in GiB."""
    found: dict[str, Any] = {}
    if chosen.only != "memory":
        groups = [(OURS,), (PLAIN,)] if chosen.apart else [(OURS, PLAIN)]
        found["seconds"] = {name: each for group in groups for name, each in rates(case, group, chosen.rounds).items()}
    if chosen.only != "rate":
        found["gib"], found["gib_to_load"] = {}, {}
        for name in (OURS, PLAIN):
            with closing(Child(name, case, "memory")) as child:
                child.step()
                child.step()
                found["gib"][name], found["gib_to_load"][name] = child.peaks()
    return found


def rates(case: Case, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of contenders that take turns; the first turns are the warm-up."""
    with ExitStack() as stack:
        children = {name: stack.enter_context(closing(Child(name, case, "rate"))) for name in names}
        seconds = take_turns({name: child.step for name, child in children.items()}, rounds + WARM_UP)
    return {name: each[WARM_UP:] for name, each in seconds.items()}


class Child:
    """A process that trains when it is told; its answers come line by line."""

    def __init__(self, name: str, case: Case, what: str) -> None:
        command = [sys.executable, "-m", "benchmarks.train", "--child", name, json.dumps(case.to_dict()), what]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()  # it is ready

    def step(self) -> float:
        """Seconds of one update."""
        return self._ask("step")[0]

    def peaks(self) -> tuple[float, float]:
        """GiB at the peak of its steps, and of its life."""
        return tuple(self._ask("peaks"))

    def close(self) -> None:
        """It ends."""
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, word: str) -> list[float]:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[float]:
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"a contender ended with status {self.process.wait()}; its error stands above")


def serve(name: str, case: str, what: str) -> None:
    """The child's side: builds the contender, then answers "step" and "peaks"."""
    made = Case(**json.loads(case))
    if what == "rate" and not made.trimmed:  # else both have the C library's own rules, under which memory goes back
        keep_freed_memory()
    step = make_step(name, made)
    loaded = peak_bytes(made.device)
    forget_peak(made.device)
    print("answer []", flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            print(f"answer {json.dumps([step()])}", flush=True)
        else:
            now = peak_bytes(made.device)
            print(f"answer {json.dumps([now / GIB, max(now, loaded) / GIB])}", flush=True)


def peak_bytes(device: str) -> int:
    """Most memory since `forget_peak`: on a card what torch held of it, else the process's resident memory, libraries and all."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak(device: str) -> None:
    """The peak begins anew from what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def write(report: dict[str, Any], folder: Path, name: str) -> None:
    """The JSON and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """A table of cases; ratios are ours to the plain loop's."""
    lines = [
        "| method | precision | optimizer | px | batch | blocks | checkpointing | freed memory goes back | ours, pictures/s | plain | times its rate | ours, peak GiB | plain | of its peak |",
        "|" + "---|" * 14,
        *map(row, report["cases"]),
        "",
        f"Training steps on random weights of XL/2 beside a plain loop of diffusers' transformer, peft and torch's optimizer with the same "
        f"settings: LoRA of rank {report['rank']} on all attention layers, gradient clipping, no average; captions of {report['tokens']} "
        f"tokens, which the plain loop pads to 300 as diffusers' scripts do. Freed memory goes back: our recipe's trim_memory. Rate: medians of at least {least_steps(report['cases'])} steps, the "
        f"contenders in turn. Peak: {'memory of the card that torch held' if report['card'] else 'resident memory of the whole process'} "
        f"during two steps. Goals: {RATE_GOAL} times the rate, {MEMORY_GOAL} of the peak. {report['device']}, {report['machine']['cpu']}, "
        f"{report['machine']['threads']} threads, torch {report['machine']['torch']}, diffusers {report['machine']['diffusers']}. "
        f"{report['note']}".rstrip(),
    ]  # fmt: skip
    return "\n".join(lines)


def least_steps(cases: list[dict[str, Any]]) -> int:
    """Of any case's medians."""
    return min((len(seconds) for case in cases for seconds in case.get("seconds", {}).values()), default=0)


def row(case: dict[str, Any]) -> str:
    """One line; what wasn't measured is empty."""
    rates, peaks = ["", "", ""], ["", "", ""]
    if "seconds" in case:
        seconds = case["seconds"]
        medians = [case["batch"] / statistics.median(seconds[name]) for name in (OURS, PLAIN)]
        rates = [*(f"{rate:.3g}" for rate in medians), f"{1 / ratio(seconds[OURS], seconds[PLAIN]):.2f}"]
    if "gib" in case:
        ours, plain = (case["gib"][name] for name in (OURS, PLAIN))
        peaks = [f"{ours:.2f}", f"{plain:.2f}", f"{ours / plain:.2f}"]
    facts = [case[name] for name in ("method", "precision", "optimizer", "pixels", "batch", "blocks")]
    return "| " + " | ".join(map(str, [*facts, *("on" if case.get(name) else "off" for name in ("checkpointed", "trimmed")), *rates, *peaks])) + " |"


if __name__ == "__main__":
    main()
