"""What a run shows: a progress bar, `log.jsonl`, `loss.png`, pictures, and the trackers that the recipe names."""
from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from .recipe import Recipe, Stage
from .trackers import Trackers
from .write import replace_file


class Watch:
    """Of one run; only the first process shows anything."""

    def __init__(self, recipe: Recipe, first: int, accelerator: Accelerator) -> None:
        self.recipe, self.run_dir, self.shown = recipe, Path(recipe.run_dir), accelerator.is_main_process
        self.log = self.run_dir / "log.jsonl"
        self.begin = self.since = time.monotonic()
        self.trackers = Trackers(accelerator, recipe.to_dict())
        self.bar = tqdm(total=recipe.steps, initial=first, disable=not self.shown, desc="train", mininterval=1, dynamic_ncols=True)
        self.rows: list[dict[str, float]] = []
        self.quiet = False  # the log can't be written, which was said
        if self.shown and first:
            self.note(f"resuming at step {first}")
            self._forget_after(first)

    @property
    def seconds(self) -> float:
        """Since the run began or went on."""
        return time.monotonic() - self.begin

    def step(self, number: int, stage: Stage, values: Mapping[str, float]) -> None:
        """Notes one step, the `number`th of all."""
        self.rows.append(dict(values))
        self.bar.update()
        if number % self.recipe.log_every and number != self.recipe.steps:
            return
        counted = [row for row in self.rows if all(map(np.isfinite, row.values()))]  # the others were skipped
        means = {name: round(float(np.mean([row[name] for row in counted])), 5) for name in (counted[0] if counted else ())}
        skipped = {"skipped": len(self.rows) - len(counted)} if len(counted) < len(self.rows) else {}
        now = time.monotonic()
        rate = stage.batch_size * len(self.rows) / max(1e-9, now - self.since)
        self.rows, self.since = [], now
        self.bar.set_postfix({name.removesuffix("_loss"): f"{value:.4g}" for name, value in {**means, **skipped}.items()}, refresh=False)
        self._write({
            "step": number, "base_size": stage.base_size, **means, **skipped, "learning_rate": self.recipe.learning_rate(number - 1),
            "pictures_per_second": round(rate, 3), "seconds": round(self.seconds, 1),
        })  # fmt: skip

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Losses of held-out pictures; none are held out where there are none."""
        if losses:
            means = {f"validation_{name}": round(value, 5) for name, value in losses.items()}
            self.note(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in means.items()))
            self._write({"step": step, **means})

    def picture(self, step: int, sheet: Image.Image) -> None:
        """The contact sheet of a step, as samples/STEP.png."""
        if self.shown:
            replace_file(self.run_dir / "samples" / f"{step:08}.png", lambda path: sheet.save(path, format="PNG"))
            self.trackers.picture(step, sheet)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            tqdm.write(text)

    def plot(self) -> None:
        """`loss.png`, of all that the log has; without matplotlib there is none."""
        if not self.shown:
            return
        try:
            from .plot import plot_log
        except ImportError:
            return
        try:
            if self.log.is_file():
                plot_log(self.log, self.run_dir / "loss.png")
        except (OSError, ValueError) as error:
            self.note(f"loss.png can't be drawn ({error}); training goes on without it")

    def close(self) -> None:
        """Ends the bar, the plot and the trackers."""
        self.plot()
        self.bar.close()
        self.trackers.close()

    def _write(self, row: dict[str, Any]) -> None:
        """One line of the log. A log that can't be written is said once and ends no run."""
        self.trackers.values(row["step"], {name: value for name, value in row.items() if name != "step"})
        if not self.shown:
            return
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            if not self.quiet:
                self.note(f"{self.log} can't be written ({error}); training goes on without it")
            self.quiet = True

    def _forget_after(self, step: int) -> None:
        """Lines of steps that a killed run made after its last state; they are made again."""
        if self.log.is_file():
            kept = [line for line in self.log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            replace_file(self.log, lambda path: path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8"))


def _step_of(line: str) -> float:
    """Of a line of the log; a half-written one counts as the future's."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
