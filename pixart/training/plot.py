"""`loss.png`: a run's losses over its steps."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .write import replace_file

SMOOTHED = 50  # points of the log to one of the thick line, at most


def plot_log(log: Path, out: Path) -> None:
    """One panel for each loss, with its smoothed line; losses of held-out pictures are dots in the same panel."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kinds = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in kinds if name.endswith("loss") and not name.startswith("validation_")]
    figure = Figure(figsize=(7, 2.4 * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, number + 1)
        steps, values = _series(rows, name)
        axes.plot(steps, values, linewidth=0.6, alpha=0.5)
        axes.plot(*_smoothed(steps, values), linewidth=1.6, color="C0", label="training")
        held_out = _series(rows, f"validation_{name}")
        if len(held_out[0]):
            axes.plot(*held_out, "o-", markersize=3, color="C1", label="held-out pictures")
            axes.legend(fontsize=8)
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
    if names:
        axes.set_xlabel("step")
    replace_file(out, lambda path: figure.savefig(path, format="png", dpi=100))


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring points."""
    width = min(SMOOTHED, max(1, len(steps) // 10))
    parts = max(1, len(steps) // width)
    return tuple(np.array([part.mean() for part in np.array_split(line, parts) if len(part)]) for line in (steps, values))
