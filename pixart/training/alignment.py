"""An auxiliary target: the tokens after one block are to hold known features of the clean picture.

Representation alignment ("Representation Alignment for Generation", Yu and others, 2024) reaches a given
quality in a fraction of the steps. There the features come from a pretrained vision encoder; here from
the data source, which may know what it drew. The head is thrown away after training.
"""
from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import BlockInputs
from ..model import PixArtTransformer


class AlignedTransformer(nn.Module):
    """A transformer with a head that reads `features` numbers from every token after block `block`."""

    def __init__(self, transformer: PixArtTransformer, block: int, features: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.block = block
        self.head = nn.Linear(transformer.config.hidden_size, features)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The transformer's prediction, and the features read on the way, (B, N, features)."""
        seen: list[Tensor] = []

        def watch(block_inputs: BlockInputs, block) -> Tensor:
            seen.append(block(block_inputs))
            return seen[-1]

        prediction = self.transformer(*inputs, block_wrappers={self.block: watch})
        normal = F.layer_norm(seen[0], seen[0].shape[-1:])
        return prediction, self.head(normal)


def alignment_loss(read: Tensor, features: Tensor) -> Tensor:
    """Mean squared error of (B, N, F) features."""
    return (read.float() - features).square().mean()
