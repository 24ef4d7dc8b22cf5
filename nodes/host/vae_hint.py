"""Whether the running graph decodes with a VAE of another family: the model never sees its VAE, the graph names it."""
from __future__ import annotations

import re
import sys
from collections.abc import Iterator

# What a VAE's file name gives away; the weights of SD1 and SDXL VAEs have the same shapes.
KINDS = (
    ("demo", r"pixart-?demo"),
    ("sdxl", r"xl"),
    ("other", r"^ae\.|flux|sd3|taef1|wan|qwen|hunyuan|ltx"),
    ("sd1", r"consistency|vae-ft|ft-mse|ft-ema|840000|560000|sd-vae|sd-?1|sd-?2|kl-f8|^taesd$"),
)
ADVICE = {
    "sd1": "PixArt-α pictures are decoded by an SD1 VAE (scale 0.18215: sd-vae-ft-ema, vae-ft-mse-840000-ema-pruned); "
    "with an SDXL VAE they are washed out or noise",
    "sdxl": "PixArt-Σ pictures are decoded by the SDXL VAE (scale 0.13025: sdxl_vae.safetensors); with another VAE they "
    "have wrong colours or are noise",
    "demo": "the demo's pictures are decoded by its own VAE, pixart-demo-vae.safetensors; with another they are noise",
}

CONSISTENCY_DECODER = "consistency-decoder"


def vae_kind(name: str) -> str | None:
    """Family of a VAE by its file name, None if the name doesn't tell."""
    stem = name.replace("\\", "/").rpartition("/")[2].lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, stem)), None)


def vae_warning(wanted: str) -> str | None:
    """What to tell the user about the VAE of the running graph, if anything.

    wanted: "sd1", "sdxl" or "demo". α is warned about unless the graph names an SD1 VAE, since most VAEs at
    hand are SDXL's; the others only where a name says that the VAE is wrong.
    """
    names = list(_running_vaes())
    kinds = {vae_kind(name) for name in names}
    if wanted in kinds or (wanted != "sd1" and kinds <= {None}):
        return None
    found = f" This graph loads {', '.join(map(repr, names))}." if names else ""
    return f"{ADVICE[wanted]}.{found} Choose it in VAELoader."


def refiner_warning(family: str) -> str | None:
    """For α beside the SDXL refiner: their latents have the same shape, so nothing else would notice a direct link."""
    nodes = list(_running_nodes())
    refiners = [str(node["inputs"].get("ckpt_name")) for node in nodes if "refiner" in str(node.get("inputs", {}).get("ckpt_name")).lower()]
    encoded = any(node.get("class_type") in ("VAEEncode", "VAEEncodeTiled") for node in nodes)
    if family != "alpha" or not refiners or encoded:
        return None
    return (
        f"this graph hands PixArt-α's latent to {refiners[0]!r}, which reads SDXL latents: colours and shapes will be wrong. Put "
        "VAEDecode (SD1 VAE) and VAEEncode (SDXL VAE) between them; PixArt-Σ's latents need no such step."
    )


def _running_vaes() -> Iterator[str]:
    """Names in the VAE loaders of the graph that the host runs now; none without a running server."""
    for node in _running_nodes():
        name = node.get("inputs", {}).get("vae_name")
        if node.get("class_type") == "PixArtConsistencyDecoder":
            yield CONSISTENCY_DECODER  # whatever the user calls the file
        elif node.get("class_type") == "VAELoader" and isinstance(name, str):
            yield name


def _running_nodes() -> Iterator[dict]:
    """Every node of the graph that the host runs now."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", {})
    for item in list(running.values()):
        yield from item[2].values()  # (number, id, graph, ...)
