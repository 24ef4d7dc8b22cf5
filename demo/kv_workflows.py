"""Workflows with KV compression: 2K and beyond with the 2K weights, and a second pass at high resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .workflow_builder import KV_NOTE, PROMPT, TILES, Workflow, sigma, text_to_image

SIGMA_2K = sigma("PixArt-Sigma-XL-2-2K-MS.pth")


def high_resolution(base: int, compress: Sequence[tuple[int, int, int]]) -> Workflow:
    """The 2K weights at 2K or beyond, with KV compression."""
    return text_to_image(SIGMA_2K, "sigma-2k", base, 300, PROMPT, f"pixart-sigma-{base}-kv", tiled=True, compress=compress)


def hires_fix(scale: int, denoise: float, compress: Sequence[tuple[int, int, int]]) -> Workflow:
    """A 1024 px picture, enlarged and drawn again with the 2K weights from a part of the noise."""
    size, prefix = 1024 * scale, f"pixart-hires-{1024 * scale}"
    flow = Workflow(sigma("PixArt-Sigma-XL-2-1024-MS.pth"), "")
    flow.note = flow.weights.note()
    model, t5, vae = flow.loaders("sigma-1024")
    large = flow.second_model(SIGMA_2K, "sigma-2k", "PixArt model of the second pass", 3)
    flow.note += "\n" + KV_NOTE + f"\nThe first pass draws 1024 px, the second {size} px; its denoise is how much may change."
    positive = flow.text("Prompt", t5, PROMPT, 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    latent = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    for row, (ratio, first, last) in enumerate(compress, start=3):
        large = flow.compress(large, row, ratio, first, last)
    drawn = flow.decode(flow.sample("Sampler", model, positive, negative, [latent, 0]), vae, f"{prefix}-first")
    enlarged = flow.add(
        "ImageScaleBy", "Enlarge", 3, 1, image=[drawn, 0], upscale_method="lanczos", scale_by=float(scale)
    )
    encoded = flow.add("VAEEncodeTiled", "Encode", 3, 2, pixels=[enlarged, 0], vae=[vae, 0], **TILES)
    second = flow.sample("Second pass", large, positive, negative, [encoded, 0], row=1, column=5, denoise=denoise)
    flow.decode(second, vae, prefix, row=1, tiled=True, column=6)
    return flow


# Blocks 14 to 27 are those that the Σ paper trains with compression.
KV_WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "sigma-2k-kv": lambda: high_resolution(2048, [(2, 14, 27)]),
    "sigma-2880-kv": lambda: high_resolution(2880, [(2, 0, 27)]),
    "sigma-4096-kv": lambda: high_resolution(4096, [(2, 0, 13), (4, 14, 27)]),
    "hires-2k": lambda: hires_fix(2, 0.5, [(2, 14, 27)]),
    "hires-4096": lambda: hires_fix(4, 0.4, [(2, 0, 13), (4, 14, 27)]),
}
