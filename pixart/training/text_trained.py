"""A transformer together with a T5 that is trained too: captions go in as texts."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, autocast, nn

from ..config import TransformerConfig
from ..model import PixArtTransformer
from ..text.encoder import TextEncoder


class TextTrained(nn.Module):
    """Both in one forward. T5 computes in its own dtype: in fp16 its values would overflow."""

    def __init__(self, transformer: PixArtTransformer, encoder: TextEncoder, max_tokens: int) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, encoder.model
        self.max_tokens = max_tokens
        self._tokenizer = encoder.tokenizer

    @property
    def config(self) -> TransformerConfig:
        """The transformer's."""
        return self.transformer.config

    def train(self, mode: bool = True) -> TextTrained:
        """T5's own dropout stays off; it was never meant for this."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
        *,
        captions: Sequence[str] | None = None,
        **options: Any,
    ) -> Tensor:
        """As `PixArtTransformer.forward`; captions: (B,) texts, in the place of context and its mask."""
        if captions is not None:
            context, context_mask = self.encode(captions)
        return self.transformer(latent, timestep, context, context_mask, size, **options)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, M, C) and mask (B, M) of texts; those that are too long lose their last words."""
        device = self.text_encoder.shared.weight.device
        rows = [self._tokenizer.encode(text, self.max_tokens).ids for text in captions]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        with autocast(device.type, enabled=False):
            states = self.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states, mask
