"""Workflows with KV compression: 2K and beyond with the 2K weights, and a second pass at high resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pixart.kv_compress import KVCompression

from .builder import KV_NOTE, PROMPT, TILES, Workflow, sigma, text_to_image

SIGMA_2K = sigma("PixArt-Sigma-XL-2-2K-MS.pth")


def high_resolution(base: int, compress: Sequence[KVCompression]) -> Workflow:
    """The 2K weights at 2K or beyond, with KV compression."""
    return text_to_image(SIGMA_2K, "sigma-2k", base, 300, PROMPT, f"pixart-sigma-{base}-kv", tiled=True, compress=compress)


def hires_fix(scale: int, denoise: float, compress: Sequence[KVCompression]) -> Workflow:
    """A 1024 px picture, enlarged and drawn again with the 2K weights from a part of the noise."""
    size, prefix = 1024 * scale, f"pixart-hires-{1024 * scale}"
    flow = Workflow(sigma("PixArt-Sigma-XL-2-1024-MS.pth"), "")
    flow.note = flow.weights.note()
    model, t5, vae = flow.loaders("sigma-1024")
    large = flow.second_model(SIGMA_2K, "sigma-2k", "PixArt model of the second pass", 3)
    flow.note += KV_NOTE + f"\nThe first pass draws 1024 px, the second {size} px. The second pass's denoise sets how much may change."
    positive = flow.text("Prompt", t5, PROMPT, 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    latent = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    for row, how in enumerate(compress, start=3):
        large = flow.compress(large, row, how)
    drawn = flow.decode(flow.sample("Sampler", model, positive, negative, [latent, 0]), vae, f"{prefix}-first")
    enlarged = flow.add(
        "ImageScaleBy", "Enlarge", 3, 1, image=[drawn, 0], upscale_method="lanczos", scale_by=float(scale)
    )
    encoded = flow.add("VAEEncodeTiled", "Encode", 3, 2, pixels=[enlarged, 0], vae=[vae, 0], **TILES)
    second = flow.sample("Second pass", large, positive, negative, [encoded, 0], row=1, column=5, denoise=denoise)
    flow.decode(second, vae, prefix, row=1, tiled=True, column=6)
    return flow


def falling(until: float) -> list[KVCompression]:
    """By 4 while composition is found, then by 2: for sizes where even half of a step without would take too long."""
    return [KVCompression(4, end_percent=until), KVCompression(2, start_percent=until, end_percent=1.0)]


# A second pass with denoise 0.5 lies in the later half of the noise schedule, with 0.4 after 0.6.
KV_WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "sigma-2k-kv": lambda: high_resolution(2048, [KVCompression()]),
    "sigma-2880-kv": lambda: high_resolution(2880, [KVCompression(4)]),
    "sigma-4096-kv": lambda: high_resolution(4096, falling(0.5)),
    "hires-2k": lambda: hires_fix(2, 0.5, [KVCompression(end_percent=0.75)]),
    "hires-4096": lambda: hires_fix(4, 0.4, falling(0.8)),
}
