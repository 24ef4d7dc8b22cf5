"""What the loop does to transformer blocks: compile them, compute them anew in the backward pass, make them faster and leaner."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import BlockInputs, PixArtBlock, normalized
from .cpu_attention import keep_probabilities
from .linear import add_adapters_in_place, cast_weights_anew


def wrap_blocks(blocks: Iterable[nn.Module], *, compiled: bool, checkpointed: bool) -> None:
    """Replaces the blocks' `forward`, or that of their layers; names and parameters stay.

    compiled: one graph serves every block and size. checkpointed: a block keeps little more than its input; what it drew, as dropout
    does, is drawn alike the second time.
    """
    blocks = list(blocks)
    if not compiled:  # a graph keeps what it likes
        keep_probabilities(blocks, checkpointed)
    for block in blocks:
        if not compiled:
            add_adapters_in_place(block)
            cast_weights_anew(block, keep_copies=checkpointed)
        if not (compiled or checkpointed):
            continue
        forward = torch.compile(block.forward, dynamic=True) if compiled else block.forward
        if checkpointed and not compiled and type(block) is PixArtBlock:
            block.forward = partial(_checkpointed, block, forward)
        else:
            block.forward = partial(checkpoint, forward, use_reentrant=False) if checkpointed else forward


def _checkpointed(block: PixArtBlock, forward: Callable[[BlockInputs], Tensor], inputs: BlockInputs) -> Tensor:
    """The block's output. A last layer that isn't trained needs nothing for its backward pass but its weight, so it isn't computed twice.

    It is a twelfth of the arithmetic of a LoRA's step at 512 px. Weights in another dtype than autocast's would be kept as copies.
    """
    last = block.mlp.fc2
    trained = any(value.requires_grad for value in (*last.parameters(), block.scale_shift_table, inputs.modulation))
    if type(last) is not nn.Linear or trained or last.weight.dtype != inputs.context.dtype:
        return checkpoint(forward, inputs, use_reentrant=False)
    hidden, wide, gate = checkpoint(_until_last_layer, block, inputs, use_reentrant=False)
    return torch.addcmul(hidden, gate, last(wide))


def _until_last_layer(block: PixArtBlock, inputs: BlockInputs) -> tuple[Tensor, Tensor, Tensor]:
    hidden, (shift, scale, gate) = block.attended(inputs)
    return hidden, block.mlp.widened(normalized(block.norm2, hidden, shift, scale, inputs.context.dtype)), gate
