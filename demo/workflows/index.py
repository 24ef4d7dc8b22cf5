"""The files in workflows/, written from one description each: `python -m demo.workflows.index` starts a ComfyUI and writes both formats."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import checkout, host
from launch.workflow_ui import to_ui

from .builder import DEMO, DEMO_NOTE, PROMPT, Workflow, alpha, sigma, text_to_image
from .family import FAMILY_WORKFLOWS
from .few_steps import FEW_STEPS_WORKFLOWS
from .guidance import GUIDANCE_WORKFLOWS
from .kv import KV_WORKFLOWS

ROOT = Path(__file__).resolve().parents[2]


def image_to_image() -> Workflow:
    """A picture, cropped to the nearest trained size, drawn anew from a part of the noise."""
    flow = Workflow(DEMO, DEMO_NOTE + "\nThe picture is demo/inputs/pixart-scene.png; put it, or your own, in ComfyUI's input folder.")
    model, t5, vae = flow.loaders("demo")
    positive = flow.text("Prompt", t5, "a green triangle above a yellow square", 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="256", width=256, height=256, batch_size=1)
    picture = flow.add("LoadImage", "Picture", 0, 3, image="pixart-scene.png")
    fitted = flow.add("PixArtCropToSize", "Fit to size", 1, 3, image=[picture, 0], width=[size, 1], height=[size, 2])
    latent = flow.add("VAEEncode", "Encode", 1, 4, pixels=[fitted, 0], vae=[vae, 0])
    flow.decode(flow.sample("Sampler", model, positive, negative, [latent, 0], denoise=0.8), vae, "pixart-img2img")
    return flow


def inpaint() -> Workflow:
    """Only the masked part of a picture drawn anew."""
    flow = Workflow(
        DEMO,
        DEMO_NOTE + "\nThe picture is demo/inputs/pixart-inpaint.png; its transparent part is the mask. "
        "Any picture whose sides are a trained size works: put it in ComfyUI's input folder and paint a mask (right click).",
    )
    model, t5, vae = flow.loaders("demo")
    positive = flow.text("Prompt", t5, "a red circle above a blue square", 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    picture = flow.add("LoadImage", "Picture and mask", 0, 3, image="pixart-inpaint.png")
    encoded = flow.add("VAEEncode", "Encode", 1, 2, pixels=[picture, 0], vae=[vae, 0])
    latent = flow.add("SetLatentNoiseMask", "Draw only the mask", 1, 3, samples=[encoded, 0], mask=[picture, 1])
    flow.decode(flow.sample("Sampler", model, positive, negative, [latent, 0]), vae, "pixart-inpaint")
    return flow


def batch() -> Workflow:
    """Several prompts in one run; the models load once."""
    flow = Workflow(DEMO, DEMO_NOTE + "\nEach prompt has its own sampler; the models are loaded once and stay loaded.")
    model, t5, vae = flow.loaders("demo")
    negative = flow.text("Negative prompt", t5, "", 300, 3)
    size = flow.add("PixArtResolution", "Size", 1, 4, base="256", width=256, height=256, batch_size=1)
    prompts = (
        "a red circle",
        "a green triangle left of a yellow square",
        "a large blue cross above a small orange circle on a gray background",
    )
    for row, prompt in enumerate(prompts):
        positive = flow.text(f"Prompt {row + 1}", t5, prompt, 300, row)
        sampled = flow.sample(f"Sampler {row + 1}", model, positive, negative, [size, 0], row)
        flow.decode(sampled, vae, f"pixart-batch-{row + 1}", row)
    return flow


WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "demo": lambda: text_to_image(DEMO, "demo", 256, 300, "a red circle above a blue square", "pixart-demo", DEMO_NOTE),
    "sigma-1024": lambda: text_to_image(sigma("PixArt-Sigma-XL-2-1024-MS.pth"), "sigma-1024", 1024, 300, PROMPT, "pixart-sigma-1024"),
    "sigma-512": lambda: text_to_image(sigma("PixArt-Sigma-XL-2-512-MS.pth"), "sigma-512", 512, 300, PROMPT, "pixart-sigma-512"),
    "sigma-2k": lambda: text_to_image(sigma("PixArt-Sigma-XL-2-2K-MS.pth"), "sigma-2k", 2048, 300, PROMPT, "pixart-sigma-2k", tiled=True),
    "alpha-1024": lambda: text_to_image(alpha("PixArt-XL-2-1024-MS.pth"), "alpha-1024", 1024, 120, PROMPT, "pixart-alpha-1024"),
    "alpha-512": lambda: text_to_image(alpha("PixArt-XL-2-512x512.pth"), "alpha-512", 512, 120, PROMPT, "pixart-alpha-512"),
    "compiled": lambda: text_to_image(
        sigma("PixArt-Sigma-XL-2-1024-MS.pth"), "sigma-1024", 1024, 300, PROMPT, "pixart-compiled", compiled=True
    ),
    "img2img": image_to_image,
    "inpaint": inpaint,
    "batch": batch,
    **KV_WORKFLOWS,
    **FEW_STEPS_WORKFLOWS,
    **FAMILY_WORKFLOWS,
    **GUIDANCE_WORKFLOWS,
}


def write(folder: Path, object_info: Mapping[str, Any]) -> None:
    """Write every workflow in both formats; `object_info` is the host's description of its nodes."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for stem, make in WORKFLOWS.items():
        flow = make()
        _dump(folder / "api" / f"{stem}.json", flow.graph)
        _dump(folder / f"{stem}.json", to_ui(flow.graph, object_info, flow.places, flow.note))


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Start the host that quickstart.py would use and write workflows/."""
    python = Path(sys.executable)
    comfyui = checkout.find_comfyui(ROOT) or checkout.pypi_comfyui(python, ROOT / ".quickstart")
    base = checkout.BaseDirectory(ROOT / ".quickstart" / "base")
    base.prepare(ROOT, {})
    with host.Host(python, comfyui, base.folder, cpu=True) as server:
        write(ROOT / "workflows", server.client.get_json("/object_info"))


if __name__ == "__main__":
    main()
