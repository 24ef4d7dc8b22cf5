"""From embeddings to latents beside diffusers' Σ pipeline: `python -m benchmarks pipeline --px 256,512 --steps 4`."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.forward import CPU_BLOCKS, DTYPES, cell, device_name, parse
from benchmarks.peers import CFG, CORE, DIFFUSERS, PADDED, Size, Workload, core_model, diffusers_model
from benchmarks.report import machine
from benchmarks.timing import ratio, summarise, synchronize, take_turns
from pixart import Pipeline
from pixart.text.encoder import TextEmbeddings

STEPS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the options are those of `forward` (the peer is always diffusers)."""
    chosen = parse(sys.argv[1:] if arguments is None else arguments)
    if chosen.kv:
        sys.exit("--kv is for forward and memory; leave it out here.")
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype, "cfg": CFG, "steps": STEPS,
        "rounds": chosen.rounds, "sizes": [],
    }  # fmt: skip
    for pixels in chosen.px:
        size = Size(pixels, chosen.blocks or (CPU_BLOCKS.get(pixels, 1) if chosen.device == "cpu" else 28))
        work = Workload(size, DTYPES[chosen.dtype], chosen.device)
        seconds = take_turns({CORE: _ours(work), DIFFUSERS: _theirs(work)}, chosen.rounds)
        report["sizes"].append({
            "pixels": pixels, "image_tokens": size.tokens, "blocks": size.blocks,
            "seconds": {name: summarise(times) for name, times in seconds.items()}, "ratio": ratio(seconds[CORE], seconds[DIFFUSERS]),
        })  # fmt: skip
        chosen.out.mkdir(parents=True, exist_ok=True)
        name = f"pipeline-{chosen.device}-{chosen.dtype}"
        (chosen.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (chosen.out / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")
        print(markdown(report), flush=True)


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start

    run()  # the warm-up
    return run


def _ours(work: Workload) -> Callable[[], float]:
    """pixart.Pipeline on embeddings of their own lengths."""
    pipeline = Pipeline(core_model(work), base_size=work.size.pixels)
    positive, negative = (
        TextEmbeddings(states.to(work.device, work.dtype), torch.ones(states.shape[:2], dtype=torch.bool, device=work.device))
        for states in work.captions
    )
    return _timed(lambda: pipeline(
        prompt_embeds=positive, negative_prompt_embeds=negative, steps=STEPS, guidance=CFG, width=work.size.pixels,
        height=work.size.pixels, use_bins=False, seed=0, output="latent", progress=False,
    ))  # fmt: skip


def _theirs(work: Workload) -> Callable[[], float]:
    """diffusers' PixArtSigmaPipeline on embeddings padded to 300 tokens, as its own encoding makes them."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline(None, None, None, diffusers_model(work), DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    states, mask = work.padded_captions(PADDED)
    return _timed(lambda: pipeline(
        prompt_embeds=states[:1], prompt_attention_mask=mask[:1], negative_prompt=None, negative_prompt_embeds=states[1:],
        negative_prompt_attention_mask=mask[1:], num_inference_steps=STEPS, guidance_scale=CFG, width=work.size.pixels,
        height=work.size.pixels, use_resolution_binning=False, output_type="latent",
    ))  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """A table of medians and ratios."""
    lines = ["| px | blocks | pixart.Pipeline s | diffusers s | ours / diffusers |", "|---|---|---|---|---|"]
    for size in report["sizes"]:
        cells = " | ".join(cell(size["seconds"][name]) for name in (CORE, DIFFUSERS))
        lines.append(f"| {size['pixels']} | {size['blocks']} | {cells} | {size['ratio']:.2f} |")
    facts = report["machine"]
    lines += ["", f"{report['steps']} steps with guidance {report['cfg']} from embeddings to latents, {report['dtype']}, {report['device']}; "
              f"median of {report['rounds']} turns ± half the distance of the quartiles. {facts['cpu']}, {facts['threads']} threads, "
              f"torch {facts['torch']}. {report['note']}".rstrip()]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
