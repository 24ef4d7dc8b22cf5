"""Speed against quality of KV compression in one plot: `python -m benchmarks kv_tradeoff`.

Joins what `forward --kv 14:2,28:2,14:4,28:4` and `kv_quality` have written: time of a full-size step beside the uncompressed one,
and the demo's pictures with the same share of blocks compressed by the same ratio in the same part of sampling. Writes
kv_tradeoff.json, .md and .png.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.kv_quality import EXACT
from benchmarks.peers import XL_BLOCKS, Compressed
from pixart.config import get_variant
from pixart.kv_compress import KVCompression

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; 1 and a sentence where a report is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_tradeoff", description=__doc__)
    parser.add_argument("--speed", type=Path, default=RESULTS / "forward-cpu-bf16-kv.json", help="a report of forward --kv")
    parser.add_argument("--quality", type=Path, default=RESULTS / "kv_quality.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    for path, command in ((chosen.speed, "forward --kv 14:2,28:2,14:4,28:4"), (chosen.quality, "kv_quality")):
        if not path.is_file():
            sys.exit(f"{path} is missing; `python -m benchmarks {command}` writes it.")
    speed, quality = (json.loads(path.read_text(encoding="utf-8")) for path in (chosen.speed, chosen.quality))
    report = {
        "speed": {name: speed[name] for name in ("machine", "device", "dtype")}, "quality": quality["settings"],
        "points": join(speed, quality),
    }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "kv_tradeoff.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (chosen.out / "kv_tradeoff.md").write_text(markdown(report) + "\n", encoding="utf-8")
    plots.tradeoff(report, chosen.out / "kv_tradeoff.png")
    print(markdown(report))


def join(speed: dict[str, Any], quality: dict[str, Any]) -> list[dict[str, Any]]:
    """Every setting of kv_quality whose cost follows from what was timed, at every size; the uncompressed one has time 1."""
    points = []
    for size in speed["sizes"]:
        for row in quality["results"].values():
            time = time_of(row, size["kv_ratio"])
            if time is not None:
                shown = {name: row[name] for name in ("name", "group", "alignment", "latent_error")}
                default = row["compression"] == [asdict(KVCompression())]  # the node's
                points.append({"pixels": size["pixels"], "time": time, "default": default, **shown})
    return points


def time_of(row: dict[str, Any], timed: dict[str, float]) -> float | None:
    """Time of a setting's sampling beside the uncompressed one's; None where a part of it wasn't timed.

    Each block saves the same wherever it stands, and a patch for a part of sampling saves only there.
    """
    if row["name"] != EXACT and not row["compression"]:
        return None  # a model of its own
    time = 1.0
    for patch in (KVCompression(**each) for each in row["compression"]):
        ratio = timed.get(cost_of(patch))
        if ratio is None:
            return None
        time -= (1 - ratio) * (patch.end_percent - patch.start_percent)
    return round(time, 4)


def cost_of(patch: KVCompression) -> str:
    """A patch of the demo's blocks as forward names it: which blocks doesn't matter for time, only how many."""
    depth = get_variant("demo").transformer.depth
    return str(Compressed(round(len(patch.blocks(depth)) * XL_BLOCKS / depth), patch.ratio))


def markdown(report: dict[str, Any]) -> str:
    """One row a setting, one column of time a size."""
    points = report["points"]
    sizes = sorted({point["pixels"] for point in points})
    times = " | ".join(f"time at {pixels} px" for pixels in sizes)
    lines = [f"| setting | {times} | alignment | latent error |", "|" + "---|" * (3 + len(sizes))]
    for name in dict.fromkeys(point["name"] for point in points):
        found = {point["pixels"]: point for point in points if point["name"] == name}
        times = [f"{found[pixels]['time']:.2f}" if pixels in found else "" for pixels in sizes]
        one = next(iter(found.values()))
        lines.append(f"| {name} | " + " | ".join(times) + f" | {one['alignment']:.1%} | {one['latent_error']:.3f} |")
    lines += [
        "", "Time of full-size steps with guidance beside the uncompressed ones (a patch for a part of sampling: the mean over all steps); "
        "alignment score and relative distance of the latent from the uncompressed one, of the demo model at "
        f"{report['quality']['size']} px. An approximation: no weights were trained for it.",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
