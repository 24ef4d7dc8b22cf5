"""The attention seam, and self- and cross-attention of a PixArt block."""
from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class AttentionFunction(Protocol):
    """Softmax attention. q: (B, N, H*d); k, v: (B, M, H*d); mask: bool (B, M), True attends -> (B, N, H*d)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
    ) -> Tensor: ...


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """Plain torch; `options` belongs to hosts that route attention and is not used here."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    if mask is not None:
        mask = mask.bool()[:, None, None, :]  # (B, 1, 1, M)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b h n d -> b n (h d)")


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """The same with whole score matrices: for training on a CPU, where the fused kernel's backward is slow."""
    q, k, v = (rearrange(x, "b n (h d) -> (b h) n d", h=heads) for x in (q, k, v))
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    if mask is not None:
        scores = scores.masked_fill(~mask.bool().repeat_interleave(heads, dim=0)[:, None], float("-inf"))
    out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
    return rearrange(out, "(b h) n d -> b n (h d)", h=heads)


class SelfAttention(nn.Module):
    """Attention among picture tokens, with a fused `qkv`; `ratio` > 1 compresses keys and values.

    Compression (PixArt-Σ, section 3.2): a depthwise convolution with kernel = stride = ratio
    over the 2-D token grid, then LayerNorm, on K and V but not Q. A rest that the ratio doesn't
    divide is floored away, as in the reference.
    """

    def __init__(self, hidden_size, num_heads, attention: AttentionFunction, operations, ratio=1, **factory) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.qkv = operations.Linear(hidden_size, 3 * hidden_size, bias=True, **factory)
        self.proj = operations.Linear(hidden_size, hidden_size, bias=True, **factory)
        self.ratio = ratio
        if ratio > 1:
            self.sr = operations.Conv2d(
                hidden_size, hidden_size, groups=hidden_size, kernel_size=ratio, stride=ratio, **factory
            )
            self.norm = operations.LayerNorm(hidden_size, **factory)

    def forward(self, hidden: Tensor, grid: tuple[int, int], options: Any = None, identity: bool = False) -> Tensor:
        """hidden: (B, rows*columns, D) -> the same shape.

        identity: each token attends to itself alone (perturbed attention, arXiv:2403.17377, section 4.2).
        """
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        if identity:
            return self.proj(v)
        if self.ratio > 1:
            k, v = self._compress(k, grid), self._compress(v, grid)
        return self.proj(self.attention(q, k, v, heads=self.num_heads, options=options))

    def _compress(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        image = rearrange(tokens, "b (r c) d -> b d r c", r=rows, c=columns)
        return self.norm(rearrange(self.sr(image), "b d r c -> b (r c) d"))


class CrossAttention(nn.Module):
    """Picture tokens attend to caption tokens; keys and values share `kv_linear`."""

    def __init__(self, hidden_size, num_heads, attention: AttentionFunction, operations, **factory) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.q_linear = operations.Linear(hidden_size, hidden_size, bias=True, **factory)
        self.kv_linear = operations.Linear(hidden_size, 2 * hidden_size, bias=True, **factory)
        self.proj = operations.Linear(hidden_size, hidden_size, bias=True, **factory)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None, options: Any = None) -> Tensor:
        """hidden: (B, N, D); context: (B, M, D); mask: bool (B, M) or None -> (B, N, D)."""
        k, v = self.kv_linear(context).chunk(2, dim=-1)
        out = self.attention(self.q_linear(hidden), k, v, heads=self.num_heads, mask=mask, options=options)
        return self.proj(out)
