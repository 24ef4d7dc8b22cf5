"""Plots of the benchmarks' reports."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.timing import exponent  # noqa: E402


def power(report: dict[str, Any], name: str) -> float | None:
    """Exponent of one peer's time per block over the tokens; None with fewer than two sizes."""
    tokens, seconds = per_block(report, name)
    return exponent(tokens, seconds) if len(tokens) > 1 else None


def per_block(report: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    """Tokens, and seconds of one block, at the sizes that the peer could draw."""
    drawn = [size for size in report["sizes"] if name in size["seconds"]]
    return [size["image_tokens"] for size in drawn], [size["seconds"][name]["median"] / size["blocks"] for size in drawn]


def time_against_tokens(report: dict[str, Any], path: Path) -> None:
    """Seconds per block over the number of tokens, both logarithmic, with the fitted power."""
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=110)
    for name in dict.fromkeys(name for size in report["sizes"] for name in size["seconds"]):
        tokens, seconds = per_block(report, name)
        fitted = power(report, name)
        axes.plot(tokens, seconds, marker="o", label=f"{name}: tokens^{fitted:.2f}" if fitted else name)
    axes.set(xscale="log", yscale="log", xlabel="picture tokens", ylabel="seconds per block and step")
    axes.set_xticks([s["image_tokens"] for s in report["sizes"]], [f"{s['image_tokens']}\n{s['pixels']} px" for s in report["sizes"]])
    axes.minorticks_off()
    axes.set_title(f"One step with guidance, {report['dtype']}, {report['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def memory(report: dict[str, Any], path: Path) -> None:
    """Peak MiB of every peer, in groups by size."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    names = list(report["sizes"][0]["mib"])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        values = [size["mib"][name] for size in report["sizes"]]
        heights = [0.0 if isinstance(value, str) else value for value in values]
        axes.bar([i + number * width for i in range(len(values))], heights, width, label=name)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(report["sizes"]))], [f"{s['pixels']} px" for s in report["sizes"]])
    axes.set(ylabel="MiB above the weights", yscale="log")
    axes.set_title(f"Peak memory of one step with guidance, {report['dtype']}, {report['device']}", fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
