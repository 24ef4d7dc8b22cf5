"""Memory of one step with guidance beside the peers, each in a process of its own: `python -m benchmarks memory --px 512,1024`."""
from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.forward import DTYPES, blocks_for, contender_names, device_name, make_parser
from benchmarks.full_size import memory as process_memory
from benchmarks.full_size import reset_peak
from benchmarks.peers import CFG, Size, Workload, choose_host, make_peer
from benchmarks.report import machine

MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the options are those of `forward`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--child"]:
        print(json.dumps(measure(json.loads(arguments[1]))))
        return
    chosen = make_parser("memory", __doc__).parse_args(arguments)
    choose_host(chosen.attention, chosen.device)
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype, "cfg": CFG,
        "attention": chosen.attention, "contenders": contender_names(chosen), "sizes": [],
    }  # fmt: skip
    for pixels in chosen.px:
        blocks = blocks_for(pixels, chosen)
        found = {name: run_child(name, pixels, blocks, chosen) for name in report["contenders"]}
        report["sizes"].append({"pixels": pixels, "image_tokens": (pixels // 16) ** 2, "blocks": blocks, "mib": found})
        write(report, chosen.out, f"memory-{chosen.device}-{chosen.dtype}" + ("-kv" if chosen.kv else ""))
        print(markdown(report), flush=True)


def run_child(name: str, pixels: int, blocks: int, chosen: argparse.Namespace) -> float | str:
    """Peak MiB above the loaded model, or why there is none."""
    case = {"name": name, "pixels": pixels, "blocks": blocks, "dtype": chosen.dtype, "device": chosen.device}
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(case)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(case: dict[str, Any]) -> float:
    """Peak MiB of the second step above what the process holds before it: the first also loads code and caches."""
    work = Workload(Size(case["pixels"], case["blocks"]), DTYPES[case["dtype"]], case["device"])
    step = make_peer(case["name"], work)
    step()
    if case["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the first step freed would hide the second's need
    before = process_memory()["rss"]
    reset_peak()
    step()
    return (process_memory()["peak"] - before) / MIB


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
        lines += [f"\n{name} fails at {size['pixels']} px: {value}" for name, value in size["mib"].items() if isinstance(value, str)]
    facts = report["machine"]
    lines += ["", f"Peak of one step with guidance above the loaded weights, {report['dtype']}, {report['device']}. {facts['cpu']}, "
              f"torch {facts['torch']}, ComfyUI {facts['comfyui']} (attention: {report['attention']}). {report['note']}".rstrip()]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
