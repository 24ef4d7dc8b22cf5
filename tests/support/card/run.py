"""Samples the demo on the pretended card in one way of the host to place weights, and writes down what happened.

    python -m tests.support.card.run MODE OUTPUT [FEATURES ...]

MODE: cpu, full, low, none, dynamic or streamed. FEATURES: joined by "+", e.g. lora+kv. OUTPUT is a file for torch.load:
for each of FEATURES the latent, and the events of one step in the middle.
"""
from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import host
from tests.support.card import LOG, dynamic

WEIGHTS = host.PACK_ROOT / "demo" / "weights"
MODES = ("cpu", "full", "low", "none", "dynamic", "streamed")
STEPS = 3
KEPT_IN_LOW = 400_000  # bytes of weights that stay on the card in mode "low"


def start(mode: str) -> None:
    """The host with the pack, its weights placed as `mode` says."""
    if mode == "cpu":
        host.start_host()
        importlib.import_module("comfy.cli_args").args.fp32_unet = True
    else:
        host.start_on_card(fp32_unet=True, fp32_vae=True, novram=mode == "none")
    if mode in ("dynamic", "streamed"):
        dynamic.enable(resident=mode == "dynamic")
    if mode == "low":
        _leave_little_room()
    host.load_pack()
    host.quiet_host()


def _leave_little_room() -> None:
    """The host's own partial loading, told that the card is nearly full."""
    management = importlib.import_module("comfy.model_management")
    load = management.load_models_gpu

    def short(models: Any, *args: Any, **options: Any) -> None:
        free = management.get_free_memory(management.get_torch_device())
        options["minimum_memory_required"] = free - management.extra_reserved_memory() - KEPT_IN_LOW
        load(models, **{**options, "memory_required": free - 3 * 2**30})

    management.load_models_gpu = short


def build(features: set[str]) -> tuple[Any, list, list]:
    """MODEL and both CONDITIONINGs with what is asked for."""
    pack = host.pack_module
    dtype = "fp8_e4m3fn" if "fp8" in features else "default"
    model = pack("nodes.host.loader").load_model(str(WEIGHTS / "diffusion_models/pixart-demo-transformer.safetensors"), "auto", dtype)
    if "lora" in features:
        file = WEIGHTS / "loras/pixart-demo-red-blue.safetensors"
        model, _, _ = pack("nodes.host.lora").apply_lora(model, None, file, 1.0, 1.0)
    if "pag" in features:
        model = pack("nodes.host.guidance").guide_by_perturbation(model, "perturbed attention", "4", 3.0, 0.0, 1.0)
    for name, until in (("kv", 1.0), ("kvpart", 0.5)):
        if name in features:
            compression = pack("pixart.kv_compress").KVCompression(2, "mean", 0, -1, 0.0, until, 0)
            model = pack("nodes.host.kv_compress").compress_model(model, compression)
    generator = torch.Generator().manual_seed(0)
    positive = [[torch.randn(1, 17, 128, generator=generator) * 0.3, {}]]
    negative = [[torch.randn(1, 1, 128, generator=generator) * 0.3, {}]]
    return (model, *(_controlled(positive, negative) if "control" in features else (positive, negative)))


def _controlled(positive: list, negative: list) -> tuple[list, list]:
    comfy = importlib.import_module("comfy.sd"), importlib.import_module("comfy.utils")
    net = host.pack_module("nodes.host.controlnet").load_control(str(WEIGHTS / "controlnet/pixart-demo-controlnet.safetensors"))
    vae = comfy[0].VAE(sd=comfy[1].load_torch_file(str(WEIGHTS / "vae/pixart-demo-vae.safetensors")))
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
    apply = importlib.import_module("nodes").ControlNetApplyAdvanced().apply_controlnet
    return apply(positive, negative, net, picture, 1.0, 0.0, 1.0, vae=vae)


@torch.no_grad()
def sample(features: set[str]) -> dict[str, Any]:
    """The latent after STEPS steps, and the events between the first and the second."""
    model, positive, negative = build(features)
    latent = torch.zeros(1, 4, *((17, 15) if "odd" in features else (16, 16)))
    run = importlib.import_module("comfy.sample")
    marks: list[int] = []

    def after_step(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        marks.append(len(LOG))

    noise = run.prepare_noise(latent, 1)
    made = run.sample(
        model, noise, STEPS, 4.5, "euler", "normal", positive, negative, latent, callback=after_step, seed=1, disable_pbar=True
    )  # fmt: skip
    events = [(each.kind, each.detail, each.bytes, each.where) for each in LOG[marks[0] : marks[1]]]
    return {"latent": made.cpu(), "device": str(model.load_device), "events": events, "partly": bool(model.model.model_lowvram)}


def main() -> None:
    mode, output, *wanted = sys.argv[1:]
    if mode not in MODES:
        sys.exit(f"{mode} is none of {', '.join(MODES)}")
    os.environ.pop(host.CUDA, None)
    start(mode)
    torch.save({each: sample(set(each.split("+"))) for each in wanted}, Path(output))


if __name__ == "__main__":
    main()
