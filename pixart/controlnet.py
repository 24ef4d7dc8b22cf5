"""ControlNet-Transformer (PixArt-delta, section 4): copies of the first blocks, whose outputs join the base's.

Base block 0 runs first. Copy 0 sees its output plus the projected hint, every later copy the one before
it; the projected output of copy i is added to the output of base block i. `ControlledTransformer` does
both in one forward; hosts that compute residuals apart call `PixArtControlNet` themselves.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionFunction, OneToken, torch_attention
from .config import HEAD_DIM, TransformerConfig
from .embeddings import Positions
from .errors import InputError
from .layers import BlockInputs, PixArtBlock
from .linear import LinearFunction, torch_linear
from .model import PixArtTransformer


@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of one ControlNet; the defaults are delta's."""

    hidden_size: int = 1152
    depth: int = 13  # copied blocks
    num_heads: int = 16
    mlp_hidden: int = 4608
    compressed_blocks: tuple[tuple[int, int], ...] = field(default=())  # (block, ratio), as in TransformerConfig
    qk_norm: bool = False  # likewise


class ControlBlock(nn.Module):
    """A copied block between projections; only the first has `before_proj`. All projections start as zero."""

    def __init__(
        self, config: ControlNetConfig, index: int, attention: AttentionFunction, operations, linear: LinearFunction, **factory
    ) -> None:
        super().__init__()
        size, ratio = config.hidden_size, dict(config.compressed_blocks).get(index, 1)
        if index == 0:
            self.before_proj = operations.Linear(size, size, bias=True, **factory)
        self.copied_block = PixArtBlock(
            size, config.num_heads, config.mlp_hidden, attention, operations, ratio=ratio, qk_norm=config.qk_norm, linear=linear, **factory
        )
        self.after_proj = operations.Linear(size, size, bias=True, **factory)


class PixArtControlNet(nn.Module):
    """Residuals for the base's blocks from a hint. Parameter names are those of the original code."""

    def __init__(
        self,
        config: ControlNetConfig,
        *,
        operations: Any = nn,
        attention: AttentionFunction = torch_attention,
        linear: LinearFunction = torch_linear,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.controlnet = nn.ModuleList(
            ControlBlock(config, i, attention, operations, linear, dtype=dtype, device=device) for i in range(config.depth)
        )

    def forward(self, inputs: BlockInputs, hint: Tensor) -> list[Tensor]:
        """One residual (B, N, D) for each of base blocks 0..depth-1, to be added to that block's output.

        inputs: what base block 1 would see (`hidden` is the output of base block 0). hint: (B, N, D),
        fp32, embedded as the base embeds its latent. Like the base's, the hidden state stays in fp32.
        """
        dtype = inputs.context.dtype
        first: ControlBlock = self.controlnet[0]
        hidden = inputs.hidden + first.before_proj(hint.to(dtype))
        residuals = []
        for block in self.controlnet:
            hidden = block.copied_block(replace(inputs, hidden=hidden))
            residuals.append(block.after_proj(hidden.to(dtype)))
        return residuals

    def check_fits(self, base: TransformerConfig) -> None:
        """Raises InputError unless the ControlNet's width, heads and depth belong to this base."""
        mine = self.config
        problems = []
        if mine.hidden_size != base.hidden_size:
            problems.append(f"it is {mine.hidden_size} wide, the model {base.hidden_size}")
        elif mine.num_heads != base.num_heads:
            problems.append(f"it has {mine.num_heads} heads, the model {base.num_heads}")
        if mine.qk_norm != base.qk_norm:
            problems.append(f"it {'normalizes' if mine.qk_norm else 'does not normalize'} queries and keys (qk_norm), other than the model")
        copied = [block for block, _ in base.compressed_blocks if block < mine.depth]
        if copied and base.compression_mode != "conv":  # which no weights of the copies could tell
            problems.append(f"its copies don't compress as the model's block(s) {copied} do, without weights ({base.compression_mode})")
        if mine.depth >= base.depth:
            problems.append(f"it has {mine.depth} blocks, but a model of depth {base.depth} takes at most {base.depth - 1}")
        if problems:
            raise InputError(
                f"This ControlNet isn't for this PixArt model: {'; '.join(problems)}. "
                "Choose the ControlNet that was trained for it, or the model that belongs to the ControlNet."
            )


class ControlledTransformer(nn.Module):
    """A frozen base and a ControlNet in one forward; only the ControlNet is registered, saved and trained."""

    def __init__(self, base: PixArtTransformer, controlnet: PixArtControlNet) -> None:
        super().__init__()
        controlnet.check_fits(base.config)
        self.controlnet = controlnet
        self._base = (base.requires_grad_(False).eval(),)  # in a tuple, so that it is no submodule

    @property
    def base(self) -> PixArtTransformer:
        """The transformer that is controlled."""
        return self._base[0]

    @property
    def config(self) -> TransformerConfig:
        """The base's."""
        return self.base.config

    def positions_of(self, latent: Tensor) -> Positions:
        """The base's."""
        return self.base.positions_of(latent)

    def _apply(self, fn, recurse: bool = True) -> ControlledTransformer:
        """Devices and dtypes change for both."""
        self.base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
        *,
        hint: Tensor,
        strength: float = 1.0,
        positions: Positions | None = None,
        one_token: OneToken | None = None,
    ) -> Tensor:
        """As `PixArtTransformer.forward`; hint: (B, in_channels, H, W), the edge map's latent."""
        base = self.base
        if hint.shape != latent.shape:
            raise InputError(f"hint has shape {tuple(hint.shape)}; expected that of the latent, {tuple(latent.shape)}.")
        height, width = latent.shape[-2:]
        with torch.no_grad():
            inputs, embedded_time = base.embed(
                latent, timestep, context, context_mask, size, positions=positions, one_token=one_token
            )
            hidden = base.blocks[0](inputs)
            hint_tokens = base.embed_latent(hint, positions)
        residuals = self.controlnet(replace(inputs, hidden=hidden), hint_tokens)
        for index, block in enumerate(base.blocks):
            if index > 0:
                hidden = block(replace(inputs, hidden=hidden))
            if index < len(residuals):
                hidden = hidden + strength * residuals[index]
        return base.unembed(hidden, embedded_time, inputs.grid)[..., :height, :width]


def heads_of(hidden_size: int) -> int | None:
    """Number of heads of a width, which weights don't tell; None if the width is no multiple of 72."""
    return None if hidden_size % HEAD_DIM else hidden_size // HEAD_DIM


@torch.no_grad()
def copy_base_blocks(controlnet: PixArtControlNet, base: PixArtTransformer) -> None:
    """Starts a ControlNet as the paper does: copies of the base's first blocks, projections of zero."""
    controlnet.check_fits(base.config)
    for block, source in zip(controlnet.controlnet, base.blocks):
        block.copied_block.load_state_dict(source.state_dict())
        projections = [block.after_proj] + ([block.before_proj] if hasattr(block, "before_proj") else [])
        for layer in projections:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
