"""Memory of one step with guidance beside the peers, each in a process of its own: `python -m benchmarks memory --px 512,1024`."""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import plots
from benchmarks.forward import DTYPES, add_pag, blocks_for, contender_names, device_name, make_parser
from benchmarks.peers import CFG, NATIVE, OURS, TOKENS, Size, Workload, choose_host, make_peer
from benchmarks.report import machine, versions

MIB = 2**20
EMPTY = ", empty negative"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the options are those of `forward`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--child"]:
        print(json.dumps(measure(json.loads(arguments[1]))))
        return
    parser = make_parser("memory", __doc__)
    add_pag(parser)
    chosen = parser.parse_args(arguments)
    choose_host(chosen.attention, chosen.device)
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype, "cfg": CFG,
        "attention": chosen.attention, "contenders": contenders(chosen), "sizes": [],
    }  # fmt: skip
    for pixels in chosen.px:
        blocks = blocks_for(pixels, chosen)
        found = {name: run_child(name, pixels, blocks, chosen) for name in report["contenders"]}
        report["sizes"].append({"pixels": pixels, "image_tokens": (pixels // 16) ** 2, "blocks": blocks, "mib": found})
        write(report, chosen.out, f"memory-{chosen.device}-{chosen.dtype}" + ("-kv" if chosen.kv else "") + ("-pag" if chosen.pag else ""))
        print(markdown(report), flush=True)


def contenders(chosen: argparse.Namespace) -> list[str]:
    """Those of `forward`; the two MODELs also with an empty negative prompt, which the host's own PixArt can't put into one batch."""
    names = contender_names(chosen)
    return [*names, *(name + EMPTY for name in (OURS, NATIVE) if name in names)]


def run_child(name: str, pixels: int, blocks: int, chosen: argparse.Namespace) -> float | str:
    """Peak MiB above the loaded model, or why there is none."""
    case = {"name": name, "pixels": pixels, "blocks": blocks, "dtype": chosen.dtype, "device": chosen.device}
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(case)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(case: dict[str, Any]) -> float:
    """Peak MiB that the second step allocates above what is there before it: the first also loads code and caches."""
    peer, empty, _ = case["name"].partition(EMPTY)
    tokens = TOKENS if empty else (max(TOKENS),) * 2
    work = Workload(Size(case["pixels"], case["blocks"]), DTYPES[case["dtype"]], case["device"], tokens)
    step = make_peer(peer, work)
    step()
    if case["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    return peak_allocated(step) / MIB


def peak_allocated(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds at once in a CPU's memory, by torch's own account: the system's counts what it keeps for later."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def write(report: dict[str, Any], folder: Path, name: str) -> None:
    """The JSON, the table and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")
    plots.memory(report, folder / f"{name}.png")


def markdown(report: dict[str, Any]) -> str:
    """A table of peaks."""
    names = report["contenders"]
    lines = ["| px | tokens | blocks | " + " | ".join(f"{name} MiB" for name in names) + " |", "|" + "---|" * (3 + len(names))]
    for size in report["sizes"]:
        cells = [f"{value:.0f}" if not isinstance(value, str) else "fails" for value in size["mib"].values()]
        lines.append(f"| {size['pixels']} | {size['image_tokens']} | {size['blocks']} | " + " | ".join(cells) + " |")
    for size in report["sizes"]:
        lines += [f"\n{name} fails at {size['pixels']} px: {value}." for name, value in size["mib"].items() if isinstance(value, str)]
    facts = report["machine"]
    lines += [
        "", f"Peak of what one step with guidance allocates above the loaded weights, {report['dtype']}, {report['device']}; prompts of "
        f"{max(TOKENS)} tokens each, so that all compute both predictions at once; with an empty negative prompt (one token) ComfyUI's "
        f"own PixArt computes them one by one, the others both at once. {facts['cpu']}, torch {facts['torch']}, "
        f"{versions(facts)} (attention: {report['attention']}). {report['note']}".rstrip(),
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
