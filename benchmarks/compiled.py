"""TorchCompileModel on this pack's MODEL: `python -m benchmarks compiled --px 512,768 --kv 28:2 --pag`.

For each MODEL (plain, and with what is asked for) one run of KSampler after another, of other sizes and prompts: the graphs that
each makes, seconds of its first step, which compiles what is missing, of later ones beside those without the node, and the
difference of the latents.
"""
from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.forward import DTYPES, RESULTS, add_pag, at_least, blocks_for, contender_names, device_name, parse_kv, parse_sides
from benchmarks.peers import CFG, CORE, Size, Workload, choose_host, host_model
from benchmarks.report import machine, versions
from benchmarks.timing import synchronize

TOKENS = (60, 20)  # of prompts that take turns
GRAPHS = 64  # more than torch's own limit, past which it goes on without graphs


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    chosen = parse(arguments)
    choose_host("pytorch", chosen.device)  # the host's own choice on a CPU asks for the free memory at each call, which no graph holds
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype, "backend": chosen.backend,
        "steps": chosen.steps, "blocks": blocks_for(chosen.px[0], chosen), "runs": [],
    }  # fmt: skip
    work = Workload(Size(chosen.px[0], report["blocks"]), DTYPES[chosen.dtype], chosen.device)
    for name in contender_names(chosen):
        if name != CORE:
            measure(name, work, chosen, report)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compiled", description=__doc__)
    parser.add_argument("--px", type=parse_sides, default=[512, 768], metavar="SIDE,...", help="a square and a wider picture of each")
    parser.add_argument("--kv", type=parse_kv, default=[], metavar="BLOCKS:RATIO,...", help="also with KV compression")
    add_pag(parser)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager and aot_eager need no compiler")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--blocks", type=at_least(1), help="of the 28 (default: all; on a CPU fewer above 1024 px)")
    parser.add_argument("--steps", type=at_least(2), default=4)
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    chosen.peers = []
    return chosen


def measure(name: str, work: Workload, chosen: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds the runs of one MODEL to the report, and writes it after each."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = GRAPHS
    model = host_model(work, name)
    model.set_model_compute_dtype(work.dtype)
    node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
    fast = node.execute(model, chosen.backend).result[0]
    runs = [(side, width) for side in chosen.px for width in (side, side + side // 4 // 16 * 16)]
    for number, (height, width) in enumerate(runs):
        given = (work, height, width, TOKENS[number % len(TOKENS)], chosen.steps)
        torch._dynamo.utils.counters.clear()
        latent, seconds, peak = drawn(fast, *given)
        counters = torch._dynamo.utils.counters
        plain, without, peak_without = drawn(model, *given)
        report["runs"].append({
            "model": name, "size": f"{width}x{height}", "tokens": given[3], "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()), "first_seconds": seconds[0], "seconds": statistics.median(seconds[1:]),
            "seconds_without": statistics.median(without[1:]), "difference": float((latent - plain).norm() / plain.norm()),
            "peak_mib": peak, "peak_mib_without": peak_without,
        })  # fmt: skip
        write(report, chosen)
        print(markdown(report), flush=True)


def drawn(model: Any, work: Workload, *given: int) -> tuple[Tensor, list[float], float | None]:
    """What `draw` returns, and on a card the peak of its memory in MiB, weights included."""
    if work.device != "cuda":
        return *draw(model, work, *given), None
    torch.cuda.reset_peak_memory_stats()
    latent, seconds = draw(model, work, *given)
    return latent, seconds, torch.cuda.max_memory_allocated() / 2**20


@torch.inference_mode()  # as the host runs its nodes
def draw(model: Any, work: Workload, height: int, width: int, tokens: int, steps: int) -> tuple[Tensor, list[float]]:
    """The latent, and the seconds of each step."""
    sample = importlib.import_module("comfy.sample").sample
    side = (1, 4, height // 8, width // 8)
    noise = torch.randn(side, generator=torch.Generator().manual_seed(0))
    positive, negative = [[work.captions[0][:, :tokens], {}]], [[work.captions[1], {}]]
    marks = [time.perf_counter()]

    def after_step(*_: Any) -> None:
        synchronize()
        marks.append(time.perf_counter())

    latent = sample(
        model, noise, steps, CFG, "dpmpp_2m", "sgm_uniform", positive, negative, torch.zeros(side), callback=after_step,
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return latent.float().cpu(), [after - before for before, after in zip(marks, marks[1:], strict=False)]


def write(report: dict[str, Any], chosen: argparse.Namespace) -> None:
    """The JSON and the table."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = f"compiled-{chosen.device}-{chosen.dtype}"
    (chosen.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (chosen.out / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """A row for each run."""
    heads = ["MODEL", "size", "tokens", "new graphs", "first step s", "later steps s", "without the node s", "ratio", "difference"]
    heads += ["peak MiB", "without the node MiB"] if report["device"] != "cpu" else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for run in report["runs"]:
        broken = f" ({run['breaks']} breaks)" if run["breaks"] else ""
        times = f"{run['first_seconds']:.2f} | {run['seconds']:.3f} | {run['seconds_without']:.3f}"
        memory = f" {run['peak_mib']:.0f} | {run['peak_mib_without']:.0f} |" if report["device"] != "cpu" else ""
        lines.append(
            f"| {run['model']} | {run['size']} | {run['tokens']} | {run['graphs']}{broken} | {times} | "
            f"{run['seconds'] / run['seconds_without']:.2f} | {run['difference']:.0e} |{memory}"
        )
    facts = report["machine"]
    lines += [
        "", f"Runs of {report['steps']} steps with guidance {CFG}, one after another with the same MODEL behind TorchCompileModel "
        f"({report['backend']}), {report['blocks']} blocks, {report['dtype']}, {report['device']}; an empty negative prompt. "
        f"Difference: of the latents, relative. {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {versions(facts)}. "
        f"{report['note']}".rstrip(),
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
