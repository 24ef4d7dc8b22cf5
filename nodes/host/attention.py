"""The host's attention behind the core's seam, with masks in the one form that every backend takes."""
from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention as host
import torch
from comfy.cli_args import args
from torch import Tensor

from ...pixart.attention import torch_attention

OVERRIDE = "optimized_attention_override"  # of the transformer options: another node's attention
# These drop a mask silently (sage, on hosts that don't test for it) or complain at every call (flash).
MASKLESS_BACKENDS = ("attention_sage", "attention3_sage", "attention_flash")


def host_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None, options: Any = None
) -> Tensor:
    """`optimized_attention` of the host, looked up at each call, so that a replaced backend is used."""
    attend = host.optimized_attention
    if _is_slow_default(attend, q) and OVERRIDE not in (options or {}):
        # Added, not boolean: a caption without any real token is then the mean of its tokens, as in the host's backends, not NaN
        return torch_attention(q, k, v, heads=heads, mask=None if mask is None else additive_mask(mask, q.dtype)[:, 0])
    if mask is None:
        return attend(q, k, v, heads, transformer_options=options)
    if _drops_masks(attend):
        attend = host.attention_pytorch
    return attend(q, k, v, heads, mask=additive_mask(mask, q.dtype), transformer_options=options)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool (B, M), True attends, or floats to add -> (B, 1, M), to be added to the scores of every head and query.

    xformers copies masks into floats and split adds them, so a bool mask would be wrong there. Half of
    the lowest number: the score it is added to can't overflow to -inf, which is NaN for whole chunks.
    """
    if mask.is_floating_point():
        return mask.to(dtype)[:, None, :]
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask.bool(), torch.finfo(dtype).min / 2)[:, None, :]


def _drops_masks(attend: Any) -> bool:
    if getattr(attend, "__name__", "") not in MASKLESS_BACKENDS:
        return False
    return not (attend.__name__ == "attention_sage" and getattr(host, "SAGE_ATTENTION_SUPPORTS_MASK", False))


def _is_slow_default(attend: Any, q: Tensor) -> bool:
    """On a CPU the host cuts attention into slices unless it is told how to attend; torch's own kernel takes half the time."""
    return attend is host.attention_sub_quad and q.device.type == "cpu" and not args.use_quad_cross_attention
