"""Peak memory of the whole graph, stage by stage: T5 in a precision, the full-size transformer, and the VAE at 1024 px.

`python -m benchmarks graph_memory` runs the stages one after another in the host's own modules (CLIP, MODEL, VAE and its model
management), each unloaded before the next as on a card too small for two, in one process for each precision of T5. It writes
results/graph_memory-{cpu,cuda}.{json,md} after each; run again, it measures what is missing. On a CPU the resident memory of the
process is read from /proc (Linux); with --device cuda the card's.
"""
from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.forward import DTYPES
from benchmarks.full_size import memory, watched, write_file
from benchmarks.graph_report import GIB, write_graph_report
from benchmarks.text import workplace
from benchmarks.xxl import XXL, sizes, write_weights
from pixart.text.names import PRECISIONS
from tests.support.host import AS_HOST, CUDA

RESULTS = Path(__file__).parent / "results"
VARIANT, CFG = "sigma-1024", 4.5
TOKENS = 300
TIMEOUT = 3600  # seconds per precision
SDXL_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TILE = 512  # pixels, VAEDecodeTiled's default


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the precisions that have no result yet; or, as the child it starts, one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks graph_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=("bf16", *PRECISIONS), default=["int8", "nf4"], help="of T5")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="in which transformer and VAE are kept and compute")
    parser.add_argument("--px", type=int, default=1024, help="side of the picture")
    parser.add_argument("--layers", type=int, default=XXL["num_layers"], help="of T5; fewer for trying it out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, help="folder that keeps the random files, 11 GB (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        print(json.dumps(measure(chosen.work, chosen.child, chosen)))
        return
    file = chosen.out / f"graph_memory-{chosen.device}.json"
    settings = {name: getattr(chosen, name) for name in ("dtype", "px", "layers", "device")}
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not chosen.again else {}
    found = {name: one for name, one in old.get("results", {}).items() if "error" not in one and old["settings"] == settings}
    with workplace(chosen.work) as place:
        for precision in chosen.precision:
            if precision not in found:
                write_files(place, chosen.layers)
                found[precision] = run_child(place, precision, chosen)
                print(f"{precision}: {found[precision]}", file=sys.stderr, flush=True)
                write_graph_report(file, found, settings, chosen.note)


def write_files(place: Path, layers: int) -> None:
    """Random T5, transformer and VAE of full size, where they aren't there yet."""
    write_weights(t5_folder(place, layers), sizes(layers, XXL["d_model"]))
    if not transformer_file(place).is_file():
        name = write_file(place / "writing", VARIANT, "safetensors")
        (place / "writing" / name).replace(transformer_file(place))
    if not vae_file(place).is_file():
        from diffusers import AutoencoderKL

        weights = {key: value.half().contiguous() for key, value in AutoencoderKL(**SDXL_VAE).state_dict().items()}
        save_file(weights, place / "vae.part")
        (place / "vae.part").replace(vae_file(place))


def t5_folder(place: Path, layers: int) -> Path:
    """Where `benchmarks text` keeps it too."""
    return place / f"{layers}x{XXL['d_model']}" / "bf16"


def transformer_file(place: Path) -> Path:
    return place / f"{VARIANT}.safetensors"


def vae_file(place: Path) -> Path:
    return place / "sdxl-vae.safetensors"


def run_child(place: Path, precision: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """What `measure` returns in a process of its own, or {"error": last line}."""
    options = [f"--{name}={getattr(chosen, name)}" for name in ("dtype", "px", "layers", "device")]
    command = [sys.executable, "-m", "benchmarks", "graph_memory", "--child", precision, f"--work={place}", *options]
    environment = {**os.environ, CUDA: AS_HOST if chosen.device == "cuda" else ""}
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


@torch.inference_mode()  # as the host runs its nodes: without it activations would be kept for gradients
def measure(place: Path, precision: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Peaks of every stage in this process; what a stage made is all that the next one gets."""
    from tests.support import host

    host.load_pack()
    unload()  # else what this process has done with already would count as held, until the first unloading
    before = memory()["rss"] / GIB
    stages: dict[str, dict[str, float]] = {}
    prompts = encode(t5_folder(place, chosen.layers), precision, stages)
    unload()
    latent = sample(transformer_file(place), *prompts, chosen, stages)
    unload()
    decode(vae_file(place), latent, chosen.dtype, stages)
    return {"before_gib": before, "stages": stages}


def encode(path: Path, precision: str, stages: dict[str, dict[str, float]]) -> tuple[list, list]:
    """CONDITIONING of a prompt of all tokens, and of none."""
    from tests.support import host

    with stage("T5: load", stages):
        clip = host.pack_module("nodes.host.text_encoder").load_t5(str(path), precision, "default")
    with stage("T5: encode", stages):
        encoder = host.pack_module("nodes.text").PixArtTextEncode
        positive, negative = (encoder.execute(clip, text, str(TOKENS)).result[0] for text in ("circle " * TOKENS, ""))
    return positive, negative


def sample(path: Path, positive: list, negative: list, chosen: argparse.Namespace, stages: dict[str, dict[str, float]]) -> dict[str, Any]:
    """LATENT after one step with guidance."""
    from tests.support import host

    with stage("transformer: load", stages):
        model = host.pack_module("nodes.host.loader").load_model(str(path), VARIANT, chosen.dtype)
        model.set_model_compute_dtype(DTYPES[chosen.dtype])  # on a CPU the host would compute in fp32
    empty = {"samples": torch.zeros(1, 4, chosen.px // 8, chosen.px // 8)}
    with stage("transformer: one step", stages):
        return importlib.import_module("nodes").KSampler().sample(model, 1, 1, CFG, "euler", "simple", positive, negative, empty)[0]


def decode(path: Path, latent: dict[str, Any], dtype: str, stages: dict[str, dict[str, float]]) -> None:
    """The picture, whole and in tiles."""
    sd, utils, nodes = (importlib.import_module(name) for name in ("comfy.sd", "comfy.utils", "nodes"))
    with stage("VAE: load", stages):
        vae = sd.VAE(sd=utils.load_torch_file(str(path)), dtype=DTYPES[dtype])
    with stage("VAE: decode in tiles", stages):
        nodes.VAEDecodeTiled().decode(vae, latent, TILE)
    free()
    with stage("VAE: decode", stages):
        picture = nodes.VAEDecode().decode(vae, latent)[0]
    if not torch.isfinite(picture).all():
        raise FloatingPointError("The picture has NaN or infinite values.")


def unload() -> None:
    """What the host does when the next model needs the card."""
    importlib.import_module("comfy.model_management").unload_all_models()
    free()


def free() -> None:
    """Gives back what Python and the allocators still hold."""
    gc.collect()
    importlib.import_module("comfy.model_management").soft_empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def stage(name: str, stages: dict[str, dict[str, float]]) -> Iterator[None]:
    """Notes seconds and peaks of the block; on CUDA also what tensors took of the card, and what torch held of it."""
    cuda = torch.cuda.is_available() and bool(os.environ.get(CUDA))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with watched() as figures:
        yield
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        figures["tensors_gib"] = torch.cuda.max_memory_allocated() / GIB
        figures["device_gib"] = torch.cuda.max_memory_reserved() / GIB
    stages[name] = figures


if __name__ == "__main__":
    main()
