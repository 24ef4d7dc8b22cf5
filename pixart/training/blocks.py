"""What the loop does to transformer blocks: compile them, and compute them anew in the backward pass."""
from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def wrap_blocks(blocks: Iterable[nn.Module], *, compiled: bool, checkpointed: bool) -> None:
    """Replaces the blocks' `forward`; their names and parameters stay.

    compiled: one graph serves every block and size. checkpointed: a block keeps only its input; what it drew, as dropout
    does, is drawn alike the second time.
    """
    for block in blocks:
        forward = torch.compile(block.forward, dynamic=True) if compiled else block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False) if checkpointed else forward
