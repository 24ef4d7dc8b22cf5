"""Attention for training on a CPU, where the backward pass of torch's fused kernel is slow: probabilities are kept instead."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention import SelfAttention, torch_attention
from ..cpu import bf16_instructions

# Scores of one head
DENSE_SCORES = 2**17  # at 256 px, and 512 px beside a caption of up to 128 tokens
KEPT_SCORES = 2**20  # at 512 px
HEADS_AT_ONCE = 4  # of kept probabilities: what passes between two products stays in the CPU's cache


def cpu_training_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """Dense for small pictures; from 512 px on the fused kernel, which keeps no scores for the backward pass."""
    attention = dense_attention if q.shape[1] * k.shape[1] <= DENSE_SCORES else torch_attention
    return attention(q, k, v, heads=heads, mask=mask, options=options)


def keep_probabilities(blocks: Iterable[nn.Module], checkpointed: bool) -> None:
    """Lets blocks on a CPU keep 512 px's probabilities for their backward pass: attention then takes a third less time.

    Of XL/2 in bf16 they are 34 MB a picture and block. Checkpointed blocks need them one block at a time. Of others each
    second one keeps them: the rest of the time isn't worth the memory. Where a block's own weights are trained, of which
    gradients and moments take far more, the others keep them too while there is one picture at once.
    """
    for index, block in enumerate(blocks):
        for layer in block.modules():
            if not (isinstance(layer, SelfAttention) and layer.attention is cpu_training_attention):
                continue
            if checkpointed or index % 2 == 0:
                layer.attention = keeping_attention
            elif any(name == "qkv.weight" and value.requires_grad for name, value in layer.named_parameters()):
                layer.attention = keeping_attention_of_one


def keeping_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """`cpu_training_attention`, but bf16's probabilities are kept at 512 px too."""
    medium = DENSE_SCORES < q.shape[1] * k.shape[1] <= KEPT_SCORES
    alike = q.dtype == k.dtype == v.dtype == torch.bfloat16
    if not (medium and mask is None and q.requires_grad and alike and _products_can_widen()):
        return cpu_training_attention(q, k, v, heads=heads, mask=mask, options=options)
    q, k, v = (rearrange(x, "b n (h d) -> (b h) n d", h=heads) for x in (q, k, v))
    return rearrange(_KeptProbabilities.apply(q, k, v), "(b h) n d -> b n (h d)", h=heads)


def keeping_attention_of_one(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """`keeping_attention` where there is one picture, else `cpu_training_attention`."""
    attention = keeping_attention if len(q) == 1 else cpu_training_attention
    return attention(q, k, v, heads=heads, mask=mask, options=options)


class _KeptProbabilities(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v for q, k, v in bf16, (heads, N, d). As in the fused kernel scores are fp32 and probabilities bf16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.float(), k.float().transpose(1, 2)
        kept = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
        out = torch.empty_like(q)
        for heads in _some_heads(len(q)):
            with _products_of_bf16():
                scores = torch.bmm(queries[heads], keys[heads])
            # Scaled only here: CPUs with AMX would round scaled queries to bf16
            kept[heads] = scores.mul_(q.shape[-1] ** -0.5).softmax(dim=-1)
            torch.bmm(kept[heads], v[heads], out=out[heads])
        ctx.save_for_backward(q, k, v, kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, kept = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        for_q, for_k, for_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for heads in _some_heads(len(q)):
            for_kept = torch.bmm(gradient[heads], v[heads].transpose(1, 2))
            for_scores = torch.ops.aten._softmax_backward_data(for_kept, kept[heads], -1, kept.dtype)
            torch.bmm(for_scores, k[heads], out=for_q[heads])
            torch.bmm(for_scores.transpose(1, 2), q[heads], out=for_k[heads])
            torch.bmm(kept[heads].transpose(1, 2), gradient[heads], out=for_v[heads])
        return for_q.mul_(scale), for_k.mul_(scale), for_v


def _some_heads(count: int) -> Iterator[slice]:
    yield from (slice(start, start + HEADS_AT_ONCE) for start in range(0, count, HEADS_AT_ONCE))


def _products_can_widen() -> bool:
    """Whether a CPU's products of bf16 numbers can come out in fp32: from torch 2.9 on, outside a compiled graph."""
    return hasattr(torch.backends.mkldnn, "matmul") and bool(bf16_instructions()) and not torch.compiler.is_compiling()


@contextmanager
def _products_of_bf16() -> Iterator[None]:
    """Products of fp32 numbers round them to bf16 first, as bf16's do, but sums stay in fp32 to the end."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", enabled=False):  # it would have them come out in bf16
            yield
    finally:
        settings.fp32_precision = before


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """Attention with whole score matrices."""
    q, k, v = (rearrange(x, "b n (h d) -> (b h) n d", h=heads) for x in (q, k, v))
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    if mask is not None and mask.is_floating_point():
        scores = scores + mask.repeat_interleave(heads, dim=0)[:, None]
    elif mask is not None:
        scores = scores.masked_fill(~mask.bool().repeat_interleave(heads, dim=0)[:, None], float("-inf"))
    out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
    return rearrange(out, "(b h) n d -> b n (h d)", h=heads)
