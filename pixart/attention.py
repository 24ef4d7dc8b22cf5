"""The attention seam, self- and cross-attention of a PixArt block, and KV compression that was trained."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .cpu import AMX, bf16_instructions
from .kv_compress import KVCompression, compress_keys_values
from .linear import LinearFunction, torch_linear

PACKED_BY_KERNEL = bf16_instructions() == AMX  # asked once, outside of graphs; with AMX a copy before costs 3 to 15 % of attention


class AttentionFunction(Protocol):
    """Softmax attention. q: (B, N, H*d); k, v: (B, M, H*d) -> (B, N, H*d).

    mask: (B, M), bool where True attends, or floats that are added to the scores.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
    ) -> Tensor: ...


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """Plain torch; `options` belongs to hosts that route attention and is not used here."""
    q, k, v = (by_head(x, heads) for x in (q, k, v))
    if mask is not None:
        mask = (mask.to(q.dtype) if mask.is_floating_point() else mask.bool())[:, None, None, :]  # (B, 1, 1, M)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b h n d -> b n (h d)")


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*d) -> (B, H, N, d); on a CPU without AMX each head's 16-bit numbers together.

    Its kernel is a fifth faster then, and slower in fp32.
    """
    split = rearrange(x, "b n (h d) -> b h n d", h=heads)
    return split if PACKED_BY_KERNEL or x.device.type != "cpu" or x.element_size() != 2 else split.contiguous()


class SelfAttention(nn.Module):
    """Attention among picture tokens, with a fused `qkv`; `ratio` > 1 compresses keys and values as trained.

    Trained compression (PixArt-Sigma, section 3.2) is of K and V but not Q. Mode "conv": a depthwise convolution
    with kernel = stride = ratio over the 2-D token grid, then LayerNorm. The others have no weights, see
    `select_tokens`. A rest that the ratio doesn't divide is floored away, as in the reference.
    """

    def __init__(
        self, hidden_size, num_heads, attention: AttentionFunction, operations, ratio=1, mode="conv", qk_norm=False,
        linear: LinearFunction = torch_linear, **factory,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads = num_heads
        self.attention, self.linear = attention, linear
        self.qkv = operations.Linear(hidden_size, 3 * hidden_size, bias=True, **factory)
        self.proj = operations.Linear(hidden_size, hidden_size, bias=True, **factory)
        self.ratio = ratio
        self.mode = mode
        if ratio > 1 and mode == "conv":
            self.sr = operations.Conv2d(
                hidden_size, hidden_size, groups=hidden_size, kernel_size=ratio, stride=ratio, **factory
            )
            self.norm = operations.LayerNorm(hidden_size, **factory)
        self.qk_norm = qk_norm
        if qk_norm:  # over the whole width, before compression, as the reference has it
            self.q_norm = operations.LayerNorm(hidden_size, **factory)
            self.k_norm = operations.LayerNorm(hidden_size, **factory)

    def forward(
        self, hidden: Tensor, grid: tuple[int, int], options: Any = None, compression: KVCompression | None = None, identity: bool = False
    ) -> Tensor:
        """hidden: (B, rows*columns, D) -> the same shape.

        compression: training-free, for blocks trained without. identity: each token attends to itself alone
        (perturbed attention, arXiv:2403.17377, section 4.2).
        """
        q, k, v = self.linear(self.qkv, hidden).chunk(3, dim=-1)
        if identity:
            return self.linear(self.proj, v)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        bias = None
        if self.ratio > 1:
            k, v = self._compress(k, grid), self._compress(v, grid)
        elif compression is not None:
            k, v, bias = compress_keys_values(k, v, grid, self.num_heads, compression)
        return self.linear(self.proj, self.attention(q, k, v, heads=self.num_heads, mask=bias, options=options))

    def _compress(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.mode != "conv":
            return select_tokens(tokens, grid, self.ratio, self.mode)
        rows, columns = grid
        image = rearrange(tokens, "b (r c) d -> b d r c", r=rows, c=columns)
        return self.norm(rearrange(self.sr(image), "b d r c -> b (r c) d"))


def select_tokens(tokens: Tensor, grid: tuple[int, int], ratio: int, mode: str) -> Tensor:
    """One of every `ratio` tokens, (B, N, D) -> (B, cells, D), by the reference's modes without weights.

    "uniform_every" counts along the sequence. "uniform" takes the first token of each 2-D cell, and so
    does "ave", which the reference computes by nearest neighbour, not as an average. Whole cells only.
    """
    if mode == "uniform_every":
        return tokens[:, ::ratio][:, : tokens.shape[1] // ratio]
    rows, columns = (side // ratio for side in grid)
    return tokens.unflatten(1, grid)[:, ::ratio, ::ratio][:, :rows, :columns].flatten(1, 2)


class OneToken(NamedTuple):
    """Which captions of a batch are their first token alone, as an empty prompt is, and whether any other has padding.

    Numbers beside the mask spare work without asking the device; a range, so that torch.compile makes no graph per pattern.
    """

    start: int
    stop: int
    others_padded: bool


def one_token_of(lengths: Sequence[int], longest: int) -> OneToken | None:
    """Of captions with so many real tokens, which come first; None unless some have one token and stand in one row."""
    rows = [row for row, length in enumerate(lengths) if length == 1]
    if not rows or rows[-1] - rows[0] >= len(rows):
        return None
    return OneToken(rows[0], rows[-1] + 1, any(length not in (1, longest) for length in lengths))


def caption_lengths(mask: Tensor) -> tuple[int, ...]:
    """Real tokens of each caption, 0 where they don't come first; mask: (B, M), nonzero is a real token.

    Waits for the device: for once a run, not for every step.
    """
    real = mask.bool()
    lengths = real.sum(dim=1)
    first = torch.arange(real.shape[1], device=real.device) < lengths[:, None]
    return tuple((lengths * (first == real).all(dim=1)).tolist())


class CrossAttention(nn.Module):
    """Picture tokens attend to caption tokens; keys and values share `kv_linear`."""

    def __init__(
        self, hidden_size, num_heads, attention: AttentionFunction, operations, linear: LinearFunction = torch_linear, **factory
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention, self.linear = attention, linear
        self.q_linear = operations.Linear(hidden_size, hidden_size, bias=True, **factory)
        self.kv_linear = operations.Linear(hidden_size, 2 * hidden_size, bias=True, **factory)
        self.proj = operations.Linear(hidden_size, hidden_size, bias=True, **factory)

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor | None, options: Any = None, one_token: OneToken | None = None
    ) -> Tensor:
        """hidden: (B, N, D); context: (B, M, D); mask: bool (B, M) or None -> (B, N, D).

        one_token: captions, known to be masked so, that need no queries: softmax over one key is 1, so every
        picture token gets that key's value. A mask that doesn't fit the context is an error all the same.
        """
        k, v = self.linear(self.kv_linear, context).chunk(2, dim=-1)
        if one_token is None or (mask is not None and mask.shape[1] != context.shape[1]):
            return self._attend(slice(None), hidden, k, v, mask, options)
        start, stop, others_padded = one_token
        mask = mask if others_padded else None
        before = [self._attend(slice(0, start), hidden, k, v, mask, options)] if start > 0 else []
        after = [self._attend(slice(stop, None), hidden, k, v, mask, options)] if stop < len(hidden) else []
        alike = self.linear(self.proj, v[start:stop, :1].contiguous()).expand(-1, hidden.shape[1], -1)
        return torch.cat([*before, alike, *after])

    def _attend(self, rows: slice, hidden: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any) -> Tensor:
        mask = None if mask is None else mask[rows]
        q = self.linear(self.q_linear, hidden[rows])
        return self.linear(self.proj, self.attention(q, k[rows], v[rows], heads=self.num_heads, mask=mask, options=options))
