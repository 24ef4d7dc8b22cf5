"""The transformer block, its modulation, and the final layer."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFunction, CrossAttention, OneToken, SelfAttention
from .kv_compress import KVCompression
from .linear import LinearFunction, torch_linear


@dataclass(frozen=True)
class BlockInputs:
    """Everything one block sees; a block wrapper may pass on a changed copy (`dataclasses.replace`)."""

    hidden: Tensor  # (B, N, D), fp32 whatever the model's dtype
    context: Tensor  # (B, M, D), projected caption tokens, in the dtype of computation
    context_mask: Tensor | None  # bool (B, M), True is a real token
    modulation: Tensor  # (B, 6, D), fp32, the same for every block
    grid: tuple[int, int]  # token rows and columns
    attention_options: Any = None
    identity_attention: bool = False  # self-attention without mixing of tokens, for perturbed-attention guidance
    compression: KVCompression | None = None  # training-free, of this block
    one_token: OneToken | None = None  # what is known of context_mask; whoever changes context or mask sets None
    cross_output: Callable[[Tensor], Tensor] | None = None  # a host's patch of what cross-attention adds, (B, N, D)


def normalized(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's output, scaled and shifted, in `dtype`. x: (B, N, D); shift, scale: (B, 1, D); all fp32.

    For one picture a CPU does it in one pass instead of three; a graph does so by itself.
    """
    weight = 1 + scale
    if len(x) > 1 or x.device.type != "cpu" or x.dtype != weight.dtype or torch.compiler.is_compiling():
        return torch.addcmul(shift, norm(x), weight).to(dtype)
    return F.layer_norm(x, norm.normalized_shape, weight[0, 0], shift[0, 0], norm.eps).to(dtype)


def cast_table(table: Tensor, like: Tensor) -> Tensor:
    """A raw parameter at the dtype and device of use; hosts may keep it elsewhere.

    In a host's low-VRAM mode each prediction copies the 29 tables one by one, as with ComfyUI's own PixArt: 0.8 MB in
    fp32 for XL, beside 1.2 GB of matrices that travel too.
    """
    return table.to(dtype=like.dtype, device=like.device)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, hidden_size, mlp_hidden, operations, linear: LinearFunction = torch_linear, **factory) -> None:
        super().__init__()
        self.linear = linear
        self.fc1 = operations.Linear(hidden_size, mlp_hidden, bias=True, **factory)
        self.fc2 = operations.Linear(mlp_hidden, hidden_size, bias=True, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.fc2, self.widened(x))

    def widened(self, x: Tensor) -> Tensor:
        """What the last layer sees."""
        return self.linear(self.fc1, x, gelu=True)


class PixArtBlock(nn.Module):
    """adaLN-single block (PixArt-alpha, section 2.3): gated self-attention, cross-attention, gated MLP."""

    def __init__(
        self, hidden_size, num_heads, mlp_hidden, attention: AttentionFunction, operations, ratio=1, mode="conv", qk_norm=False,
        linear: LinearFunction = torch_linear, **factory,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = operations.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6, **factory)
        how = {"ratio": ratio, "mode": mode, "qk_norm": qk_norm}
        self.attn = SelfAttention(hidden_size, num_heads, attention, operations, **how, linear=linear, **factory)
        self.cross_attn = CrossAttention(hidden_size, num_heads, attention, operations, linear=linear, **factory)
        self.norm2 = operations.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6, **factory)
        self.mlp = Mlp(hidden_size, mlp_hidden, operations, linear=linear, **factory)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size, **factory))

    def forward(self, inputs: BlockInputs) -> Tensor:
        """Returns the next hidden tokens, (B, N, D).

        Sums, norms and modulation stay in fp32: over 28 blocks that brings the error of bf16 from
        1.7e-2 to 4e-3, for a few elementwise casts.
        """
        hidden, (shift, scale, gate) = self.attended(inputs)
        return torch.addcmul(hidden, gate, self.mlp(normalized(self.norm2, hidden, shift, scale, inputs.context.dtype)))

    def attended(self, inputs: BlockInputs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Hidden tokens after both attentions, and the MLP's shift, scale and gate, (B, 1, D) each."""
        hidden, context, options = inputs.hidden, inputs.context, inputs.attention_options
        dtype = context.dtype
        table = cast_table(self.scale_shift_table, inputs.modulation)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (table + inputs.modulation).chunk(6, dim=1)
        # No names for what passes between: a name would keep it alive while the MLP needs the memory.
        hidden = torch.addcmul(hidden, gate_attn, self.attn(
            normalized(self.norm1, hidden, shift_attn, scale_attn, dtype), inputs.grid, options, inputs.compression,
            inputs.identity_attention,
        ))  # fmt: skip
        crossed = self.cross_attn(hidden.to(dtype), context, inputs.context_mask, options, inputs.one_token)
        hidden = hidden + (crossed if inputs.cross_output is None else inputs.cross_output(crossed))
        return hidden, (shift_mlp, scale_mlp, gate_mlp)


class FinalLayer(nn.Module):
    """LayerNorm, modulation by the un-projected timestep embedding, Linear to patches."""

    def __init__(self, hidden_size, patch_size, out_channels, operations, **factory) -> None:
        super().__init__()
        self.norm_final = operations.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6, **factory)
        self.linear = operations.Linear(hidden_size, patch_size * patch_size * out_channels, bias=True, **factory)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, hidden_size, **factory))

    def forward(self, hidden: Tensor, timestep: Tensor) -> Tensor:
        """hidden: (B, N, D) in fp32; timestep: (B, D) -> (B, N, p*p*out_channels) in the timestep's dtype."""
        table = cast_table(self.scale_shift_table, hidden) + timestep[:, None]
        shift, scale = table.chunk(2, dim=1)
        return self.linear(normalized(self.norm_final, hidden, shift, scale, timestep.dtype))
