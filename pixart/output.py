"""What pictures are handed out as."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import InputError

OUTPUTS = ("pil", "np", "pt", "latent")


def check_output(output: str) -> None:
    """Raises InputError for any other word."""
    if output not in OUTPUTS:
        raise InputError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}.")


def to_output(images: Tensor, output: str) -> Any:
    """Pictures (B, 3, H, W) in 0..1 as "pt", "np" (B, H, W, 3) or a list of PIL pictures."""
    if output == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output == "np":
        return array
    from PIL import Image

    return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in array]
