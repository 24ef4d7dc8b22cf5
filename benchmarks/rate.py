"""How near a step comes to the machine's own rate of matrix products, and what it would take on other machines."""
from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any

import torch

from benchmarks.peers import OURS, TOKENS, XL_BLOCKS, Compressed, Workload
from benchmarks.timing import synchronize
from tests.support.card import PRETEND


def step_flops(work: Workload, compressed: Compressed | None = None, blocks: int | None = None) -> float:
    """Floating-point operations that one step with guidance needs: products of the blocks.

    blocks: of how many (default: of those that are run). Peers do more: the empty prompt's one token makes its
    cross-attention the same for all tokens of the picture.
    """
    sizes, pictures, captions = work.config, work.size.tokens, max(TOKENS)
    depth = blocks or sizes.depth
    width, mlp = sizes.hidden_size, sizes.mlp_hidden
    each = pictures * (4 * width**2 + 2 * width * mlp)  # qkv and proj, MLP
    each += 2 * width**2 * captions  # keys and values of captions
    prompt = pictures * (2 * width**2 + 2 * width * captions)  # q and proj, scores and values of cross-attention
    empty = width**2  # proj
    whole = compressed.first_block(depth) if compressed else depth  # blocks whose picture tokens attend to all others
    cells = math.ceil(work.size.pixels / 16 / compressed.ratio) ** 2 if compressed else 0
    scores = 2 * width * pictures * (whole * pictures + (depth - whole) * cells)  # scores and values of self-attention
    return 2.0 * (2 * scores + (2 * each + prompt + empty) * depth)  # a multiplication and a sum, of two predictions


def compressed_of(name: str) -> Compressed | None:
    """Of a contender's name: "ours 14:2" has it."""
    _, _, rest = name.partition(" ")
    return Compressed.parse(rest) if ":" in rest else None


def operations(work: Workload, names: list[str]) -> dict[str, dict[str, float]]:
    """Contender -> operations of one step of the blocks that are run, and of all; of ours, compressed or not."""
    counted = [name for name in names if name == OURS or compressed_of(name)]
    return {
        name: {"run": step_flops(work, compressed_of(name)), "whole": step_flops(work, compressed_of(name), XL_BLOCKS)} for name in counted
    }  # fmt: skip


def elsewhere(report: dict[str, Any]) -> list[str]:
    """The table of what whole runs would take on other machines; [] unless `cards`, their rates in TFLOP/s, were asked for."""
    cards, steps = report.get("cards", []), report.get("steps", 0)
    if not cards:
        return []
    heads = [f"{card:g} TFLOP/s: at its full rate, at the share reached here, s" for card in cards]
    lines = [
        "", f"Computed from the count of operations, not measured: {steps} steps with guidance of all {XL_BLOCKS} blocks. The share is that "
        "part of the machine's rate of matrix products which this measurement reached. Text, VAE and loading come on top.", "",
        "| px | | TFLOP | share | this machine, h | " + " | ".join(heads) + " |", "|" + "---|" * (5 + len(cards)),
    ]  # fmt: skip
    for size in report["sizes"]:
        for name, count in size.get("operations", {}).items():
            if name in size["seconds"] and count:
                lines.append(_elsewhere_row(size["pixels"], name, count, size["seconds"][name]["median"], report))
    return lines


def _elsewhere_row(pixels: int, name: str, count: dict[str, float], seconds: float, report: dict[str, Any]) -> str:
    share = count["run"] / seconds / report["matmul_rate"]
    total = count["whole"] * report["steps"]
    here = total / (share * report["matmul_rate"]) / 3600
    cells = [f"{total / card / 1e12:.1f}, {total / card / 1e12 / share:.1f}" for card in report["cards"]]
    return f"| {pixels} | {name} | {total / 1e12:,.0f} | {share:.0%} | {here:.2f} | " + " | ".join(cells) + " |"


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype, device: str, repeats: int = 7) -> float:
    """Operations per second of square matrix products, the median of some."""
    side = 64 if os.environ.get(PRETEND) else 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])  # the first is the warm-up
