"""What workflows are made of: weights with their origin, and API graphs that grow node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.workflow_ui import Placement
from pixart.kv_compress import KVCompression

HUGGING_FACE = "https://huggingface.co"
T5_XXL = "t5xxl_fp16.safetensors"
T5_URL = f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main/{T5_XXL}"
PROMPT = "a lighthouse on a cliff at dusk, warm light in its windows, waves below, oil painting"
DEMO_NOTE = """The demo models of this pack, small and trained from scratch on coloured shapes.
They are in its folder demo/weights, where ComfyUI finds them; nothing has to be moved:

pixart-demo-transformer.safetensors -> demo/weights/diffusion_models
pixart-demo-t5.safetensors -> demo/weights/text_encoders
pixart-demo-vae.safetensors -> demo/weights/vae
"""
TILES = {"tile_size": 1024, "overlap": 128, "temporal_size": 64, "temporal_overlap": 8}
KV_NOTE = """

PixArt KV Compress makes attention cheaper by an approximation. Bypass it for the exact picture. These settings are a
starting point: a higher ratio or more blocks are faster, but change the picture more.
"""
COMPILE_NOTE = """

TorchCompileModel compiles the model once for all steps. The first step takes long. Later ones may be faster on a GPU, but hardly
on a CPU. Other prompts, sizes and seeds need no new compilation; KV compression and guidance add one each. Put everything that
changes the model before it. It needs a C++ compiler, and Triton on a GPU. Bypass it for a single picture.
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
    """A PixArt-Sigma checkpoint with the SDXL autoencoder."""
    return released("PixArt-alpha/PixArt-Sigma", file, "sdxl_vae.safetensors", "stabilityai/sdxl-vae")


def alpha(file: str) -> Weights:
    """A PixArt-alpha checkpoint with the SD1 autoencoder."""
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

    def second_model(self, weights: Weights, variant: str, title: str, row: int) -> str:
        """Another transformer for the same text encoder and VAE."""
        model = self.add(
            "PixArtModelLoader", title, 0, row, model_name=weights.transformer, variant=variant, weight_dtype="default"
        )
        self.places[model] = Placement(0, row, weights.models("PixArtModelLoader"))
        self.note += f"\n\n{weights.transformer} -> models/diffusion_models\n{weights.transformer_url}"
        return model

    def compress(self, model: str, row: int, how: KVCompression) -> str:
        """A KV compression patch."""
        title = f"KV compression, R = {how.ratio}, {how.start_percent:.0%} to {how.end_percent:.0%}"
        return self.add(
            "PixArtKVCompress", title, 1, row, model=[model, 0], ratio=how.ratio, method=how.method,
            first_block=how.first_block, last_block=how.last_block, start_percent=how.start_percent, end_percent=how.end_percent,
            min_tokens=how.min_tokens,
        )  # fmt: skip

    def compile(self, model: str, row: int) -> str:
        """The model under torch.compile, for its sampler."""
        return self.add("TorchCompileModel", "Compile", 1, row, model=[model, 0], backend="inductor")

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
        return self.add("PixArtTextEncode", title, 1, row, clip=[clip, 0], text=text, max_tokens=str(tokens))

    def sample(
        self, title: str, model: str, positive: str, negative: str, latent: list[Any], row: int = 0, column: int = 2, **other: Any
    ) -> str:
        """A KSampler with the defaults of PixArt-Sigma: DPM-Solver++ 2M, 20 steps, guidance 4.5."""
        settings = {"seed": 0, "steps": 20, "cfg": 4.5, "sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform"} | other
        settings.setdefault("denoise", 1.0)
        return self.add(
            "KSampler", title, column, row, model=[model, 0], positive=[positive, 0], negative=[negative, 0],
            latent_image=latent, **settings,
        )  # fmt: skip

    def decode(self, samples: str, vae: str, prefix: str, row: int = 0, tiled: bool = False, column: int = 3) -> str:
        """Decode and save; the decoding node's id."""
        tiles = TILES if tiled else {}
        kind = "VAEDecodeTiled" if tiled else "VAEDecode"
        image = self.add(kind, "Decode", column, row, samples=[samples, 0], vae=[vae, 0], **tiles)
        self.add("SaveImage", "Save", column + 1, row, images=[image, 0], filename_prefix=prefix)
        return image


def text_to_image(
    weights: Weights, variant: str, base: int, tokens: int, prompt: str, prefix: str, note: str = "", tiled: bool = False,
    compress: Sequence[KVCompression] = (), compiled: bool = False,
) -> Workflow:  # fmt: skip
    """Prompt to picture."""
    flow = Workflow(weights, (note or weights.note()) + (KV_NOTE if compress else "") + (COMPILE_NOTE if compiled else ""))
    model, t5, vae = flow.loaders(variant)
    positive = flow.text("Prompt", t5, prompt, tokens, 0)
    negative = flow.text("Negative prompt", t5, "", tokens, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base=str(base), width=base, height=base, batch_size=1)
    for row, how in enumerate(compress, start=3):
        model = flow.compress(model, row, how)
    if compiled:
        model = flow.compile(model, 3 + len(compress))
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, prefix, tiled=tiled)
    return flow
