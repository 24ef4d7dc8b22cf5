"""The demo model: what it draws, how it was trained and judged, and where its weights lie."""

from pathlib import Path

_FOLDER = Path(__file__).absolute().parent / "weights"
# By the host's model folders, so that the pack can offer them to it as they are.
WEIGHTS = {
    "diffusion_models": _FOLDER / "diffusion_models/pixart-demo-transformer.safetensors",
    "text_encoders": _FOLDER / "text_encoders/pixart-demo-t5.safetensors",
    "vae": _FOLDER / "vae/pixart-demo-vae.safetensors",
}
# LoRAs that distil the transformer to few steps, by how they are sampled.
DISTILLED = {kind: _FOLDER / f"loras/pixart-demo-{kind}.safetensors" for kind in ("lcm", "dmd")}
