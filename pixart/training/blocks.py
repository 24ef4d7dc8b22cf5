"""What the loop does to transformer blocks: compile them, compute them anew in the backward pass, make them faster and leaner."""
from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .cpu_attention import keep_probabilities
from .linear import add_adapters_in_place, cast_weights_anew


def wrap_blocks(blocks: Iterable[nn.Module], *, compiled: bool, checkpointed: bool) -> None:
    """Replaces the blocks' `forward`, or that of their layers; names and parameters stay.

    compiled: one graph serves every block and size. checkpointed: a block keeps only its input; what it drew, as dropout
    does, is drawn alike the second time.
    """
    blocks = list(blocks)
    if not compiled:  # a graph keeps what it likes
        keep_probabilities(blocks, checkpointed)
    for block in blocks:
        if not compiled:
            add_adapters_in_place(block)
        if not (compiled or checkpointed):  # a checkpointed block's copies don't outlive it
            cast_weights_anew(block)
            continue
        forward = torch.compile(block.forward, dynamic=True) if compiled else block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False) if checkpointed else forward
