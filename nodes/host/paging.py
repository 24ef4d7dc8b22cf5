"""Whether the host maps weights to their file and pages them in as they are used (dynamic VRAM)."""
from __future__ import annotations

import comfy.model_patcher

SAMPLED = 4096  # values of a weight that are looked at where looking at all would read the whole file


def pages_weights() -> bool:
    """Its layers then want all weights at once, and may take them over as they are."""
    plain = comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", plain) is not plain
