"""The report of benchmarks.full_size: one table, and the machine it was measured on."""
from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Result:
    """One row. found: what `measure` returns, or {"error": text}."""

    variant: str
    format: str
    loader: str
    file_gib: float
    found: dict[str, Any]


def machine() -> dict[str, Any]:
    """CPU, cores, memory and versions; nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "comfyui": _comfyui(),
        "diffusers": installed_version("diffusers"),
    }


def _comfyui() -> str:
    """The host's version; "absent" where there is none, or none that can be imported: some benchmarks need no host."""
    from tests.support.host import host_version

    try:
        return ".".join(map(str, host_version()))
    except (FileNotFoundError, ImportError):
        return "absent"


def installed_version(package: str) -> str:
    """Of a package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def versions(facts: dict[str, Any]) -> str:
    """Of the peers, for a table's last line."""
    return f"ComfyUI {facts['comfyui']}, diffusers {facts['diffusers']}"


def write_results(folder: Path, results: list[Result], facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """full_size.json and full_size.md."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"machine": facts, "settings": settings, "results": [asdict(result) for result in results]}
    (folder / "full_size.json").write_text(json.dumps(rounded(data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "full_size.md").write_text(markdown(results, facts, settings), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Floats to two decimals, at any depth."""
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def markdown(results: list[Result], facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """The table with what one must know to read it."""
    lines = [
        "# Full-size files in the host",
        "",
        "Random fp16 weights of the full shapes (sigma-512: 28 blocks, sigma-900m: 42), each loaded in a fresh process of ComfyUI "
        f"{facts['comfyui']} on the CPU, then one KSampler step: {settings['pixels']} px, {settings['sampler']}, cfg {settings['cfg']}, "
        f"prompts of {settings['tokens'][0]} and {settings['tokens'][1]} tokens. UNETLoader is the host's own loader, where it "
        f"opens the file. weight_dtype of PixArtModelLoader: {settings['weight_dtype']}. Written by `python -m benchmarks.full_size`.",
        "",
        "| model | format | file GiB | loader | weights: kept in, GiB | computed in | load s (CPU) | load peak GiB (private) | step s (CPU) | step peak GiB (private) |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(row, results),
        "",
        "Seconds are wall clock, in brackets the process's CPU time. Peaks are the resident memory of the process, in brackets its "
        "private part: the rest is mostly pages of the mapped file, which the system takes back when it needs the memory. Before "
        f"loading the process has {before(results)} GiB (torch and the host). On a CPU the host keeps fp16 files in fp32, so the "
        "weights are twice the file. UNETLoader runs prompts of unequal length in two forward passes, PixArtModelLoader in one of "
        "both: its step holds the activations of two.",
        "",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {facts['threads']} thread(s), nice {facts['nice']}; "
        f"Python {facts['python']}, torch {facts['torch']}, safetensors {facts['safetensors']}. {facts['note']}".rstrip(),
    ]
    return "\n".join(lines) + "\n"


def row(result: Result) -> str:
    """One line of the table; a loader's error stands in place of the figures."""
    start = f"| {result.variant} | {result.format} | {result.file_gib:.2f} | {result.loader} |"
    found = result.found
    if "error" in found:
        return f"{start} fails: {found['error'].replace('|', '/')} | | | | | |"
    stages = (
        f"{s['seconds']:.1f} ({s['cpu_seconds']:.1f}) | {s['peak_gib']:.2f} ({s['private_gib']:.2f})" for s in (found["load"], found["step"])
    )
    return f"{start} {found['kept_in']}, {found['weights_gib']:.2f} | {found['computed_in']} | {' | '.join(stages)} |"


def before(results: list[Result]) -> str:
    """Resident memory before loading, the range over all rows."""
    values = [result.found["before_gib"] for result in results if "before_gib" in result.found]
    return f"{min(values):.2f}" + (f" to {max(values):.2f}" if max(values) - min(values) >= 0.01 else "") if values else "unknown"
