"""What callers of other libraries are used to: their names of arguments, and their kinds of numbers."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

# diffusers' arguments of a PixArt pipeline -> ours, or what to do instead
DIFFUSERS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "images_per_prompt",
    "generator": "seed, a number for the batch or one a picture",
    "output_type": "output",
    "use_resolution_binning": "use_bins",
    "callback_on_step_end": "callback(step, timestep, latents)",
    "timesteps": "scheduler= of the pipeline, set to them",
    "sigmas": "scheduler= of the pipeline, set to them",
    "max_sequence_length": "max_tokens= of the pipeline",
    "eta": "scheduler= of the pipeline",
    "return_dict": "nothing: pictures are returned as a list",
    "pag_scale": "perturbed=pixart.PerturbedGuidance(scale=...)",
    "image": "nothing yet: img2img is for ComfyUI's graph",
    "strength": "nothing yet: img2img is for ComfyUI's graph",
}


def plain_number(value: Any) -> Any:
    """Python's number for numpy's and torch's of one value; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def unknown_arguments(names: Iterable[str], known: Iterable[str] = ()) -> str:
    """What to say of arguments that a call doesn't have: ours for diffusers', else the nearest."""
    said = []
    for name in names:
        near = difflib.get_close_matches(name, [*known], n=1)
        ours = DIFFUSERS.get(name) or (near[0] if near else None)
        said.append(f"{name} is not an argument here{f'; use {ours}' if ours else ''}")
    return ". ".join(said) + ". See help(pixart.Pipeline.__call__)."


def described(value: Any) -> str:
    """A value as messages name it: tensors by shape and dtype, others by type."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(value).__name__} of shape {tuple(shape)} in {dtype}"
    return f"{type(value).__name__} {str(value)[:60]!r}"
