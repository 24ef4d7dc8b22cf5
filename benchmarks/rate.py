"""How near a step comes to the machine's own rate of matrix products."""
from __future__ import annotations

import statistics
import time

import torch

from benchmarks.peers import TOKENS, Workload
from benchmarks.timing import synchronize


def step_flops(work: Workload) -> float:
    """Floating-point operations that one step with guidance needs, without compression: products of the blocks.

    Peers do more: the empty prompt's one token makes its cross-attention the same for all tokens of the picture.
    """
    sizes, pictures, captions = work.config, work.size.tokens, max(TOKENS)
    width, mlp = sizes.hidden_size, sizes.mlp_hidden
    each = pictures * (4 * width**2 + 2 * width * mlp)  # qkv and proj, MLP
    each += 2 * width * pictures**2 + 2 * width**2 * captions  # scores and values of self-attention; keys and values of captions
    prompt = pictures * (2 * width**2 + 2 * width * captions)  # q and proj, scores and values of cross-attention
    empty = width**2  # proj
    return 2.0 * (2 * each + prompt + empty) * sizes.depth  # a multiplication and a sum, of two predictions


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype, device: str, repeats: int = 7) -> float:
    """Operations per second of square matrix products, the median of some."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])  # the first is the warm-up
