"""Conditions: of unequal length as one batch, padded at the end under a mask; and the size that alpha-1024 is told."""
from __future__ import annotations

import comfy.conds
import node_helpers
import torch
from torch import Tensor

from ...pixart.attention import caption_lengths, one_token_of

ONE_TOKEN = "pixart_one_token"  # attribute of a mask: a OneToken or None


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
    """Which tokens are real, int (B, M). Without padding the batch has no mask, which every attention likes best.

    all_real: no token is padding. lengths: of `caption_lengths`, one a row, or None. Both are known from the start,
    since asking a GPU at every step would stall it.
    """

    def __init__(self, cond: Tensor, all_real: bool = False, lengths: tuple[int, ...] | None = None) -> None:
        super().__init__(cond)
        self.all_real, self.lengths = all_real, lengths

    def _copy_with(self, cond: Tensor) -> CaptionMask:
        """The host slices masks: what was all real stays so, but which rows are left isn't known."""
        return self.__class__(cond, self.all_real)

    def process_cond(self, batch_size: int, **given: object) -> CaptionMask:
        """The host repeats or cuts the rows to the batch."""
        repeated = super().process_cond(batch_size, **given)
        repeated.lengths = None if self.lengths is None else (self.lengths * batch_size)[:batch_size]
        return repeated

    def can_concat(self, other: CaptionMask) -> bool:
        """The states decide."""
        return True

    def concat(self, others: list[CaptionMask]) -> Tensor | None:
        """(sum of B, longest M), or None if every token is real.

        What is known of its rows is an attribute of the tensor: whoever reorders or replaces them makes another tensor.
        Changes in place would not be seen; conditioning is shared between runs, and nobody may change it so.
        """
        masks = [self, *others]
        if all(mask.all_real and mask.cond.shape[1] == self.cond.shape[1] for mask in masks):
            return None
        joined = torch.cat(_padded([mask.cond for mask in masks]))
        lengths = [length for mask in masks for length in mask.lengths or [0] * len(mask.cond)]
        setattr(joined, ONE_TOKEN, one_token_of(lengths, joined.shape[1]))
        return joined


class PicturePositions(comfy.conds.CONDConstant):
    """The transformer's positions for this size. A tuple, as the host would cast a tensor to bf16, too coarse for them."""

    def can_concat(self, other: PicturePositions) -> bool:
        """Latents of one batch have one size."""
        return True


def caption_mask(states: Tensor, attention_mask: Tensor | None) -> CaptionMask:
    """The mask an encoder returned, fitted to the states (B, M, C); tokens it doesn't cover are real.

    ConditioningConcat lengthens the states but not the mask.
    """
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    if attention_mask is not None:
        given = attention_mask.reshape(-1, attention_mask.shape[-1]).cpu() != 0
        length = min(given.shape[-1], mask.shape[-1])
        mask[:, :length] = given[:, :length]
    # int, which the host hands on as it is
    return CaptionMask(mask.to(states.device, torch.int), all_real=bool(mask.all()), lengths=caption_lengths(mask))


def with_size(conditioning: list, width: int, height: int) -> list:
    """A copy of CONDITIONING that tells alpha-1024 this size in pixels."""
    return node_helpers.conditioning_set_values(conditioning, {"width": width, "height": height})


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Zeros (False) at the end of dimension 1, up to the longest."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return [_pad(tensor, longest - tensor.shape[1]) for tensor in tensors]


def _pad(tensor: Tensor, missing: int) -> Tensor:
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
