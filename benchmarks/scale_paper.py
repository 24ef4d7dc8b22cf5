"""Days and cards for large data sets, on paper: operations of each stage, at the share of a machine's rate that is measured here.

A card is taken to reach the share of its rate of matrix products that the same layers reach on this machine; where weights have
to be read for every word, as in writing captions, its memory's rate decides.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.peers import CORE, Size, Workload, make_peer
from benchmarks.rate import matmul_rate, step_flops
from pixart.text.settings import XXL

PICTURES, DRAWN = 33_000_000, 1_000_000  # Sigma's data set (its paper, section 3.1), and a large evaluation
PIXELS, STEPS, TOKENS, BLOCKS = 1024, 20, 200, 28  # of the estimate; tokens of a caption
MEASURED_PIXELS, MEASURED_BLOCKS, REPEATS = 256, 2, 5
SECONDS_A_DAY = 86_400
# Qwen2.5-VL-7B (its config.json): parameters that a token passes, in the language model and in the eye
LANGUAGE, EYE, PATCH, MERGED = 7.07e9, 0.63e9, 14, 28
QWEN_LAYER = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 64,
}  # fmt: skip
QUESTION, WRITTEN_TOGETHER = 60, 32  # tokens of the question; captions that share one reading of the weights
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """tflops: of bf16 without sparsity; gbs: GB/s of memory. Both as the maker says."""

    name: str
    tflops: float
    gbs: float


CARD = Card("A100 80 GB", 312, 2039)


@dataclass(frozen=True)
class Part:
    """A measured piece of a stage."""

    flops: float
    seconds: float
    share: float  # of the machine's rate of matrix products


def measure_parts(pixels: int = MEASURED_PIXELS) -> dict[str, Part]:
    """Full-width pieces of every model in bf16, on random weights."""
    from diffusers import AutoencoderKL
    from transformers import Qwen2Config, Qwen2Model, T5Config, T5EncoderModel

    rate = matmul_rate(torch.bfloat16, "cpu")
    t5 = T5EncoderModel(T5Config(**{**XXL, "num_layers": 1, "vocab_size": 64})).bfloat16().eval()
    qwen = Qwen2Model(Qwen2Config(**QWEN_LAYER)).bfloat16().eval()
    vae = AutoencoderKL(**SDXL_VAE).bfloat16().eval()
    words = torch.zeros(4, TOKENS, dtype=torch.long)
    picture = torch.zeros(1, 3, pixels, pixels, dtype=torch.bfloat16)
    latent = torch.zeros(1, 4, pixels // 8, pixels // 8, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {
        "T5": lambda: t5(words), "captions": lambda: qwen(words), "VAE encode": lambda: vae.encode(picture), "VAE decode": lambda: vae.decode(latent),
    }  # fmt: skip
    found = {name: timed(call, rate) for name, call in calls.items()}
    work = Workload(Size(pixels, MEASURED_BLOCKS), torch.bfloat16, "cpu")
    step = make_peer(CORE, work)
    step()
    seconds, flops = statistics.median(step() for _ in range(REPEATS)), step_flops(work)
    return {**found, "transformer": Part(flops, seconds, flops / seconds / rate)}


@torch.inference_mode()
def timed(call: Callable[[], Any], rate: float) -> Part:
    """The median of some runs; the first is the warm-up."""
    flops = counted(call)
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return Part(flops, median, flops / median / rate)


def counted(call: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def stage_flops(parts: dict[str, Part], pixels: int = PIXELS, steps: int = STEPS, tokens: int = TOKENS) -> dict[str, float]:
    """Operations of one item of each stage."""
    scale = (pixels / MEASURED_PIXELS) ** 2  # convolutions; the one attention of a VAE is left out
    t5_token = parts["T5"].flops / (4 * TOKENS) * XXL["num_layers"]
    seen = (pixels / MERGED) ** 2 + QUESTION
    step = step_flops(Workload(Size(pixels, BLOCKS), torch.bfloat16, "cpu"))
    return {
        "captions": 2 * LANGUAGE * (seen + tokens) + 2 * EYE * (pixels / PATCH) ** 2,
        "T5": t5_token * tokens,
        "VAE encode": parts["VAE encode"].flops * scale,
        "transformer": step * steps,
        "VAE decode": parts["VAE decode"].flops * scale,
    }


def estimate(parts: dict[str, Part], card: Card = CARD) -> dict[str, Any]:
    """Card-days and this machine's days of both jobs, by stage."""
    flops = stage_flops(parts)
    jobs = {"prepared": (PICTURES, ("captions", "T5", "VAE encode")), "drawn": (DRAWN, ("T5", "transformer", "VAE decode"))}
    found: dict[str, Any] = {"card": asdict(card), "parts": {name: asdict(part) for name, part in parts.items()}}
    for job, (count, names) in jobs.items():
        rows = [_row(name, flops[name], parts[name], count, card) for name in names]
        largest = max(rows, key=lambda row: row["card_days"])["stage"]
        found[job] = {"count": count, "stages": rows, "card_days": sum(row["card_days"] for row in rows), "largest": largest}
    return found


def _row(name: str, flops: float, part: Part, count: int, card: Card) -> dict[str, Any]:
    on_card = flops / (card.tflops * 1e12 * part.share)
    if name == "captions":  # each word reads all weights, 2 bytes each, for a batch
        on_card = max(on_card, TOKENS * 2 * LANGUAGE / (card.gbs * 1e9) / WRITTEN_TOGETHER)
    here = flops / (part.flops / part.seconds)
    return {
        "stage": name, "flops": flops, "share": part.share, "seconds_here": here, "seconds_on_card": on_card,
        "card_days": count * on_card / SECONDS_A_DAY,
    }  # fmt: skip


def paper_lines(found: dict[str, Any]) -> list[str]:
    """Tables of both jobs."""
    card = found["card"]
    lines = [
        "## On paper", "",
        f"Pictures of {PIXELS} px, captions of {TOKENS} tokens, {STEPS} steps with guidance, captions by a model of 7B; an {card['name']} "
        f"({card['tflops']:g} TFLOP/s, {card['gbs']:g} GB/s) at the share of its rate of matrix products that full-width layers reach here.",
    ]  # fmt: skip
    for job, title in (("prepared", "data set prepared"), ("drawn", "pictures drawn")):
        part = found[job]
        lines += ["", f"| {part['count']:,} {title} | TFLOP an item | share of the rate | seconds here | seconds on the card | card-days |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row['stage']} | {row['flops'] / 1e12:.2f} | {row['share']:.0%} | {row['seconds_here']:.1f} | {row['seconds_on_card']:.4f} | {row['card_days']:.1f} |"
            for row in part["stages"]
        ]
        days = part["card_days"]
        lines += ["", f"In all {days:.0f} card-days: {days / 8:.1f} days on 8 cards, {days / 64:.1f} on 64. The largest cost: {part['largest']}."]
    return lines
