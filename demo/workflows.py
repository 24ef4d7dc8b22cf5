"""The files in workflows/, written from one description each: `python -m demo.workflows` starts a ComfyUI and writes both formats."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .launch import checkout, host
from .launch.workflow_ui import Placement, to_ui

ROOT = Path(__file__).resolve().parents[1]
HUGGING_FACE = "https://huggingface.co"
T5_XXL = "t5xxl_fp16.safetensors"
T5_URL = f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main/{T5_XXL}"
PROMPT = "a lighthouse on a cliff at dusk, warm light in its windows, waves below, oil painting"
DEMO_NOTE = """The demo models of this pack, small and trained from scratch on coloured shapes.
They lie in its folder demo/weights, which it offers to ComfyUI; nothing has to be moved:

pixart-demo-transformer.safetensors -> demo/weights/diffusion_models
pixart-demo-t5.safetensors -> demo/weights/text_encoders
pixart-demo-vae.safetensors -> demo/weights/vae
"""


@dataclass(frozen=True)
class Weights:
    """The three files of a model and where they come from."""

    transformer: str
    transformer_url: str
    t5: str
    t5_url: str
    vae: str
    vae_url: str

    def models(self, kind: str) -> list[dict[str, str]]:
        """What the missing-models dialog needs, for the loader node `kind`; nothing for files without an address."""
        name, url, directory = {
            "PixArtModelLoader": (self.transformer, self.transformer_url, "diffusion_models"),
            "PixArtT5Loader": (self.t5, self.t5_url, "text_encoders"),
            "VAELoader": (self.vae, self.vae_url, "vae"),
        }.get(kind, ("", "", ""))
        return [{"name": name, "url": url, "directory": directory}] if url else []

    def note(self) -> str:
        """Origin and folder of each file."""
        rows = (
            (self.transformer, self.transformer_url, "diffusion_models"),
            (self.t5, self.t5_url, "text_encoders"),
            (self.vae, self.vae_url, "vae"),
        )
        return "Weights, and the folder each belongs in:\n\n" + "\n\n".join(f"{n} -> models/{d}\n{u}" for n, u, d in rows)


DEMO = Weights("pixart-demo-transformer.safetensors", "", "pixart-demo-t5.safetensors", "", "pixart-demo-vae.safetensors", "")


def released(repository: str, file: str, vae: str, vae_repository: str) -> Weights:
    """Weights the PixArt authors published, with the T5 and VAE they were trained on."""
    return Weights(
        file, f"{HUGGING_FACE}/{repository}/resolve/main/{file}", T5_XXL, T5_URL,
        vae, f"{HUGGING_FACE}/{vae_repository}/resolve/main/{vae}",
    )  # fmt: skip


def sigma(file: str) -> Weights:
    """A PixArt-Σ checkpoint with the SDXL autoencoder."""
    return released("PixArt-alpha/PixArt-Sigma", file, "sdxl_vae.safetensors", "stabilityai/sdxl-vae")


def alpha(file: str) -> Weights:
    """A PixArt-α checkpoint with the SD1 autoencoder."""
    return released(
        "PixArt-alpha/PixArt-alpha", file, "vae-ft-ema-560000-ema-pruned.safetensors", "stabilityai/sd-vae-ft-ema-original"
    )


@dataclass
class Workflow:
    """An API graph that grows node by node, with the place of every node on the canvas."""

    weights: Weights
    note: str
    graph: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, Placement] = field(default_factory=dict)

    def add(self, kind: str, title: str, column: int, row: int, /, **inputs: Any) -> str:
        """Add a node; a link is written as [id, output]. The new node's id."""
        number = str(len(self.graph) + 1)
        self.graph[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        self.places[number] = Placement(column, row, self.weights.models(kind))
        return number

    def loaders(self, variant: str) -> tuple[str, str, str]:
        """The model, text encoder and VAE nodes."""
        model = self.add(
            "PixArtModelLoader", "PixArt model", 0, 0,
            model_name=self.weights.transformer, variant=variant, weight_dtype="default",
        )  # fmt: skip
        t5 = self.add("PixArtT5Loader", "T5 text encoder", 0, 1, t5_name=self.weights.t5, precision="default", device="default")
        return model, t5, self.add("VAELoader", "VAE", 0, 2, vae_name=self.weights.vae)

    def text(self, title: str, clip: str, text: str, tokens: int, row: int) -> str:
        """A prompt."""
        return self.add("PixArtTextEncode", title, 1, row, clip=[clip, 0], text=text, max_tokens=tokens)

    def sample(self, title: str, model: str, positive: str, negative: str, latent: list[Any], row: int = 0, **other: Any) -> str:
        """A KSampler with the defaults of PixArt-Σ: DPM-Solver++ 2M, 20 steps, guidance 4.5."""
        settings = {"seed": 0, "steps": 20, "cfg": 4.5, "sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform"} | other
        settings.setdefault("denoise", 1.0)
        return self.add(
            "KSampler", title, 2, row, model=[model, 0], positive=[positive, 0], negative=[negative, 0],
            latent_image=latent, **settings,
        )  # fmt: skip

    def decode(self, samples: str, vae: str, prefix: str, row: int = 0, tiled: bool = False) -> None:
        """Decode and save."""
        tiles = {"tile_size": 1024, "overlap": 128, "temporal_size": 64, "temporal_overlap": 8} if tiled else {}
        kind = "VAEDecodeTiled" if tiled else "VAEDecode"
        image = self.add(kind, "Decode", 3, row, samples=[samples, 0], vae=[vae, 0], **tiles)
        self.add("SaveImage", "Save", 4, row, images=[image, 0], filename_prefix=prefix)


def text_to_image(
    weights: Weights, variant: str, base: int, tokens: int, prompt: str, prefix: str, note: str = "", tiled: bool = False
) -> Workflow:
    """Prompt to picture."""
    flow = Workflow(weights, note or weights.note())
    model, t5, vae = flow.loaders(variant)
    positive = flow.text("Prompt", t5, prompt, tokens, 0)
    negative = flow.text("Negative prompt", t5, "", tokens, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base=str(base), width=base, height=base, batch_size=1)
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, prefix, tiled=tiled)
    return flow


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


def lora_stack() -> Workflow:
    """Two LoRA, one after the other; each can be bypassed."""
    names = ("pixart-demo-red-blue.safetensors", "pixart-demo-green-yellow.safetensors")
    note = "\nTwo LoRA that swap words, red with blue and green with yellow: the prompt's red and green come out as blue and yellow. "
    note += "Bypass one (Ctrl+B) to take it off.\n\n" + "\n".join(f"{name} -> demo/weights/loras" for name in names)
    flow = Workflow(DEMO, DEMO_NOTE + note)
    model, t5, vae = flow.loaders("demo")
    for row, name in enumerate(names):
        model = flow.add("PixArtLoraLoader", f"LoRA {row + 1}", 1, row, model=[model, 0], lora_name=name, strength=1.0)
    positive = flow.text("Prompt", t5, "a red circle left of a green square", 300, 2)
    negative = flow.text("Negative prompt", t5, "", 300, 3)
    size = flow.add("PixArtResolution", "Size", 1, 4, base="256", width=256, height=256, batch_size=1)
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, "pixart-lora-stack")
    return flow


def perturbed_attention() -> Workflow:
    """Perturbed-attention guidance on top of CFG, and the same picture without it."""
    note = "\nThe upper sampler is guided by PixArtPAG, the lower one is not. For PixArt XL: block 14, scale 3 to 5."
    flow = Workflow(DEMO, DEMO_NOTE + note)
    model, t5, vae = flow.loaders("demo")
    guided = flow.add(
        "PixArtPAG", "Perturbed-attention guidance", 1, 0, model=[model, 0], kind="perturbed attention", blocks="4", scale=2.0,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    positive = flow.text("Prompt", t5, "a green triangle left of a yellow square", 300, 1)
    negative = flow.text("Negative prompt", t5, "", 300, 2)
    size = flow.add("PixArtResolution", "Size", 1, 3, base="256", width=256, height=256, batch_size=1)
    for row, (title, chosen, prefix) in enumerate((("With PAG", guided, "pixart-pag"), ("Without", model, "pixart-pag-off"))):
        flow.decode(flow.sample(title, chosen, positive, negative, [size, 0], row), vae, prefix, row)
    return flow


def regional_prompts() -> Workflow:
    """One prompt for each half of the picture, and one for the whole."""
    note = "\nEach half has its own prompt (x, y, width and height in pixels); the last prompt is for the whole picture."
    flow = Workflow(DEMO, DEMO_NOTE + note)
    model, t5, vae = flow.loaders("demo")
    whole = flow.text("Whole picture", t5, "a picture on a white background", 300, 2)
    negative = flow.text("Negative prompt", t5, "", 300, 3)
    positive = whole
    for row, (side, prompt) in enumerate((("Left", "a red circle"), ("Right", "a blue square"))):
        text = flow.text(f"{side} half", t5, prompt, 300, row)
        area = flow.add(
            "ConditioningSetArea", f"{side} area", 2, row + 1, conditioning=[text, 0], width=128, height=256, x=128 * row, y=0, strength=1.0
        )
        both = {"conditioning_1": [positive, 0], "conditioning_2": [area, 0]}
        positive = flow.add("ConditioningCombine", f"Add {side.lower()}", 2, row + 3, **both)
    size = flow.add("PixArtResolution", "Size", 1, 4, base="256", width=256, height=256, batch_size=1)
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, "pixart-regional-prompts")
    return flow


WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "demo": lambda: text_to_image(DEMO, "demo", 256, 300, "a red circle above a blue square", "pixart-demo", DEMO_NOTE),
    "sigma-1024": lambda: text_to_image(sigma("PixArt-Sigma-XL-2-1024-MS.pth"), "sigma-1024", 1024, 300, PROMPT, "pixart-sigma-1024"),
    "sigma-512": lambda: text_to_image(sigma("PixArt-Sigma-XL-2-512-MS.pth"), "sigma-512", 512, 300, PROMPT, "pixart-sigma-512"),
    "sigma-2k": lambda: text_to_image(sigma("PixArt-Sigma-XL-2-2K-MS.pth"), "sigma-2k", 2048, 300, PROMPT, "pixart-sigma-2k", tiled=True),
    "alpha-1024": lambda: text_to_image(alpha("PixArt-XL-2-1024-MS.pth"), "alpha-1024", 1024, 120, PROMPT, "pixart-alpha-1024"),
    "alpha-512": lambda: text_to_image(alpha("PixArt-XL-2-512x512.pth"), "alpha-512", 512, 120, PROMPT, "pixart-alpha-512"),
    "img2img": image_to_image,
    "inpaint": inpaint,
    "batch": batch,
    "lora-stack": lora_stack,
    "pag": perturbed_attention,
    "regional-prompts": regional_prompts,
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
