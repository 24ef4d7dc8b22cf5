"""Many items: rates by stage and number of workers, what Ray costs, and days and cards for a data set on paper.

`python -m benchmarks scale` measures the demo (T5, VAE, drawing) and a random vision-language model with 1 and 2 workers of one
core each, then items of a second by themselves and through Ray, then full-size layers. Workers read, compute and write as in use.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from benchmarks.scale_paper import CARD, estimate, measure_parts, paper_lines
from pixart.scale.stage import Chunk, Row, Stage, Worker, cut
from pixart.scale.where import LOCAL, RAY, TORCHRUN, Where, run

RESULTS = Path(__file__).parent / "results"
CASES = ((LOCAL, 1), (TORCHRUN, 1), (TORCHRUN, 2), (RAY, 1), (RAY, 2))
SECOND = 1.0  # of the items that Ray's overhead is measured on
LOG = "times.jsonl"
NEVER_TOGETHER = "{} workers were not at work together for long enough; give more --items."
MORE = (1, 4, 16)  # times --items, until all workers were at work together


class NeverTogether(RuntimeError):
    """One worker was done before another had begun."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what was asked for and writes scale.json and scale.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("rates", "ray", "paper"), default=["rates", "ray", "paper"])
    parser.add_argument("--items", type=int, default=64, help="of each stage and case")
    parser.add_argument("--seconds", type=int, default=30, help="items of a second, for Ray's overhead")
    parser.add_argument("--rounds", type=int, default=3, help="of each case; the median counts")
    parser.add_argument("--steps", type=int, default=20, help="of the demo's pictures")
    parser.add_argument("--card-tflops", type=float, default=CARD.tflops, help=f"of bf16, for the estimate (default: {CARD.tflops:g})")
    parser.add_argument("--card-gbs", type=float, default=CARD.gbs, help=f"GB/s of its memory (default: {CARD.gbs:g})")
    parser.add_argument("--note", default="", help="what else the reader must know of this machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    report = begun(given.out / "scale.json", {"machine": machine(), "note": given.note, "settings": {"items": given.items, "rounds": given.rounds}})
    if "rates" in given.only:
        report["rates"] = rates(given.items, given.rounds, given.steps)
    if "ray" in given.only:
        report["ray"] = ray_overhead(given.seconds, given.rounds)
    if "paper" in given.only:
        report["paper"] = estimate(measure_parts(), replace(CARD, tflops=given.card_tflops, gbs=given.card_gbs))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scale.json").write_text(json.dumps(rounded_more(report), indent=1) + "\n", encoding="utf-8")
    (given.out / "scale.md").write_text(markdown(report) + "\n", encoding="utf-8")
    print(markdown(report))


def begun(kept: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """A report with the parts that were measured on the same machine before; `--only` adds to them or replaces them."""
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if before.get("machine") != json.loads(json.dumps(rounded_more(facts["machine"]))):
        before = {}
    return {**facts, **{part: before[part] for part in ("rates", "ray", "paper") if part in before}}


class Timed:
    """A stage whose workers note when each chunk began and ended."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.chunks = stage, stage.chunks
        self.name, self.unit, self.place = stage.name, stage.unit, stage.place

    def open(self, device: str) -> Worker:
        """The stage's worker, timed."""
        return TimedWorker(self.stage.open(device), self.place / LOG)

    def failed(self, item: Any, error: str) -> Row:
        """A failure would make rates wrong."""
        raise RuntimeError(f"{item}: {error}")

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """As the stage does."""
        self.stage.publish(chunk, rows)

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """As the stage does."""
        return self.stage.is_whole(chunk, rows)


class TimedWorker:
    """Appends a line for each chunk."""

    def __init__(self, worker: Worker, log: Path) -> None:
        self.worker, self.log = worker, log

    def prepare(self, items: Sequence[Any]) -> None:
        """Not timed."""
        self.worker.prepare(items)

    def work(self, items: Sequence[Any]) -> list[Row]:
        """The worker's own work."""
        begin = time.time()
        rows = self.worker.work(items)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"worker": os.getpid(), "begin": begin, "end": time.time(), "items": len(items)}) + "\n")
        return rows


class Seconds:
    """Items that take a second each, whatever else the machine does."""

    name = unit = "seconds"

    def __init__(self, place: Path, count: int) -> None:
        self.place, self.chunks = place, cut(range(count), 1, {})

    def open(self, device: str) -> Seconds:
        """The worker is the stage."""
        return self

    def prepare(self, items: Sequence[int]) -> None:
        """There is nothing to load."""

    def work(self, items: Sequence[int]) -> list[Row]:
        """Waits."""
        time.sleep(SECOND * len(items))
        return [{"item": item} for item in items]

    def failed(self, item: int, error: str) -> Row:
        """Waiting can't fail."""
        return {"item": item, "error": error}

    def publish(self, chunk: Chunk, rows: list[Row]) -> None:
        """Nothing to do."""

    def is_whole(self, chunk: Chunk, rows: list[Row]) -> bool:
        """There are no results but the record."""
        return True


def rates(items: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Items a second of each stage and case, once every worker has its models and its first batch behind it."""
    from benchmarks.scale_stages import stages

    found = []
    makers = [stages(items * more, steps) for more in MORE]
    for name in makers[0]:
        for on, workers in CASES:
            values = [rate([maker[name] for maker in makers], on, workers) for _ in range(rounds)]
            found.append({"stage": name, "on": on, "workers": workers, "rate": statistics.median(values), "all": values})
            print(f"{name}, {on}, {workers} worker(s): {found[-1]['rate']:.2f} items a second", flush=True)
    return found


def rate(makers: Sequence[Callable[[Path], Stage]], on: str, workers: int) -> float:
    """Of one run in a folder of its own; of a longer one where a worker was done before another had begun."""
    for make in makers:
        with tempfile.TemporaryDirectory(prefix="pixart-scale-") as folder:
            stage = Timed(make(Path(folder)))
            run([stage], Where(on, workers))
            with suppress(NeverTogether):
                return steady_rate(read_log(stage.place), workers)
    raise NeverTogether(NEVER_TOGETHER.format(workers))


def read_log(place: Path) -> list[dict[str, Any]]:
    """What the workers noted."""
    return [json.loads(line) for line in (place / LOG).read_text(encoding="utf-8").splitlines()]


def steady_rate(rows: Sequence[dict[str, Any]], workers: int) -> float:
    """Items a second while all workers were at work: from the end of the last one's first chunk to the first one's last end.

    Raises NeverTogether if they never were at work together.
    """
    ends: dict[int, list[float]] = {}
    for row in rows:
        ends.setdefault(row["worker"], []).append(row["end"])
    begin, end = max(min(times) for times in ends.values()), min(max(times) for times in ends.values())
    inside = sum(row["items"] for row in rows if begin < row["end"] <= end)
    if len(ends) != workers or end <= begin or not inside:
        raise NeverTogether(NEVER_TOGETHER.format(workers))
    return inside / (end - begin)


def ray_overhead(count: int, rounds: int) -> dict[str, Any]:
    """Seconds an item of a second takes by itself and through Ray, one worker; and how long each takes to begin."""
    found: dict[str, Any] = {}
    for on in (LOCAL, RAY):
        each, start = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="pixart-scale-") as folder:
                began, stage = time.time(), Timed(Seconds(Path(folder), count))
                run([stage], Where(on, 1))
                rows = read_log(stage.place)
                each.append((rows[-1]["end"] - rows[0]["begin"]) / count)
                start.append(rows[0]["begin"] - began)
        found[on] = {"seconds_an_item": statistics.median(each), "seconds_to_begin": statistics.median(start), "all": each}
    found["overhead"] = found[RAY]["seconds_an_item"] / found[LOCAL]["seconds_an_item"] - 1
    return found


def rounded_more(value: Any) -> Any:
    """Floats to four digits that count, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded_more(item) for key, item in value.items()}
    return [rounded_more(item) for item in value] if isinstance(value, (list, tuple)) else value


def markdown(report: dict[str, Any]) -> str:
    """The report as text."""
    facts = report["machine"]
    lines = ["# Many pictures", "", "Written by `python -m benchmarks scale`."]
    if "rates" in report:
        lines += ["", "## Items a second", "", "Workers of one core each; models are loaded and the first batch is done.", ""]
        lines += rate_lines(report["rates"])
    if "ray" in report:
        local, ray, overhead = report["ray"][LOCAL], report["ray"][RAY], report["ray"]["overhead"]
        lines += ["", "## What Ray costs", "", "| items of a second, one worker | seconds an item | seconds before the first |", "|---|---|---|"]
        lines += [f"| {on} | {row['seconds_an_item']:.3f} | {row['seconds_to_begin']:.1f} |" for on, row in ((LOCAL, local), (RAY, ray))]
        lines += ["", f"Overhead of Ray: {overhead:.1%} (goal: at most 10 %)."]
    if "paper" in report:
        lines += ["", *paper_lines(report["paper"])]
    text = f"Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; Python {facts['python']}, torch {facts['torch']}."
    return "\n".join([*lines, "", f"{text} {report['note']}".rstrip()])


def rate_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One row a stage; in brackets the gain of the second worker."""
    cases = list(dict.fromkeys((row["on"], row["workers"]) for row in rows))
    value = {(row["stage"], row["on"], row["workers"]): row["rate"] for row in rows}
    lines = [f"| stage | {' | '.join(f'{on}, {workers}' for on, workers in cases)} |", "|---" * (len(cases) + 1) + "|"]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        cells = []
        for on, workers in cases:
            one = value.get((stage, on, 1))
            gain = f" ({value[stage, on, workers] / one:.2f} x)" if workers > 1 and one else ""
            cells.append(f"{value[stage, on, workers]:.2f}{gain}")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines
