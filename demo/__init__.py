"""The demo model: what it draws, how it was trained and judged, and where its weights lie."""

from pathlib import Path

FOLDER = Path(__file__).absolute().parent
RESULTS = FOLDER / "results"
_WEIGHTS = FOLDER / "weights"
# By the host's model folders, so that the pack can offer them to it as they are.
WEIGHTS = {
    "diffusion_models": _WEIGHTS / "diffusion_models/pixart-demo-transformer.safetensors",
    "text_encoders": _WEIGHTS / "text_encoders/pixart-demo-t5.safetensors",
    "vae": _WEIGHTS / "vae/pixart-demo-vae.safetensors",
}
CONTROLNET = _WEIGHTS / "controlnet/pixart-demo-controlnet.safetensors"
LORAS = _WEIGHTS / "loras"
# LoRAs that distil the transformer to few steps, by how they are sampled.
DISTILLED = {kind: LORAS / f"pixart-demo-{kind}.safetensors" for kind in ("lcm", "dmd")}
