"""The report of benchmarks.graph_memory: a table and JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import machine, rounded

GIB = 2**30
GB = 10**9
PROMISED = {"int8": 8, "nf4": 7}  # GB, in the documentation of the released models


def write_graph_report(file: Path, found: dict[str, dict[str, Any]], settings: dict[str, Any], note: str) -> None:
    """The JSON, and the table beside it."""
    report = {"machine": machine(), "settings": settings, "note": note, "results": found}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """Stages in rows, T5's precisions in columns, and whether the promise is kept."""
    settings, facts, results = report["settings"], report["machine"], report["results"]
    measured = {name: one for name, one in results.items() if "error" not in one}
    stages = list(next(iter(measured.values()))["stages"]) if measured else []
    what = "Memory of the card that torch held" if settings["device"] == "cuda" else "Resident memory of the process"
    lines = [
        "# Memory of the whole graph",
        "",
        f"Random weights of full size: T5-XXL ({settings['layers']} of 24 layers) quantized while it loads, a prompt of 300 tokens and an "
        f"empty one; the transformer (28 blocks, {settings['dtype']}), one step with guidance at {settings['px']} px; SDXL's VAE "
        f"({settings['dtype']}). The stages run one after another in one process of ComfyUI {facts['comfyui']}, each model unloaded before "
        f"the next. {what}, peak of each stage in GiB. Written by `python -m benchmarks graph_memory`.",
        "",
        f"| stage | {' | '.join(f'T5 in {name}' for name in measured)} |",
        f"|---|{'---|' * len(measured)}",
        *(f"| {stage} | {' | '.join(f'{_peak(one, stage):.2f}' for one in measured.values())} |" for stage in stages),
        f"| **highest** | {' | '.join(_highest(name, one) for name, one in measured.items())} |",
        "",
        *(f"{name} fails: {one['error']}" for name, one in results.items() if "error" in one),
        f"Before the first stage the process has {_before(measured)} GiB of main memory (Python, torch, the host), which is part of the "
        f"figures of a CPU. Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; torch {facts['torch']}. "
        f"{report['note']}".rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _peak(one: dict[str, Any], stage: str) -> float:
    figures = one["stages"][stage]
    return figures.get("device_gib", figures["peak_gib"])


def _highest(name: str, one: dict[str, Any]) -> str:
    """In GB of 10^9 bytes too, in which the promise is made."""
    peak = max(_peak(one, stage) for stage in one["stages"])
    found = peak * GIB / GB
    promised = PROMISED.get(name)
    verdict = "" if promised is None else f", {'within' if found <= promised else 'ABOVE'} {promised} GB"
    return f"**{peak:.2f}** ({found:.2f} GB{verdict})"


def _before(measured: dict[str, dict[str, Any]]) -> str:
    return f"{max(one['before_gib'] for one in measured.values()):.2f}" if measured else "unknown"
