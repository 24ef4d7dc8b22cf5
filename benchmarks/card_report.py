"""What benchmarks.card found: goals and what was reached, the stages, and the tables that they wrote."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHARE, FASTER, PICTURE, LARGEST, ROOM = 0.6, 1.5, 0.12, 20.0, 8.0  # the goals of README.md
SMALL = 64  # pixels of a dry run, which no other run has
Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure of one stage's JSON with its goal, if there is one; `reached` raises LookupError where it isn't there."""

    name: str
    stage: str
    figure: Callable[[Figures], float]
    shown: str = "{:.2f}"
    goal: str = ""
    holds: Callable[[float], bool] | None = None


def _size(found: Figures, pixels: int) -> Figures:
    return next(size for size in found["sizes"] if size["pixels"] in (pixels, SMALL))


def _share(found: Figures) -> float:
    size = _size(found, 1024)
    return size["flops"] / size["seconds"]["ours"]["median"] / found["matmul_rate"]


def _graphs(found: Figures) -> float:
    return max(run["graphs"] for number, run in enumerate(found["runs"]) if number and run["model"] == found["runs"][number - 1]["model"])


def _gain(found: Figures) -> float:
    return found["runs"][0]["seconds"] / found["runs"][0]["seconds_without"]


def _text(found: Figures, precision: str, key: str) -> float:
    rows = {row["precision"]: row["found"] for row in found["results"] if row["who"] == "pixart"}
    return rows[precision][key] if key == "resident_gib" else rows[precision][key]["300"]["seconds"]


GOALS = (
    Goal("a step at 1024 px, share of the rate of matrix products", "step", _share, "{:.0%}", f">= {SHARE:.0%}", lambda x: x >= SHARE),
    Goal(
        "diffusers' time beside ours at 1024 px", "step", lambda found: 1 / _size(found, 1024)["ratio"]["diffusers"], "{:.2f} x",
        f">= {FASTER} x", lambda x: x >= FASTER,
    ),
    Goal("ours beside ComfyUI's own at 1024 px", "step", lambda found: _size(found, 1024)["ratio"]["comfyui"]),
    Goal("memory of a step at 1024 px above the weights, MiB", "step", lambda found: _size(found, 1024)["peak_mib"]["ours"], "{:.0f}"),
    *(
        Goal(
            f"four steps to the picture at 1024 px{how}, s", stage, lambda found: _size(found, 1024)["seconds"]["core"]["median"], "{:.3f}",
            f"<= {PICTURE}", lambda x: x <= PICTURE,
        )
        for stage, how in (("lcm", ""), ("lcm-compiled", ", compiled"))
    ),
    Goal(
        "4096 px in 20 steps, R = 4, s", "4096", lambda found: _size(found, 4096)["seconds"]["core 28:4"]["median"], "{:.1f}",
        f"<= {LARGEST:g}", lambda x: x <= LARGEST,
    ),
    Goal(
        "its memory with the weights, GiB", "4096", lambda found: _size(found, 4096)["peak_mib"]["core 28:4"] / 1024, "{:.2f}",
        f"<= {ROOM:g}", lambda x: x <= ROOM,
    ),
    Goal("a step at 2048 px with R = 2 in all blocks beside none", "kv-pag", lambda found: _size(found, 2048)["kv_ratio"]["28:2"]),
    Goal("a step at 1024 px with PAG beside none", "kv-pag", lambda found: _size(found, 1024)["pag_ratio"]),
    *(
        Goal(f"T5 in {precision}: {what}", "t5", lambda found, p=precision, k=key: _text(found, p, k), "{:.3f}")
        for precision in ("bf16", "fp8_e4m3fn", "int8", "nf4") for key, what in (("resident_gib", "GiB"), ("encode", "300 tokens, s"))
    ),
    Goal("TorchCompileModel: graphs made for the second size and prompt", "compiled", _graphs, "{:.0f}", "0", lambda x: x == 0),
    Goal("a step behind it beside one without", "compiled", _gain),
    Goal("its first step, s", "compiled", lambda found: found["runs"][0]["first_seconds"], "{:.0f}"),
)  # fmt: skip


def reached(goal: Goal, report: Figures) -> tuple[str, str]:
    """The figure, or why there is none; and if the goal is reached: "yes", "no", or "" without goal, figure or card."""
    stage = next((each for each in report["stages"] if each["name"] == goal.stage), None)
    if stage is None:
        return "not asked for", ""
    for found in stage["results"].values():
        try:
            value = goal.figure(found)
        except (LookupError, StopIteration, TypeError, ZeroDivisionError):
            continue
        holds = "" if goal.holds is None or report["dry_run"] else "yes" if goal.holds(value) else "no"
        return goal.shown.format(value), holds
    return f"not measured: {stage['state']}", ""


def device(report: Figures) -> str:
    """The card's name, as the first stage that ran gives it."""
    names = [found.get("device") for stage in report["stages"] for found in stage["results"].values()]
    return next((name for name in names if name not in (None, "cpu", "cuda")), "unknown card")


def markdown(report: Figures) -> str:
    """The summary, then the stages' own tables."""
    lines = [f"# {device(report)}", ""]
    if report["dry_run"]:
        lines += ["**A dry run in small on a pretended card: it shows that everything runs. No figure here means anything.**", ""]
    lines += [
        f"{report['seconds']:.0f} of at most {report['budget']} s. Written by `python -m benchmarks card`. {report['note']}".rstrip(), "",
        "| | goal | measured | reached |", "|---|---|---|---|",
    ]  # fmt: skip
    for goal in GOALS:
        lines.append(f"| {goal.name} | {goal.goal} | " + " | ".join(reached(goal, report)) + " |")
    lines += ["", "| stage | measures | seconds | limit | |", "|---|---|---|---|---|"]
    for stage in report["stages"]:
        said = f"{stage['state']}: {stage['error']}" if stage["error"] else stage["state"]
        lines.append(f"| {stage['name']} | {stage['shows']} | {stage['seconds']:.0f} | {stage['limit']} | {said.replace('|', '/')} |")
    for stage in report["stages"]:
        for name, table in stage["tables"].items():
            lines += ["", f"## {stage['name']}: {name}", "", table.replace("\n# ", "\n### ").removeprefix("# ").strip()]
    return "\n".join(lines)
