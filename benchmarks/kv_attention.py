"""Relative error of training-free KV compression on random full-size weights, for each range of blocks.

`python -m benchmarks kv_attention --px 512` compares each block's attention, on the same tokens, and the predicted noise
when that range alone is compressed, with the uncompressed model's; it writes kv_attention.json, .md and .png.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import plots
from benchmarks.forward import DTYPES
from benchmarks.peers import TIMESTEP, XL_BLOCKS, Size, Workload, core_model
from benchmarks.report import machine
from pixart.kv_compress import METHODS, KVCompression
from pixart.model import PixArtTransformer

RESULTS = Path(__file__).parent / "results"
RANGES = (0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1), (0.5, 1), (0, 1)  # of the depth


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_attention", description=__doc__)
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--ratios", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4])
    parser.add_argument("--blocks", type=int, default=XL_BLOCKS)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16 has an error of its own, about 0.004")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    work = Workload(Size(chosen.px, chosen.blocks), DTYPES[chosen.dtype], chosen.device)
    rows = [row for method in METHODS for ratio in chosen.ratios for row in measure(work, KVCompression(ratio, method))]
    size = {"pixels": chosen.px, "image_tokens": work.size.tokens, "blocks": chosen.blocks}
    report = {"machine": machine(), **size, "dtype": chosen.dtype, "results": rows}
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "kv_attention.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (chosen.out / "kv_attention.md").write_text(markdown(report) + "\n", encoding="utf-8")
    plots.attention_errors(report, chosen.out / "kv_attention.png")
    print(markdown(report))


@torch.inference_mode()
def measure(work: Workload, compression: KVCompression) -> list[dict[str, Any]]:
    """One row a range of blocks; attention is the mean of its blocks."""
    model = core_model(work)
    inputs = (
        work.latent.to(work.device, work.dtype), torch.full((1,), float(TIMESTEP), device=work.device),
        work.captions[0].to(work.device, work.dtype),
    )  # fmt: skip
    exact, errors = attention_errors(model, inputs, compression)
    rows = []
    for first, last in block_ranges(work.size.blocks):
        patched = model(*inputs, kv_compression=[replace(compression, first_block=first, last_block=last)])
        rows.append({
            "method": compression.method, "ratio": compression.ratio, "first_block": first, "last_block": last,
            "attention": sum(errors[first : last + 1]) / (last + 1 - first), "prediction": relative_error(patched[:, :4], exact[:, :4]),
        })  # fmt: skip
    return rows


def attention_errors(model: PixArtTransformer, inputs: tuple[Tensor, ...], compression: KVCompression) -> tuple[Tensor, list[float]]:
    """The uncompressed prediction, and of each block's self-attention the error that compression makes on its very tokens."""
    errors: list[float] = []

    def compare(module: Any, given: tuple[Any, ...], exact: Tensor) -> None:
        hidden, grid = given[:2]
        errors.append(relative_error(module.forward(hidden, grid, None, compression), exact))  # forward: without this hook

    handles = [block.attn.register_forward_hook(compare) for block in model.blocks]
    try:
        return model(*inputs), errors
    finally:
        for handle in handles:
            handle.remove()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the 2-norm."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def block_ranges(depth: int) -> list[tuple[int, int]]:
    """RANGES in blocks, both ends included; those that hold no block are left out."""
    ends = [(round(start * depth), round(end * depth) - 1) for start, end in RANGES]
    return list(dict.fromkeys((first, last) for first, last in ends if first <= last))


def markdown(report: dict[str, Any]) -> str:
    """A row for each method and ratio, a column for each range: error of attention, and of the prediction."""
    rows = report["results"]
    ranges = list(dict.fromkeys((row["first_block"], row["last_block"]) for row in rows))
    lines = ["| method | R | " + " | ".join(f"blocks {first}-{last}" for first, last in ranges) + " |", "|" + "---|" * (2 + len(ranges))]
    for method, ratio in dict.fromkeys((row["method"], row["ratio"]) for row in rows):
        cells = [f"{row['attention']:.3f} / {row['prediction']:.4f}" for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
        lines.append(f"| {method} | {ratio} | " + " | ".join(cells) + " |")
    facts = report["machine"]
    lines += [
        "", "Relative error of attention (mean of the range's blocks, each on the uncompressed model's tokens) / of the predicted noise "
        f"when only this range is compressed. Random weights of the full width, {report['blocks']} blocks, {report['pixels']} px, "
        f"{report['image_tokens']} tokens, {report['dtype']}: their attention is nearly even, so trained weights may lose less or more; "
        f"kv_quality has pictures. torch {facts['torch']}.",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
