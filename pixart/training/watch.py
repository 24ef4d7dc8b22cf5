"""What a run shows: a progress bar, and one line of `log.jsonl` every few steps."""
from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Watch:
    """Of one run; only the first process shows anything."""

    def __init__(self, run_dir: Path, steps: int, first: int, every: int, shown: bool) -> None:
        self.log, self.every, self.shown = run_dir / "log.jsonl", every, shown
        self.begin = time.monotonic()
        self.bar = tqdm(total=steps, initial=first, disable=not shown, desc="train", mininterval=5)
        self.rows: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """Since the run began or went on."""
        return time.monotonic() - self.begin

    def step(self, number: int, base_size: int, values: Mapping[str, float]) -> None:
        """Notes one step, the `number`th of all."""
        self.rows.append(dict(values))
        self.bar.update()
        if number % self.every:
            return
        means = {name: round(float(np.mean([row[name] for row in self.rows])), 5) for name in self.rows[0]}
        self.rows = []
        self.bar.set_postfix({name.removesuffix("_loss"): f"{value:.4g}" for name, value in means.items()})
        if self.shown:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            row = {"step": number, "base_size": base_size, **means, "seconds": round(self.seconds, 1)}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            tqdm.write(text)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
