"""The plot of `benchmarks steps`: distance to the converged picture over forward passes."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import plt  # which chose a backend without a window
from benchmarks.step_ways import BASELINE


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a kind of problem: the baseline and the optimised schedule as lines, every other way as a dot."""
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    figure, panels = plt.subplots(1, max(1, len(kinds)), figsize=(6.5 * max(1, len(kinds)), 4.8), dpi=110, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        _panel(axes, [point for point in points if point["kind"] == kind and point["db"] > 0])
        axes.set(title=kind, xlabel="forward passes with guidance", ylabel="dB to the converged picture (more is nearer)")
        axes.grid(alpha=0.3)
    if kinds:
        panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _panel(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    lines = {f"{BASELINE[0]}, {BASELINE[1]}": BASELINE, f"{BASELINE[0]}, optimized": (BASELINE[0], "optimized")}
    groups = {"other solvers": "C7", "other schedules": "C2", "tricks": "C3"}
    rest = [point for point in points if (point["solver"], point["schedule"]) not in lines.values() or point["trick"]]
    for name, color in groups.items():
        found = [point for point in rest if _group(point) == name]
        axes.plot([p["passes"] for p in found], [p["db"] for p in found], "o", color=color, markersize=4, alpha=0.7, label=name)
    for (label, way), color in zip(lines.items(), ("black", "C0"), strict=True):
        found = sorted((p["passes"], p["db"]) for p in points if (p["solver"], p["schedule"]) == way and not p["trick"])
        if found:
            axes.plot(*zip(*found, strict=True), "o-", color=color, label=label)


def _group(point: dict[str, Any]) -> str:
    if point["trick"]:
        return "tricks"
    return "other solvers" if point["solver"] != BASELINE[0] else "other schedules"
