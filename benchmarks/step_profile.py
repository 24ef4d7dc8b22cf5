"""What a step with guidance spends its time on: `python -m benchmarks step_profile --px 512`, by torch.profiler.

The core's longest operations, kinds of operations beside the peers', and the share of what only the prompt decides
(projected captions, cross-attention's keys and values), which could be carried along.
"""
from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.forward import DTYPES, blocks_for, device_name, make_parser
from benchmarks.peers import CORE, TOKENS, Size, Workload, choose_host, core_model, make_peer
from benchmarks.report import machine, versions
from benchmarks.timing import keep_freed_memory, ratio, synchronize, take_turns

TOP = 12
KINDS = {  # parts of torch's names
    "matrix products": ("addmm", "aten::mm", "aten::bmm", "mkldnn_linear", "linear"), "attention": ("scaled_dot_product", "attention"),
    "GELU": ("gelu",), "norms": ("layer_norm",), "positions": ("aten::sin", "aten::cos", "interpolate", "upsample"),
    "copies and casts": ("copy_", "aten::cat", "clone"), "sums, products": ("aten::add", "aten::mul", "addcmul"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the options are those of `forward`, of which kv doesn't matter."""
    chosen = make_parser("step_profile", __doc__).parse_args(arguments)
    choose_host(chosen.attention, chosen.device)
    keep_freed_memory()
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype, "sizes": [],
    }  # fmt: skip
    for pixels in chosen.px:
        size = Size(pixels, blocks_for(pixels, chosen))
        work = Workload(size, DTYPES[chosen.dtype], chosen.device)
        step, captions = make_peer(CORE, work), caption_step(work)
        seconds = take_turns({"step": step, "captions": captions}, chosen.rounds + 1)
        share = ratio(seconds["captions"][1:], seconds["step"][1:])  # the first turn is the warm-up
        report["sizes"].append({
            "pixels": pixels, "blocks": size.blocks, "captions": share, "operations": operations(step, chosen.device),
            "kinds": kinds_of_all([CORE, *chosen.peers], work),
        })  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = f"step_profile-{chosen.device}-{chosen.dtype}"
    (chosen.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (chosen.out / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")
    print(markdown(report))


def events_of(step: Callable[[], float], device: str, shapes: bool) -> list[tuple[float, Any]]:
    """(microseconds, operation) of one step, the longest first; with shapes, each shape for itself."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, record_shapes=shapes) as found:
        step()
    # Rows of kernels would count again what the operations that launched them have.
    events = [event for event in found.key_averages(group_by_input_shape=shapes) if event.device_type == DeviceType.CPU]
    times = [event.self_device_time_total if device == "cuda" else event.self_cpu_time_total for event in events]
    return sorted(zip(times, events), key=lambda pair: -pair[0])


def kinds_of_all(names: Sequence[str], work: Workload) -> dict[str, dict[str, float]]:
    """Of each contender that can draw this size."""
    found = {}
    for name in names:
        with contextlib.suppress(ZeroDivisionError):  # the host's own PixArt, below 512 px
            found[name] = kinds(make_peer(name, work), work.device)
    return found


def kinds(step: Callable[[], float], device: str) -> dict[str, float]:
    """Milliseconds of one step by kind of operation; the step before is the warm-up."""
    step()
    found = dict.fromkeys((*KINDS, "other"), 0.0)
    for taken, event in events_of(step, device, shapes=False):
        found[next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")] += taken / 1000
    return found


def operations(step: Callable[[], float], device: str) -> list[dict[str, Any]]:
    """The operations of one step that take longest, by name and shapes, with their share of all time."""
    events = events_of(step, device, shapes=True)
    total = sum(taken for taken, _ in events)
    return [{"name": e.key, "shapes": str(e.input_shapes), "calls": e.count, "share": taken / total} for taken, e in events[:TOP]]


def caption_step(work: Workload) -> Callable[[], float]:
    """The part of a step that depends on the prompt alone."""
    model = core_model(work)
    context, _ = work.padded_captions(max(TOKENS))

    @torch.inference_mode()
    def run() -> float:
        synchronize()
        start = time.perf_counter()
        projected = model.y_embedder(context)
        for block in model.blocks:
            block.cross_attn.kv_linear(projected)
        synchronize()
        return time.perf_counter() - start

    return run


def markdown(report: dict[str, Any]) -> str:
    """A table for each size."""
    lines = []
    for size in report["sizes"]:
        lines += [f"{size['pixels']} px, {size['blocks']} blocks; what only the prompt decides: {size['captions']:.1%}.", "",
                  "| operation | shapes | calls | share |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {one['name']} | {one['shapes']} | {one['calls']} | {one['share']:.1%} |" for one in size["operations"]] + [""]
        names = list(size["kinds"])
        lines += ["| milliseconds of a step | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        lines += [f"| {kind} | " + " | ".join(f"{size['kinds'][name][kind]:.0f}" for name in names) + " |" for kind in (*KINDS, "other")]
        lines += ["| all | " + " | ".join(f"{sum(size['kinds'][name].values()):.0f}" for name in names) + " |", ""]
    facts = report["machine"]
    measured = f"{report['dtype']}, {report['device']}, {facts['cpu']}, torch {facts['torch']}, {versions(facts)}. {report['note']}"
    return "\n".join([*lines, measured.rstrip()])


if __name__ == "__main__":
    main()
