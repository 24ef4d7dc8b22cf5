"""What a text encoder gives and a transformer takes."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TextEmbeddings:
    """T5 states of a batch of prompts."""

    states: Tensor  # (B, M, C)
    mask: Tensor  # (B, M) bool, True for a real token
    token_counts: tuple[int, ...] = ()  # of the whole prompts, end token included, before any cut
    truncated: tuple[str, ...] = ()  # the words cut from each prompt, "" if none
    size: tuple[int, int] | None = None  # (height, width) in pixels that alpha-1024 is told, if not the picture's own
    source: str = ""  # the file they were read from

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same on another device, and in another dtype."""
        return replace(self, states=self.states.to(device, dtype), mask=self.mask.to(device))

    def repeat(self, count: int) -> TextEmbeddings:
        """Every prompt `count` times, neighbours together."""
        return replace(
            self,
            states=self.states.repeat_interleave(count, dim=0),
            mask=self.mask.repeat_interleave(count, dim=0),
            token_counts=tuple(tokens for tokens in self.token_counts for _ in range(count)),
            truncated=tuple(words for words in self.truncated for _ in range(count)),
        )


def concatenate(first: TextEmbeddings, second: TextEmbeddings) -> TextEmbeddings:
    """One batch of both; the shorter is padded, and the mask hides the padding."""
    longest = max(first.states.shape[1], second.states.shape[1])
    padded = []
    for part in (first, second):
        extra = longest - part.states.shape[1]
        padded.append((F.pad(part.states.to(first.states), (0, 0, 0, extra)), F.pad(part.mask.to(first.mask), (0, extra))))
    states, masks = zip(*padded)
    return TextEmbeddings(
        torch.cat(states),
        torch.cat(masks),
        first.token_counts + second.token_counts,
        first.truncated + second.truncated,
        size=second.size or first.size,
        source=second.source or first.source,
    )


def concatenate_all(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """One batch of several, in their order."""
    return reduce(concatenate, parts)
