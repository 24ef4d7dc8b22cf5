"""The training curve of the demo's transformer: `python -m demo.training.curve LOG...` joins logs, keeps and plots them.

A run that goes on from the weights of another is added behind it:
`python -m demo.training.curve demo/results/training.jsonl runs/demo-continued/log.jsonl`.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .. import RESULTS

WINDOW = 8  # log rows averaged for the line


def read_log(path: Path) -> list[dict]:
    """Rows by step; a step that was repeated after a resume counts as it was the last time."""
    rows = {row["step"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    return [rows[step] for step in sorted(rows)]


def join(logs: list[list[dict]]) -> list[dict]:
    """One log of runs that follow each other; each counts its steps from where the one before ended."""
    joined: list[dict] = []
    for rows in logs:
        done = joined[-1]["step"] if joined else 0
        joined += [{**row, "step": row["step"] + done} for row in rows]
    return joined


def plot(rows: list[dict], path: Path) -> None:
    """Noise and variance loss against steps, with the stages' sizes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    steps = np.array([row["step"] for row in rows])
    for axis, name in zip(axes, ("noise_loss", "variance_loss"), strict=True):
        values = np.array([row[name] for row in rows])
        axis.semilogy(steps, values, color="0.8", lw=0.8)
        if len(values) >= WINDOW:
            smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
            axis.semilogy(steps[WINDOW - 1 :], smooth, color="tab:blue")
        for previous, row in zip(rows, rows[1:], strict=False):
            if row["base_size"] != previous["base_size"]:
                axis.axvline(row["step"], color="0.4", ls=":")
                axis.text(row["step"], axis.get_ylim()[1], f" {row['base_size']} px", va="top")
        axis.set(xlabel="step", title=name.replace("_", " "))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="*", default=[Path("runs/demo/log.jsonl")])
    rows = join([read_log(log) for log in parser.parse_args().logs])
    (RESULTS / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plot(rows, RESULTS / "training.png")


if __name__ == "__main__":
    main()
