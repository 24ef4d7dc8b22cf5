"""From embeddings to latents or pictures: `python -m benchmarks pipeline --px 256,512`.

pixart.Pipeline beside diffusers' Sigma pipeline, and KSampler with this pack's MODEL beside ComfyUI's own. Few steps with a picture at
the end: `--px 1024 --guidance 1 --decode --compile`; the largest size: `--px 4096 --steps 20 --kv 28:4 --peers ""`; the default of
PixArtKVCompress: `--kv 28:2 --kv-until 0.5`. On a card the peak of memory is measured too, weights included.
"""
from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.forward import DTYPES, at_least, blocks_for, cell, device_name, make_parser, turns
from benchmarks.graph_memory import SDXL_VAE
from benchmarks.peers import (
    CFG,
    COMPILED,
    CORE,
    DIFFUSERS,
    NATIVE,
    OURS,
    PADDED,
    PEERS,
    Compressed,
    Size,
    Workload,
    choose_host,
    core_model,
    diffusers_model,
    host_model,
)  # fmt: skip
from benchmarks.report import machine, versions
from benchmarks.timing import keep_freed_memory, ratio, summarise, synchronize, take_turns
from pixart import Pipeline
from pixart.bins import base_sizes
from pixart.kv_compress import KVCompression
from pixart.text.encoder import TextEmbeddings
from pixart.vae import Vae

STEPS = 4
SDXL_FACTOR = 0.13025  # of its latents, as its config has it


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the options of `forward`, and those of the whole run."""
    chosen = parse(arguments)
    if NATIVE in chosen.peers:  # pipelines run where there is no host
        choose_host(chosen.attention, chosen.device)
    keep_freed_memory()
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype,
        "cfg": chosen.guidance, "steps": chosen.steps, "decode": chosen.decode, "compile": chosen.compile, "rounds": chosen.rounds,
        "kv_until": chosen.kv_until, "sizes": [],
    }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(["pipeline", chosen.device, chosen.dtype, *marks(chosen)])
    for pixels in chosen.px:
        size = Size(pixels, blocks_for(pixels, chosen))
        report["sizes"].append(measure(size, chosen))
        (chosen.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (chosen.out / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")
        print(markdown(report), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits where they can't go together."""
    parser = make_parser("pipeline", __doc__)
    parser.add_argument("--steps", type=at_least(1), default=STEPS)
    parser.add_argument("--guidance", type=float, default=CFG, help="1 runs without the negative prompt, as LCM does")
    parser.add_argument("--decode", action="store_true", help="to pictures, by a random VAE of SDXL's sizes")
    parser.add_argument("--compile", action="store_true", help="our transformer under torch.compile")
    parser.add_argument("--kv-until", type=float, default=1.0, help="part of sampling in which --kv holds")
    parser.add_argument("--no-plain", action="store_true", help="leave out ours without --kv, where that would take too long")
    chosen = parser.parse_args(arguments)
    if chosen.no_plain and not chosen.kv:
        parser.error("--no-plain leaves nothing to measure; expected --kv beside it.")
    if COMPILED in chosen.peers:
        parser.error(f"--peers names {COMPILED}; expected some of {NATIVE}, {DIFFUSERS}: --compile compiles ours.")
    if not 0 < chosen.kv_until <= 1:
        parser.error(f"--kv-until is {chosen.kv_until:g}; expected more than 0, up to 1.")
    return chosen


def marks(chosen: argparse.Namespace) -> list[str]:
    """What sets a run apart from the default one, for the name of its files."""
    found = {
        f"{chosen.steps}-steps": chosen.steps != STEPS, f"cfg-{chosen.guidance:g}": chosen.guidance != CFG, "decoded": chosen.decode,
        "compiled": chosen.compile, "kv": bool(chosen.kv), f"until-{chosen.kv_until:g}": bool(chosen.kv) and chosen.kv_until != 1,
    }  # fmt: skip
    return [mark for mark, holds in found.items() if holds]


def measure(size: Size, chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every contender at one size, and on a card the peak of memory of each, alone with its weights."""
    work = Workload(size, DTYPES[chosen.dtype], chosen.device)
    vae = make_vae(work) if chosen.decode else None
    makers = contenders_of(work, vae, chosen)
    peaks, contenders, errors = {}, {}, {}

    def attempt(found: dict[str, Any], name: str, call: Callable[[], Any]) -> None:
        try:
            found[name] = call()
        except Exception as error:  # a peer that can't draw this size is a result; we must be able to
            if name not in PEERS:
                raise
            errors[name] = f"{type(error).__name__}: {error}"

    for name, make in makers.items() if chosen.device == "cuda" else ():
        attempt(peaks, name, partial(peak_of, make))
    for name, make in makers.items():
        if name not in errors:
            attempt(contenders, name, partial(_timed_run, make, name in PEERS))
    take_turns(contenders, chosen.warm_up)
    seconds = take_turns(contenders, chosen.rounds)
    return {
        "pixels": size.pixels, "image_tokens": size.tokens, "blocks": size.blocks, "errors": errors,
        "seconds": {name: summarise(times) for name, times in seconds.items()},
        "ratio": {f"{ours} / {other}": ratio(seconds[ours], seconds[other]) for ours, other in pairs(seconds)},
        "peak_mib": peaks,
    }  # fmt: skip


def contenders_of(work: Workload, vae: Vae | None, chosen: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Name -> what makes it ready. The host's two are there together or not at all."""
    makers = {} if chosen.no_plain else {CORE: partial(_ours, work, vae, chosen)}
    makers |= {f"{CORE} {kv}": partial(_ours, work, vae, chosen, kv) for kv in chosen.kv}
    makers |= {DIFFUSERS: partial(_theirs, work, vae, chosen)} if DIFFUSERS in chosen.peers else {}
    makers |= {name: partial(_in_host, work, vae, chosen, name) for name in (OURS, NATIVE) if NATIVE in chosen.peers}
    return makers


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """What is compared with what, of those that run: compressed with uncompressed, and each of ours with its peer."""
    wanted = [(name, CORE) for name in names if name.startswith(f"{CORE} ")] + [(CORE, DIFFUSERS), (OURS, NATIVE)]
    return [pair for pair in wanted if set(pair) <= set(names)]


def make_vae(work: Workload) -> Vae:
    """Random weights; in bf16 unless the transformer is fp32: SDXL's overflows in fp16."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    dtype = torch.float32 if work.dtype == torch.float32 else torch.bfloat16
    module = AutoencoderKL(**SDXL_VAE, scaling_factor=SDXL_FACTOR).to(work.device, dtype).eval().requires_grad_(False)
    return Vae(module, 1 / SDXL_FACTOR)


def peak_of(make: Callable[[], Callable[[], Any]]) -> float:
    """MiB of a card's memory that one run needs, weights included, after a first one that loads code."""
    if host := sys.modules.get("comfy.model_management"):
        host.unload_all_models()
    gc.collect()  # models hold themselves in cycles; the one before must not count
    torch.cuda.empty_cache()
    run = make()
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def _timed_run(make: Callable[[], Callable[[], Any]], prove: bool) -> Callable[[], float]:
    """What times one run; `prove` runs it once, which shows whether it can draw this size."""
    run = make()
    if prove:
        run()
    return _timed(run)


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start

    return run


def _ours(work: Workload, vae: Vae | None, chosen: argparse.Namespace, kv: Compressed | None = None) -> Callable[[], Any]:
    """pixart.Pipeline on embeddings of their own lengths."""
    model = core_model(work)
    if chosen.compile:
        model.compile(fullgraph=True)
    base = min(base_sizes(), key=lambda size: abs(size - work.size.pixels))
    pipeline = Pipeline(model, vae=vae, base_size=base)
    positive, negative = (
        TextEmbeddings(states.to(work.device, work.dtype), torch.ones(states.shape[:2], dtype=torch.bool, device=work.device))
        for states in work.captions
    )
    compression = KVCompression(kv.ratio, first_block=kv.first_block(work.size.blocks), end_percent=chosen.kv_until) if kv else ()
    return lambda: pipeline(
        prompt_embeds=positive, negative_prompt_embeds=negative, steps=chosen.steps, guidance=chosen.guidance,
        width=work.size.pixels, height=work.size.pixels, use_bins=False, seed=0, output="pt" if vae else "latent", progress=False,
        kv_compression=compression,
    )  # fmt: skip


def _theirs(work: Workload, vae: Vae | None, chosen: argparse.Namespace) -> Callable[[], Any]:
    """diffusers' PixArtSigmaPipeline on embeddings padded to 300 tokens, as its own encoding makes them."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    module = vae.module if vae else None
    pipeline = PixArtSigmaPipeline(None, None, module, diffusers_model(work), DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    states, mask = work.padded_captions(PADDED)
    return lambda: pipeline(
        prompt_embeds=states[:1], prompt_attention_mask=mask[:1], negative_prompt=None, negative_prompt_embeds=states[1:],
        negative_prompt_attention_mask=mask[1:], num_inference_steps=chosen.steps, guidance_scale=chosen.guidance,
        width=work.size.pixels, height=work.size.pixels, use_resolution_binning=False, output_type="pt" if vae else "latent",
    )  # fmt: skip


def _in_host(work: Workload, vae: Vae | None, chosen: argparse.Namespace, name: str) -> Callable[[], Any]:
    """KSampler with a MODEL of this pack's loader, or of the host's own."""
    from tests.support import host

    host.load_pack()
    sampling = importlib.import_module("comfy.sample")
    model = host_model(work, name)
    model.set_model_compute_dtype(work.dtype)  # on a CPU the host would compute all in fp32
    if chosen.compile and name == OURS:
        importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper(model, backend="inductor")
    positive, negative = ([[caption, {}]] for caption in work.captions)

    @torch.inference_mode()  # as the host runs its nodes
    def run() -> Any:
        latent = sampling.sample(
            model, work.latent, chosen.steps, chosen.guidance, "dpmpp_2m", "sgm_uniform", positive, negative, torch.zeros_like(work.latent),
            disable_pbar=True, seed=0,
        )  # fmt: skip
        return vae.decode(latent.to(work.device) / vae.factor) if vae else latent

    return run


def label(name: str) -> str:
    """A contender's name in the table: "core 28:2" is pixart.Pipeline 28:2."""
    shown = {CORE: "pixart.Pipeline", OURS: "this pack in ComfyUI", NATIVE: "ComfyUI's own"}
    first, _, compressed = name.partition(" ")
    return f"{shown.get(first, first)} {compressed}".rstrip()


def markdown(report: dict[str, Any]) -> str:
    """A table of medians and ratios, and of memory where it was measured."""
    sizes = report["sizes"]
    names = list(dict.fromkeys(name for size in sizes for name in (*size["seconds"], *size["errors"])))
    compared = list(dict.fromkeys(pair for size in sizes for pair in size["ratio"]))
    measured = list(dict.fromkeys(name for size in sizes for name in size["peak_mib"]))
    heads = [f"{label(name)} s" for name in names] + [" / ".join(map(label, pair.split(" / "))) for pair in compared]
    heads += [f"{label(name)} peak MiB" for name in measured]
    lines = ["| px | blocks | " + " | ".join(heads) + " |", "|" + "---|" * (2 + len(heads))]
    for size in sizes:
        cells = [cell(size["seconds"].get(name)) for name in names]
        cells += [f"{size['ratio'][pair]:.2f}" if pair in size["ratio"] else "" for pair in compared]
        cells += [f"{size['peak_mib'][name]:.0f}" if name in size["peak_mib"] else "" for name in measured]
        lines.append(f"| {size['pixels']} | {size['blocks']} | " + " | ".join(cells) + " |")
    lines += [f"\n{label(name)} can't draw {size['pixels']} px: {error}." for size in sizes for name, error in size["errors"].items()]
    if any(name.startswith(f"{CORE} ") for name in names):
        lines += ["", f"BLOCKS:RATIO is training-free KV compression, an approximation, in the first {report['kv_until']:.0%} of sampling."]
    facts = report["machine"]
    lines += [
        "",
        f"{report['steps']} steps with guidance {report['cfg']:g} from embeddings to {'pictures' if report['decode'] else 'latents'}, "
        f"{report['dtype']}, {report['device']}{', compiled' if report['compile'] else ''}; {turns(report['rounds'])}. "
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {versions(facts)}. {report['note']}".rstrip(),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
