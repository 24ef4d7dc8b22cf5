"""PixArt-alpha and PixArt-Sigma text to image, on plain torch."""
from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported at first use, so that the nodes can load the transformer without transformers or diffusers.
_EXPORTS = {
    "load_transformer": ".checkpoints.load",
    "load_text_encoder": ".text.encoder",
    "load_prompts": ".text.prompt_file",
    "save_prompts": ".text.prompt_file",
    "Pipeline": ".pipeline",
    "PerturbedGuidance": ".guidance",
    "nearest_bin": ".bins",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
