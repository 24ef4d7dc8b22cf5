"""Plots of the benchmarks' reports."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.timing import exponent


def power(report: dict[str, Any], name: str) -> float | None:
    """Exponent of one peer's time per block over the tokens, of the sizes that all can draw; None with fewer than two."""
    tokens, seconds = per_block(report, name, shared_sizes(report))
    return exponent(tokens, seconds) if len(tokens) > 1 else None


def shared_sizes(report: dict[str, Any]) -> list[int]:
    """Sides in pixels that every peer could draw which draws any: exponents of different sizes don't compare."""
    names = {name for size in report["sizes"] for name in size["seconds"]}
    return [size["pixels"] for size in report["sizes"] if names <= size["seconds"].keys()]


def per_block(report: dict[str, Any], name: str, pixels: Sequence[int]) -> tuple[list[int], list[float]]:
    """Tokens, and seconds of one block, at those of the sizes that the peer could draw."""
    drawn = [size for size in report["sizes"] if name in size["seconds"] and size["pixels"] in pixels]
    return [size["image_tokens"] for size in drawn], [size["seconds"][name]["median"] / size["blocks"] for size in drawn]


def time_against_tokens(report: dict[str, Any], path: Path) -> None:
    """Seconds per block over the number of tokens, both logarithmic, with the fitted power."""
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=110)
    for name in dict.fromkeys(name for size in report["sizes"] for name in size["seconds"]):
        tokens, seconds = per_block(report, name, [size["pixels"] for size in report["sizes"]])
        fitted = power(report, name)
        axes.plot(tokens, seconds, marker="o", label=f"{name}: tokens^{fitted:.2f}" if fitted else name)
    fit = "" if len(shared_sizes(report)) == len(report["sizes"]) else "; powers of the sizes that all can draw"
    axes.set(xscale="log", yscale="log", xlabel=f"picture tokens{fit}", ylabel="seconds per block and step")
    axes.set_xticks([s["image_tokens"] for s in report["sizes"]], [f"{s['image_tokens']}\n{s['pixels']} px" for s in report["sizes"]])
    axes.minorticks_off()
    axes.set_title(f"One step with guidance, {report['dtype']}, {report['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def time_against_ratio(report: dict[str, Any], path: Path) -> None:
    """Time of a step beside the uncompressed one over R; a colour for each size, a dash for each number of compressed blocks."""
    figure, axes = plt.subplots(figsize=(8.5, 4.5), dpi=110)
    styles = dict(zip(dict.fromkeys(name.partition(":")[0] for name in report["kv"]), ("-", "--", ":", "-.") * len(report["kv"])))
    for number, size in enumerate(report["sizes"]):
        lines: dict[str, dict[int, float]] = {}
        for name, share in size["kv_ratio"].items():
            blocks, _, ratio = name.partition(":")
            lines.setdefault(blocks, {1: 1.0})[int(ratio)] = share
        for blocks, points in lines.items():
            label, values = f"{size['pixels']} px, {int(blocks) / 28:.0%} of the blocks", [points[ratio] for ratio in sorted(points)]
            axes.plot(sorted(points), values, marker="o", color=f"C{number}", linestyle=styles[blocks], label=label)
    axes.set_xticks(sorted({1, *(int(name.partition(":")[2]) for name in report["kv"])}))
    axes.set(xlabel="R (1 is uncompressed)", ylabel="time of a step / uncompressed", ylim=(0, None))
    axes.set_title(f"KV compression, one step with guidance, {report['dtype']}, {report['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def attention_errors(report: dict[str, Any], path: Path) -> None:
    """Error of attention, and of the prediction, over ranges of blocks; one line for each method and ratio."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110, constrained_layout=True)
    rows = report["results"]
    for method, ratio in dict.fromkeys((row["method"], row["ratio"]) for row in rows):
        found = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
        names = [f"{row['first_block']}-{row['last_block']}" for row in found]
        for each, kind in zip(axes, ("attention", "prediction")):
            each.plot(names, [row[kind] for row in found], "o-", label=f"{method} {ratio}")
    for each, title in zip(axes, ("error of attention", "error of the predicted noise")):
        each.set(xlabel="compressed blocks", ylabel="relative error", title=title, ylim=(0, None))
        each.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(path)
    plt.close(figure)


def quality(report: dict[str, Any], exact: float, path: Path) -> None:
    """Alignment and distance against the work that is left of self-attention; `exact` is the uncompressed model's alignment."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), dpi=110, constrained_layout=True)
    rows = list(report["results"].values())
    for number, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
        found = [row for row in rows if row["group"] == group]
        work = [100 * row["share_of_attention"] for row in found]
        marker = "osD^v*PX"[number % 8]
        axes[0].plot(work, [100 * row["alignment"] for row in found], marker, label=group)
        axes[1].plot(work, [row["latent_error"] for row in found], marker, label=group)
    axes[0].axhline(100 * exact, color="0.6", lw=0.8)
    axes[0].set(ylabel="pictures as asked, %", title="alignment")
    axes[1].set(ylabel="relative error of the latent", title="distance from the uncompressed picture")
    for each in axes:
        each.set(xlabel="work of self-attention, %")
        each.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def tradeoff(report: dict[str, Any], path: Path) -> None:
    """Alignment, and distance from the uncompressed picture, over the time of a step at the largest size; the default is ringed."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), dpi=110, constrained_layout=True)
    pixels = max(point["pixels"] for point in report["points"])
    points = [point for point in report["points"] if point["pixels"] == pixels]
    scores = ([100 * point["alignment"] for point in points], [point["latent_error"] for point in points])
    for each, values in zip(axes, scores):
        for group in dict.fromkeys(point["group"] for point in points):
            found = [(point["time"], value) for point, value in zip(points, values) if point["group"] == group]
            each.plot(*zip(*found), "o", label=group)
        default = [(point["time"], value) for point, value in zip(points, values) if point["default"]]
        if default:
            each.plot(*zip(*default), "o", markersize=14, fillstyle="none", color="black", label="the node's default")
        each.set(xlabel=f"time of full-size sampling at {pixels} px / uncompressed", xlim=(0, None), ylim=(0, None))
        each.grid(alpha=0.3)
    axes[0].set(ylabel="pictures as asked, %", title="alignment of the demo's pictures")
    axes[1].set(ylabel="relative error of the latent", title="distance from the uncompressed picture")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
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
