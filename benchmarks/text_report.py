"""The report of benchmarks.text: a table, a plot, JSON."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import installed_version, machine


@dataclass(frozen=True)
class TextResult:
    """One row. found: what `benchmarks.text.measure` returns, or {"error": text}."""

    who: str
    precision: str
    found: dict[str, Any]


def read_text_results(folder: Path, shape: dict[str, Any], device: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found before for each (loader, precision), of this shape on this device; {} if there is nothing."""
    file = folder / "text.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if data.get("shape") != shape or data.get("machine", {}).get("device") != device:
        return {}
    return {(row["who"], row["precision"]): row["found"] for row in data["results"]}


def write_text_results(folder: Path, results: list[TextResult], shape: dict[str, Any], device: str, note: str) -> None:
    """text.json, text.md and text.png."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: installed_version(name) for name in ("transformers", "bitsandbytes", "safetensors")}
    facts = {**machine(), **versions, "device": device, "note": note}
    data = {"machine": facts, "shape": shape, "results": [asdict(result) for result in results]}
    (folder / "text.json").write_text(json.dumps(_rounded(data), indent=1) + "\n", encoding="utf-8")
    (folder / "text.md").write_text(text_markdown(results, shape, facts), encoding="utf-8")
    _plot(folder / "text.png", [result for result in results if "error" not in result.found], shape["num_layers"])


def text_markdown(results: list[TextResult], shape: dict[str, Any], facts: dict[str, Any]) -> str:
    """The table with what one must know to read it."""
    lines = [
        "# T5 at every precision",
        "",
        f"Random weights in bf16 on disk: {shape['num_layers']} layers of width {shape['d_model']} (T5-v1.1-XXL has 24 of 4096), "
        f"each case in a fresh process on {facts['device']}. `pixart` quantizes while loading, `pixart, written once` reads a folder of "
        "`python -m pixart quantize`, `transformers` is plain from_pretrained with bitsandbytes, which leaves `wo` unquantized. "
        "Written by `python -m benchmarks text`.",
        "",
        "| precision | loader | load s | load peak GiB | resident GiB | peak / resident | 20 tokens s | 300 tokens s "
        "| cosine to fp32, 20 / 300 tokens |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(result, shape["num_layers"]) for result in results),
        "",
        "Peaks are private memory above that before loading (on CUDA the card's), without pages of mapped files, which the system takes "
        "back when it needs them: a peak below the resident size means that weights stay mapped. Cosines are the lowest over all tokens, "
        "to transformers' encoder in fp32, run layer by layer.",
        "",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['threads']} thread(s); "
        f"torch {facts['torch']}, transformers {facts['transformers']}, bitsandbytes {facts['bitsandbytes']}. {facts['note']}".rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _row(result: TextResult, layers: int) -> str:
    """One line of the table; `layers`: of the whole encoder."""
    start = f"| {result.precision} | {result.who} |"
    found = result.found
    if "error" in found:
        return f"{start} fails: {found['error'].replace('|', '/')} | | | | | | |"
    load, resident = found["load"], found["resident_gib"]
    peak = load.get("device_gib", load["grown_gib"])
    seconds = [entry["seconds"] for entry in found["encode"].values()]
    cosines = " / ".join("-" if value is None else f"{value:.5f}" for value in found["cosine"].values())
    shown = " | ".join(f"{value:.2f}" for value in seconds)
    if found.get("layers", layers) < layers:
        start = f"| {result.precision}, {found['layers']} of {layers} layers | {result.who} |"
    return f"{start} {load['seconds']:.1f} | {peak:.2f} | {resident:.2f} | {peak / resident:.2f} | {shown} | {cosines} |"


def _plot(path: Path, results: list[TextResult], layers: int) -> None:
    """Bars of resident size with the load peak marked, one a case."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 0.4 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{result.precision}, {result.who}" for result in results]
    axes.barh(names, [result.found["resident_gib"] for result in results], color="#4878a8", label="resident")
    peaks = [result.found["load"].get("device_gib", result.found["load"]["grown_gib"]) for result in results]
    axes.plot(peaks, names, "|", color="#c44e52", markersize=14, label="load peak")
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB, {layers} layers")
    axes.legend()
    figure.savefig(path, dpi=120)


def _rounded(value: Any) -> Any:
    """Floats to six places, at any depth: cosines need them."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
