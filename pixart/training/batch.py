"""What a step eats: pictures of one size, with their captions and whatever else is known of them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from .draws import Draws
from .recipe import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image


@dataclass(frozen=True)
class Batch:
    """latent: (B, C, H, W), in the model's space; context: (B, M, C'); mask: (B, M) bool; size: (B, 2) pixels.

    weight: (B,), how much each row counts, 0 for rows that only fill up; total: the sum of weights over all processes' rows.
    captions: the texts behind `context`, for a text encoder that is trained itself.
    prior: (B,) bool, rows that show what the model is to draw as before; None if none does.
    hint: (B, C, H, W), the latent of what a ControlNet is shown. features: (B, N, F), what is known of every token.
    """

    latent: Tensor
    context: Tensor
    mask: Tensor
    size: Tensor
    weight: Tensor
    total: float
    hint: Tensor | None = None
    features: Tensor | None = None
    captions: tuple[str, ...] | None = None
    prior: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)})


class Source(Protocol):
    """Batches without end; which pictures are in one depends on `draws` alone.

    The loop calls `report` or `prepare` first, and `prepare` before anything below it. No model of the source's is in memory
    behind `prepare` and `decode`.
    """

    null_context: Tensor | None  # (M, C'), what the text encoder makes of an empty caption; None where there is no text encoder
    feature_count: int  # F, 0 if nothing is known of tokens
    settled: bool  # whether `contents` are known already; else `prepare` makes pictures

    def report(self) -> list[str]:
        """Lines that say what would be trained on, for `--dry-run`; nothing is computed or written."""

    def check(self) -> None:
        """Raises DataError where `prepare` would, as far as that can be told without computing."""

    def prepare(self, prompts: Sequence[str], accelerator: Accelerator) -> None:
        """Computes and caches whatever features are missing, those of `prompts` and of "" too; every process calls it."""

    def contents(self) -> list[str]:
        """A line for each picture that takes part, in order: its name, a mark of its content and of its captions.

        A run that goes on has the same as when it began; the difference names what has vanished, come or changed.
        """

    def batch(self, settings: Any, stage: Stage, draws: Draws) -> Batch:
        """The rows of `draws`; settings: those of the stage. All processes get the same size."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, M, C') and mask (B, M) of prompts that were given to `prepare`."""

    def validation(self, settings: Any, stage: Stage, rows: range) -> list[Batch]:
        """Held-out pictures, each always with the same caption and latent, in batches of one size.

        rows: which of them, by number in their fixed order; those past the last are left out, so that the list may be empty.
        """

    def decode(self, latents: Tensor) -> list[Image]:
        """Pictures of latents (B, C, H, W) in the model's space."""


def drop_captions(batch: Batch, null: Tensor, share: float, keep_mask: bool, draws: Draws) -> Batch:
    """Replaces about `share` of the captions by the empty one, as guidance will ask for it.

    null: (M0, C'). keep_mask: the caption's own mask stays and covers as many rows of `null`, as in the reference's trainers;
    else the mask becomes that of the empty caption, as diffusers and ComfyUI draw. Raises ConfigError for too few rows.
    """
    dropped = draws.uniform("caption dropout") < share
    if not dropped.any():
        return batch
    if keep_mask and len(null) < batch.mask.shape[1]:
        raise ConfigError(f"The null caption has {len(null)} rows, a caption {batch.mask.shape[1]} tokens; choose dropped_mask 'empty'.")
    null = null[: batch.mask.shape[1]] if keep_mask else null
    rows, length = dropped.to(batch.context.device), max(batch.mask.shape[1], len(null))
    context, mask = lengthened(batch.context, length), lengthened(batch.mask, length)
    covered = lengthened(null[None].to(context), length)
    empty = torch.arange(length, device=mask.device) < len(null)
    context = torch.where(rows[:, None, None], covered, context)
    captions = batch.captions and tuple("" if gone else text for text, gone in zip(batch.captions, dropped.tolist(), strict=True))
    mask = mask if keep_mask else torch.where(rows[:, None], empty, mask)
    return replace(batch, context=context, mask=mask, captions=captions)


def lengthened(tensor: Tensor, length: int) -> Tensor:
    """Zeros (False) at the end of dimension 1."""
    missing = length - tensor.shape[1]
    return tensor if missing <= 0 else torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1)
