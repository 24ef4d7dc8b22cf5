"""Conditions: of unequal length as one batch, padded at the end under a mask; and the size that α-1024 is told."""
from __future__ import annotations

import comfy.conds
import node_helpers
import torch
from torch import Tensor

from ...pixart.attention import Padding, padding_of


class CaptionStates(comfy.conds.CONDRegular):
    """T5 states (B, M, C); prompts of other lengths join the batch, padded with zeros."""

    def can_concat(self, other: CaptionStates) -> bool:
        """Whether both can share one forward pass."""
        mine, theirs = self.cond, other.cond
        return (mine.shape[0], mine.shape[2]) == (theirs.shape[0], theirs.shape[2]) and mine.device == theirs.device

    def concat(self, others: list[CaptionStates]) -> Tensor:
        """(sum of B, longest M, C)."""
        return torch.cat(_padded([self.cond, *(other.cond for other in others)]))


class CaptionMask(comfy.conds.CONDRegular):
    """Which tokens are real, bool (B, M). Without padding the batch has no mask, which every attention likes best.

    all_real: no token is padding. Known from the start, since asking a GPU at every step would stall it.
    """

    def __init__(self, cond: Tensor, all_real: bool = False) -> None:
        super().__init__(cond)
        self.all_real = all_real

    def _copy_with(self, cond: Tensor) -> CaptionMask:
        """The host repeats and slices masks: what was all real stays so."""
        return self.__class__(cond, self.all_real)

    def can_concat(self, other: CaptionMask) -> bool:
        """The states decide."""
        return True

    def concat(self, others: list[CaptionMask]) -> Tensor | None:
        """(sum of B, longest M), or None if every token is real."""
        masks = [self, *others]
        if all(mask.all_real and mask.cond.shape[1] == self.cond.shape[1] for mask in masks):
            return None
        return torch.cat(_padded([mask.cond for mask in masks]))


class CaptionPadding(CaptionMask):
    """The mask once more, on the CPU: what it hides is known without asking a GPU. The host repeats and slices both alike."""

    def concat(self, others: list[CaptionPadding]) -> tuple[Padding, ...]:
        """Of every row of the batch."""
        return padding_of(torch.cat(_padded([self.cond, *(other.cond for other in others)])))


class PicturePositions(comfy.conds.CONDConstant):
    """The transformer's positions for this size. A tuple, as the host would cast a tensor to bf16, too coarse for them."""

    def can_concat(self, other: PicturePositions) -> bool:
        """Latents of one batch have one size."""
        return True


def caption_conds(states: Tensor, attention_mask: Tensor | None) -> dict[str, comfy.conds.CONDRegular]:
    """The states (B, M, C), the mask an encoder returned, fitted to them, and what it hides.

    Tokens that the mask doesn't cover are real: ConditioningConcat lengthens the states but not the mask.
    """
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    if attention_mask is not None:
        given = attention_mask.reshape(-1, attention_mask.shape[-1]).cpu() != 0
        length = min(given.shape[-1], mask.shape[-1])
        mask[:, :length] = given[:, :length]
    return {
        "c_crossattn": CaptionStates(states),
        "context_mask": CaptionMask(mask.to(states.device), all_real=bool(mask.all())),
        "context_padding": CaptionPadding(mask),
    }


def with_size(conditioning: list, width: int, height: int) -> list:
    """A copy of CONDITIONING that tells α-1024 this size in pixels."""
    return node_helpers.conditioning_set_values(conditioning, {"width": width, "height": height})


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Zeros (False) at the end of dimension 1, up to the longest."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return [_pad(tensor, longest - tensor.shape[1]) for tensor in tensors]


def _pad(tensor: Tensor, missing: int) -> Tensor:
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
