"""Where the demo models lie; PIXART_DEMO_WEIGHTS names another folder, to test weights before they are committed."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path(os.environ.get("PIXART_DEMO_WEIGHTS", ROOT / "demo" / "weights"))
DEMO = {
    "diffusion_models": WEIGHTS / "pixart-demo-transformer.safetensors",
    "text_encoders": WEIGHTS / "pixart-demo-t5.safetensors",
    "vae": WEIGHTS / "pixart-demo-vae.safetensors",
}
SECOND_MODEL = "second.safetensors"  # random, made when the host starts
