"""A picture's settings as a graph of this pack's nodes, in ComfyUI's API format: dropped on ComfyUI, the picture opens it."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bins import nearest_bin
from .prompt_rows import Picture

Graph = dict[str, dict[str, Any]]
# KSampler's names for our samplers on evenly spaced timesteps; the latent's noise is the same as here
SAMPLERS = {"dpm++": ("dpmpp_2m", "sgm_uniform"), "lcm": ("lcm", "simple")}


@dataclass(frozen=True)
class GraphModels:
    """Names of the files in ComfyUI's folders, and what belongs to the model."""

    transformer: str
    text_encoder: str
    vae: str
    variant: str = "auto"
    max_tokens: int = 300
    base_size: int = 1024
    use_bins: bool = True


def model_name(path: Path) -> str:
    """What ComfyUI's menus call a file: its name, or where it lies below `models/<folder>/`."""
    parts = path.absolute().parts
    if "models" in parts[:-2]:
        inner = parts[len(parts) - 1 - parts[::-1].index("models") + 2 :]
        return "/".join(inner) or path.name
    return path.name


def picture_graph(picture: Picture, models: GraphModels, sampler: str = "dpm++", schedule: str = "usual") -> Graph | None:
    """The graph that draws one picture; None for a way of sampling that KSampler doesn't have."""
    if sampler not in SAMPLERS or schedule != "usual":
        return None
    sampler_name, scheduler = SAMPLERS[sampler]
    size = nearest_bin(models.base_size, picture.width, picture.height)
    cropped = models.use_bins and (size.width, size.height) != (picture.width, picture.height)
    text = {"clip": ["2", 0], "max_tokens": str(models.max_tokens)}
    graph: Graph = {
        "1": _node("PixArtModelLoader", "PixArt model", model_name=models.transformer, variant=models.variant, weight_dtype="default"),
        "2": _node("PixArtT5Loader", "T5 text encoder", t5_name=models.text_encoder, precision="default", device="default"),
        "3": _node("VAELoader", "VAE", vae_name=models.vae),
        "4": _node("PixArtTextEncode", "Prompt", text=picture.prompt, **text),
        "5": _node("PixArtTextEncode", "Negative prompt", text=picture.negative, **text),
        "6": _size(picture, models),
        "7": _node(
            "KSampler", "Sampler", model=["1", 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0], seed=picture.seed,
            steps=picture.steps, cfg=picture.guidance, sampler_name=sampler_name, scheduler=scheduler, denoise=1.0,
        ),
        "8": _node("VAEDecode", "Decode", samples=["7", 0], vae=["3", 0]),
        "9": _node("SaveImage", "Save", images=["10" if cropped else "8", 0], filename_prefix="pixart"),
    }  # fmt: skip
    if cropped:
        graph["10"] = _node("PixArtCropToSize", "Crop", image=["8", 0], width=picture.width, height=picture.height)
    if sampler == "lcm":
        graph["11"] = _node("ModelSamplingDiscrete", "LCM", model=["1", 0], sampling="lcm", zsnr=False)
        graph["7"]["inputs"]["model"] = ["11", 0]
    return graph


def _size(picture: Picture, models: GraphModels) -> dict[str, Any]:
    size = {"width": picture.width, "height": picture.height, "batch_size": 1}
    if models.use_bins:
        return _node("PixArtResolution", "Size", base=str(models.base_size), **size)
    return _node("EmptyLatentImage", "Size", **size)


def _node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
