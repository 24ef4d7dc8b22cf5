"""A full-size PixArt-Σ (28 blocks, random fp16 weights) loaded by the nodes in each format, and one step sampled.

`python -m tests.support.full_size` writes `benchmarks/results/full-size.json`: seconds, and peak memory of
a fresh process per format. COMFYUI_PATH chooses the host.
"""
from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pixart.checkpoints import to_diffusers
from pixart.config import get_variant
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import diffusers_config, write

FORMATS = ("pth", "safetensors", "diffusers-folder", "diffusers-shards")
PIXELS = 256  # one step on two cores in a minute
RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "full-size.json"


def random_weights() -> dict[str, torch.Tensor]:
    """fp16, under original names, small enough not to overflow."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in PixArtTransformer(get_variant("sigma-512").transformer).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {key: (torch.randn(shape, generator=generator) * 0.02).half() for key, shape in shapes.items()}


def measure(path: Path) -> dict[str, float]:
    """Loads a file and samples one guided step; run in a process of its own."""
    from tests.support import host, host_models

    host.load_pack()
    start = time.perf_counter()
    model = host_models.load_model(path, variant="sigma-512")
    loaded = time.perf_counter()
    side = PIXELS // 8
    prompts = [host_models.captions(length, width=4096) for length in (40, 1)]
    out = host_models.sample(model, *prompts, torch.zeros(1, 4, side, side), steps=1)
    end = time.perf_counter()
    if not torch.isfinite(out).all():
        raise FloatingPointError(f"{path}: the latent has NaN or infinite values")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"load_s": round(loaded - start, 1), "step_s": round(end - loaded, 1), "peak_gib": round(peak, 2),
            "dtype": str(model.model.get_dtype_inference() if hasattr(model.model, "get_dtype_inference") else model.model.get_dtype())}  # fmt: skip


def main() -> None:
    """Writes each format, measures it, removes it."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
        return
    from tests.support import host

    original = random_weights()
    diffusers = {key: value.contiguous().clone() for key, value in to_diffusers(original).items() if "y_embedding" not in key}
    config = diffusers_config(hidden=1152, depth=28, captions=4096, pixels=512)
    found = {}
    for kind in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            path = write(kind, Path(folder), config, diffusers, original)
            run = subprocess.run([sys.executable, "-m", __spec__.name, str(path)], check=True, capture_output=True, text=True)
            found[kind] = json.loads(run.stdout.strip().splitlines()[-1])
            print(kind, found[kind], flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    version = ".".join(map(str, host.host_version()))
    result = {"model": "28 blocks, 0.6B parameters, random fp16", "pixels": PIXELS, "step": "euler, cfg 4.5, prompts of 40 and 1 tokens",
              "host": version, "machine": machine, "formats": found}  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
