"""Features that the reference's own tools wrote, read as they are (tools/extract_features.py of PixArt-alpha and PixArt-sigma)."""
from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import Variant
from ...errors import DataError

PIXELS = 8  # of a latent's side
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}  # by an npy's version


def read_states(path: Path, width: int) -> Tensor:
    """T5 states of the real tokens, (T, width) in fp32, of an npz with caption_feature (1, T, width) and attention_mask (1, T).

    Without a mask every token is real. Raises DataError.
    """
    found = _load(path)
    names = getattr(found, "files", ())
    if "caption_feature" not in names:
        raise DataError(f"{path} holds {', '.join(names) or 'an array'}; expected caption_feature and attention_mask.")
    with found:
        states = _array(found, "caption_feature", path)
        mask = _array(found, "attention_mask", path).flatten() > 0 if "attention_mask" in names else None
    states = states.reshape(-1, states.shape[-1] if states.ndim else 1)
    if states.shape[1] != width:
        raise DataError(f"{path} has states {states.shape[1]} wide; this model's captions are {width} wide.")
    if mask is not None and len(mask) != len(states):
        raise DataError(f"{path} has {len(states)} states, but a mask of {len(mask)}.")
    states = states if mask is None else states[mask]
    if not len(states) or not np.isfinite(states).all():
        raise DataError(f"{path} holds {'NaN or infinite values' if len(states) else 'no real token'}; extract it again.")
    return torch.from_numpy(states)


def check_latent(path: Path, variant: Variant, size: tuple[int, int]) -> None:
    """Raises DataError unless the npy has mean and std of a latent of this height and width in pixels; reads its header alone."""
    try:
        with path.open("rb") as file:
            read = HEADERS[np.lib.format.read_magic(file)]
            shape, _, dtype = read(file)
            whole = os.fstat(file.fileno()).st_size - file.tell() == math.prod(shape) * dtype.itemsize
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} can't be read ({error}); extract it again.") from None
    wanted = (2 * variant.transformer.in_channels, size[0] // PIXELS, size[1] // PIXELS)
    if shape != wanted or dtype.kind != "f":
        raise DataError(
            f"{path} is {shape} of {dtype}; expected mean and std, {wanted}, of a picture of {size[0]}x{size[1]}. "
            "Was it extracted for another base size, or distorted to another bin?"
        )
    if not whole:
        raise DataError(f"{path} is cut off; extract it again.")


def read_latent(path: Path, variant: Variant, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and std, (C, H, W) each, in the model's space; the file holds them one above the other, as the VAE gives them, unscaled."""
    check_latent(path, variant, size)
    mean, std = torch.from_numpy(_load(path).astype(np.float32)).chunk(2)
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DataError(f"{path} holds NaN or infinite values; extract it again.")
    return (mean - variant.latent_shift) * variant.latent_scale, std * variant.latent_scale


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # zipfile, numpy and the file system each have their own
        raise DataError(f"{path} can't be read ({error}); extract it again.") from None


def _array(found: Any, name: str, path: Path) -> np.ndarray:
    try:
        return found[name].astype(np.float32)
    except Exception as error:
        raise DataError(f"{path} can't be read ({error}); extract it again.") from None
