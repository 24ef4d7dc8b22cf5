"""Whether the running graph decodes with a VAE of another family: the model never sees its VAE, the graph names it."""
from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# What a VAE's file name gives away; the weights of SD1 and SDXL VAEs have the same shapes.
KINDS = (
    ("demo", r"pixart-?demo"),
    ("sdxl", r"xl"),
    ("flux", r"^ae\.|flux|taef1"),
    ("sd3", r"sd-?3"),
    ("other", r"wan|qwen|hunyuan|ltx"),
    ("sd1", r"consistency|vae-ft|ft-mse|ft-ema|840000|560000|sd-vae|sd-?1|sd-?2|kl-f8|^taesd$"),
)
ADVICE = {
    "sd1": "PixArt-alpha pictures are decoded by an SD1 VAE (scale 0.18215: sd-vae-ft-ema, vae-ft-mse-840000-ema-pruned); "
    "with an SDXL VAE they are washed out or noise",
    "sdxl": "PixArt-Sigma pictures are decoded by the SDXL VAE (scale 0.13025: sdxl_vae.safetensors); with another VAE they "
    "have wrong colours or are noise",
    "sd3": "this PixArt's pictures are decoded by SD3's VAE, of 16 channels; with another they are noise (with Flux's, choose the "
    "variant sigma-flux)",
    "flux": "this PixArt's pictures are decoded by Flux's VAE (ae.safetensors), of 16 channels; with another they are noise",
    "demo": "the demo's pictures are decoded by its own VAE, pixart-demo-vae.safetensors; with another they are noise",
}

CONSISTENCY_DECODER = "consistency-decoder"
PIXART, REFINER = "PixArt", "refiner"
Graph = Mapping[str, Mapping[str, Any]]


def vae_kind(name: str) -> str | None:
    """Family of a VAE by its file name, None if the name doesn't tell."""
    stem = name.replace("\\", "/").rpartition("/")[2].lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, stem)), None)


def vae_warning(wanted: str) -> str | None:
    """What to tell the user about the VAE of the running graph, if anything.

    wanted: "sd1", "sdxl", "sd3", "flux" or "demo". alpha is warned about unless the graph names an SD1 VAE, or takes one from a checkpoint
    that may be SD1's, since most VAEs at hand are SDXL's; the others only where a name says that the VAE is wrong.
    """
    names = list(_running_vaes())
    kinds = {vae_kind(name) for name in names}
    if wanted in kinds or (wanted != "sd1" and kinds <= {None}):
        return None
    others = list(_other_vaes())
    if wanted == "sd1" and any(vae_kind(name) in (None, wanted) for name in others):
        return None  # from a whole checkpoint, or another pack's loader: most are SD1's
    names += others
    found = f" This graph loads {', '.join(map(repr, names))}." if names else ""
    return f"{ADVICE[wanted]}.{found} Choose it in VAELoader."


def refiner_warning(family: str) -> str | None:
    """For alpha before the SDXL refiner: their latents have the same shape, so nothing else would notice a direct link."""
    names = [name for graph in running_graphs() for name in _refiners_on_pixart(graph)] if family == "alpha" else []
    if not names:
        return None
    return (
        f"this graph hands PixArt-alpha's latent to {names[0]!r}, which reads SDXL latents: colours and shapes will be wrong. Put "
        "VAEDecode (SD1 VAE) and VAEEncode (SDXL VAE) between them; PixArt-Sigma's latents need no such step."
    )


def _refiners_on_pixart(graph: Graph) -> Iterator[str]:
    """Names of refiners that sample on from a PixArt sampler's latent, without a VAE between."""
    for node in graph.values():
        refiner = _model_of(graph, node)
        if REFINER not in refiner.lower():
            continue
        waiting, seen = sources(graph, node, "latent_image"), set()
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            before = graph[number]
            model = _model_of(graph, before)
            if model == PIXART:
                yield refiner
            elif not model or REFINER in model.lower():  # another model's latent has come through a VAE of its own
                waiting += [] if "vae" in before.get("inputs", {}) else sources(graph, before)


def _model_of(graph: Graph, node: Mapping[str, Any]) -> str:
    """What a sampler draws with: PIXART, or the file's name; "" for nodes that don't sample."""
    if not sources(graph, node, "latent_image"):
        return ""
    waiting, seen = sources(graph, node, "model") + sources(graph, node, "guider"), {""}
    while waiting:  # patches and LoRA lie between
        number = waiting.pop(0)
        if number in seen:
            continue
        seen.add(number)
        loader = graph[number]
        name = next((loader["inputs"][key] for key in ("ckpt_name", "unet_name") if key in loader.get("inputs", {})), None)
        if name is not None or loader.get("class_type") == "PixArtModelLoader":
            return PIXART if name is None else str(name)
        waiting += sources(graph, loader)
    return "a model of another loader"


def sources(graph: Graph, node: Mapping[str, Any], name: str | None = None) -> list[str]:
    """Ids of the nodes that a node's input, or each of its inputs, is linked to."""
    inputs = node.get("inputs", {})
    values = inputs.values() if name is None else [inputs.get(name)]
    return [str(value[0]) for value in values if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph]


def _running_vaes() -> Iterator[str]:
    """Names in the VAE loaders of the graph that the host runs now; none without a running server."""
    for node in (node for graph in running_graphs() for node in graph.values()):
        name = node.get("inputs", {}).get("vae_name")
        if node.get("class_type") == "PixArtConsistencyDecoder":
            yield CONSISTENCY_DECODER  # whatever the user calls the file
        elif node.get("class_type") == "VAELoader" and isinstance(name, str):
            yield name


def _other_vaes() -> Iterator[str]:
    """What the VAEs that come from anything but a VAE loader are called: their checkpoint's file, or the node's class."""
    for graph in running_graphs():
        for number in {source for node in graph.values() for source in sources(graph, node, "vae")}:
            loader = graph[number]
            if loader.get("class_type") not in ("VAELoader", "PixArtConsistencyDecoder"):
                inputs = loader.get("inputs", {})
                named = (inputs.get(key) for key in ("vae_name", "ckpt_name"))
                yield next((name for name in named if isinstance(name, str)), str(loader.get("class_type")))


def running_graphs() -> list[Graph]:
    """The graphs, node id -> node, that the host runs now."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", {})
    return [item[2] for item in list(running.values())]  # (number, id, graph, ...)
