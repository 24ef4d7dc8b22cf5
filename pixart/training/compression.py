"""How KV compression begins in a model that was trained without it (PixArt-Sigma, section 3.2)."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import PixArtTransformer


@torch.no_grad()
def begin_compression(model: PixArtTransformer, blocks: Iterable[int], inputs: tuple[Any, ...]) -> None:
    """Starts each block's compression as near to a plain mean of the tokens as its LayerNorm permits.

    The convolution is the mean of each cell, as the paper begins. LayerNorm then brings every token to unit
    length, keys and values alike, which trained attention is not used to. Three things it takes can be given
    back, measured on `inputs`, the arguments of a forward: its weight becomes the values' usual deviation;
    its bias becomes what the values have in common, which in keys adds the same to every score and so
    changes nothing; and the queries are scaled by what the keys' deviation differs from the values'. What
    can't be given back is how tokens differ in mean and deviation; that is left to training.
    """
    for index in sorted(blocks):  # in order: each block is measured behind those that compress already
        attention = model.blocks[index].attn
        nn.init.constant_(attention.sr.weight, 1 / attention.ratio**2)
        nn.init.zeros_(attention.sr.bias)
        keys, values = _merged_tokens(model, attention.sr, inputs)
        deviation = _deviation(values)
        normal = nn.functional.layer_norm(values, values.shape[-1:], eps=attention.norm.eps)
        attention.norm.weight.fill_(deviation)
        attention.norm.bias.copy_((values - deviation * normal).mean(dim=0))
        queries = slice(0, values.shape[-1])  # of the fused q, k, v
        for parameter in (attention.qkv.weight, attention.qkv.bias):
            parameter[queries] *= _deviation(keys) / deviation


def _merged_tokens(model: PixArtTransformer, convolution: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What a block's convolution makes of keys and of values, (tokens, D) each; keys come first."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        seen.append(out.movedim(1, -1).flatten(0, 2))
        if len(seen) == 2:
            raise _SeenError  # what comes behind isn't needed

    handle = convolution.register_forward_hook(note)
    try:
        model(*inputs)
    except _SeenError:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1]


class _SeenError(Exception):
    """Ends a forward early."""


def _deviation(tokens: Tensor) -> Tensor:
    """Usual standard deviation within a token."""
    return tokens.var(dim=-1, unbiased=False).mean().sqrt().clamp_min(1e-6)
