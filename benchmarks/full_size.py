"""Full-size random PixArt-Sigma files, loaded by PixArtModelLoader in each format; one KSampler step each.

`python -m benchmarks.full_size` measures every case in a fresh process of the host's own modules, on the CPU
(Linux only: memory is read from /proc). COMFYUI_PATH chooses the host.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Result, machine, write_results
from pixart.checkpoints import to_diffusers
from pixart.config import get_variant
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import diffusers_config, stored_positions, write

PIXELS = 512
CFG = 4.5
TOKENS = (120, 9)  # of the prompt and the negative prompt: unequal, as in use
TIMEOUT = 600  # seconds per case
GIB = 2**30
RESULTS = Path(__file__).parent / "results"
OURS, NATIVE = "PixArtModelLoader", "UNETLoader"
FOLDER_FORMATS = ("diffusers-folder", "diffusers-shards")


@dataclass(frozen=True)
class Case:
    """One file and one loader. variant: of the zoo; format: of tests/support/checkpoint_factory.py."""

    variant: str
    format: str
    loader: str = OURS


CASES = (
    Case("sigma-512", "pth"), Case("sigma-512", "pth", NATIVE),
    Case("sigma-512", "safetensors"), Case("sigma-512", "safetensors", NATIVE),
    Case("sigma-512", "diffusers-file"), Case("sigma-512", "diffusers-file", NATIVE),
    Case("sigma-512", "diffusers-folder"),
    Case("sigma-512", "diffusers-shards"),
    Case("sigma-900m", "safetensors"), Case("sigma-900m", "safetensors", NATIVE),
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measures all cases and writes the results; or, as the child it starts, one case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of full_size.json and full_size.md")
    parser.add_argument("--dtype", default="default", help="weight_dtype of PixArtModelLoader; UNETLoader always has its default")
    parser.add_argument("--format", help="only this format")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--child", nargs=3, metavar=("MODELS", "NAME", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        models, name, case = arguments.child
        print(json.dumps(measure(Path(models), name, Case(**json.loads(case)), arguments.dtype)))
        return
    cases = [case for case in CASES if arguments.format in (None, case.format)]
    facts = {**machine(), "nice": os.nice(0), "note": arguments.note}
    settings = {"pixels": PIXELS, "cfg": CFG, "tokens": TOKENS, "sampler": "euler", "weight_dtype": arguments.dtype}
    results: list[Result] = []
    for result in run(cases, arguments.dtype):
        results.append(result)
        write_results(arguments.out, results, facts, settings)  # each time: a run that is stopped leaves what it found


def run(cases: list[Case], dtype: str) -> Iterator[Result]:
    """Writes each file once, measures every loader on it, removes it."""
    for variant, kind in dict.fromkeys((case.variant, case.format) for case in cases):
        with tempfile.TemporaryDirectory(prefix="pixart-full-size-") as folder:
            models = Path(folder)
            name = write_file(models, variant, kind)
            size = sum(file.stat().st_size for file in models.rglob("*") if file.is_file())
            for case in cases:
                if (case.variant, case.format) == (variant, kind):
                    found = run_child(models, name, case, dtype)
                    print(f"{case.variant} {case.format} {case.loader}: {found}", file=sys.stderr, flush=True)
                    yield Result(**asdict(case), file_gib=size / GIB, found=found)


def run_child(models: Path, name: str, case: Case, dtype: str) -> dict[str, Any]:
    """The figures of one case, or {"error": last line}."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--dtype", dtype, "--child", str(models), name, json.dumps(asdict(case))]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


@lru_cache(maxsize=1)
def random_weights(variant: str) -> dict[str, Tensor]:
    """fp16 under original names, the same at each call; each matrix scaled by its width, so that nothing overflows."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in PixArtTransformer(get_variant(variant).transformer).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    scales = {key: shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02 for key, shape in shapes.items()}
    return {key: torch.randn(shape, generator=generator).mul_(scales[key]).half() for key, shape in shapes.items()}


def write_file(models: Path, variant: str, kind: str) -> str:
    """Writes random weights in a format under `models`; returns the name that the loader's menu shows."""
    original = random_weights(variant)
    diffusers: dict[str, Tensor] = {}
    if kind.startswith("diffusers"):  # whose files have no y_embedding
        diffusers = {key: value.clone() for key, value in to_diffusers(original).items() if "y_embedding" not in key}
    sizes = get_variant(variant).transformer
    if kind == "pth":  # released .pth files store their positions
        rows = PIXELS // 8 // sizes.patch_size
        original = {**original, "pos_embed": stored_positions(rows, sizes.hidden_size, sizes.position_range)}
    config = diffusers_config(hidden=sizes.hidden_size, depth=sizes.depth, captions=sizes.caption_channels, pixels=PIXELS)
    path = write(kind, models / "full", config, diffusers, original)
    return "full" if kind in FOLDER_FORMATS else path.relative_to(models).as_posix()


def measure(models: Path, name: str, case: Case, dtype: str) -> dict[str, Any]:
    """Loads a model and samples one step, in this process; raises what the loader raises."""
    from tests.support import host

    host.load_pack()
    host_nodes, folder_paths = importlib.import_module("nodes"), importlib.import_module("folder_paths")
    endings = folder_paths.folder_names_and_paths["diffusion_models"][1]
    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(models)], endings)
    loader = host.pack_module("nodes.model").PixArtModelLoader
    before = memory()["rss"]
    with watched() as loading:
        if case.loader == OURS:
            model = loader.execute(name, case.variant, dtype).args[0]
        else:
            model = host_nodes.UNETLoader().load_unet(name, "default")[0]
    positive, negative = (captions(length, seed) for seed, length in enumerate(TOKENS))
    latent = {"samples": torch.zeros(1, 4, PIXELS // 8, PIXELS // 8)}
    with watched() as sampling:
        out = host_nodes.KSampler().sample(model, 1, 1, CFG, "euler", "normal", positive, negative, latent)[0]["samples"]
    if not torch.isfinite(out).all():
        raise FloatingPointError(f"{name}: the latent has NaN or infinite values")
    kept = model.model.get_dtype()
    weights = sum(p.numel() * p.element_size() for p in model.model.diffusion_model.parameters())
    return {
        "load": loading, "step": sampling, "before_gib": before / GIB, "weights_gib": weights / GIB,
        "kept_in": str(kept).removeprefix("torch."), "computed_in": str(model.model.manual_cast_dtype or kept).removeprefix("torch."),
    }  # fmt: skip


def captions(length: int, seed: int) -> list:
    """CONDITIONING of random T5 states, (1, length, 4096)."""
    return [[torch.randn(1, length, 4096, generator=torch.Generator().manual_seed(seed)), {}]]


def memory() -> dict[str, int]:
    """Bytes of this process: resident (rss), its private part, and the highest rss since `reset_peak`."""
    names = {"VmRSS": "rss", "RssAnon": "private", "VmHWM": "peak"}
    fields = (line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {names[key]: int(value.split()[0]) * 1024 for key, value in fields if key in names}


def reset_peak() -> None:
    """Sets the highest resident size to the present one."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@contextmanager
def watched(interval: float = 0.01) -> Iterator[dict[str, float]]:
    """When the block ends, fills in what it took.

    seconds, cpu_seconds (which a busy machine lengthens less), peak_gib (exact), private_gib (sampled; without file pages).
    """
    figures: dict[str, float] = {}
    done, highest = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(interval):
            highest[0] = max(highest[0], memory()["private"])

    reset_peak()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        yield figures
    finally:
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        done.set()
        thread.join()
        now = memory()
        private = max(highest[0], now["private"])
        figures.update(seconds=seconds, cpu_seconds=cpu_seconds, peak_gib=now["peak"] / GIB, private_gib=private / GIB)


if __name__ == "__main__":
    main()
