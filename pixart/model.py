"""The PixArt transformer: one model for alpha, Sigma, delta and small ones. `forward` reads top to bottom."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionFunction, OneToken, torch_attention
from .config import TransformerConfig
from .embeddings import CaptionEmbedder, PatchEmbedder, Positions, SinusoidEmbedder, add_positions, axis_positions
from .errors import InputError
from .kv_compress import KVCompression, listed, plan_blocks
from .layers import BlockInputs, FinalLayer, PixArtBlock
from .linear import LinearFunction, torch_linear

BlockWrapper = Callable[[BlockInputs, Callable[[BlockInputs], Tensor]], Tensor]
PIXELS_PER_LATENT = 8


class PixArtTransformer(nn.Module):
    """Predicts noise (and variance) of a latent. Parameter names are those of the original code.

    `operations` makes the layers (torch.nn, or a host's factory with the same names), `attention` is the one
    attention function of every block, `linear` calls their linear layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        operations: Any = nn,
        attention: AttentionFunction = torch_attention,
        linear: LinearFunction = torch_linear,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        factory = {"dtype": dtype, "device": device}
        ratios = dict(config.compressed_blocks)
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, size, operations, **factory)
        self.t_embedder = SinusoidEmbedder(size, operations, **factory)
        self.t_block = nn.Sequential(nn.SiLU(), operations.Linear(size, 6 * size, bias=True, **factory))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, size, config.max_tokens, config.null_caption, operations, **factory
        )
        if config.micro_condition:
            self.csize_embedder = SinusoidEmbedder(size // 3, operations, **factory)
            self.ar_embedder = SinusoidEmbedder(size // 3, operations, **factory)
        self.blocks = nn.ModuleList(
            PixArtBlock(
                size, config.num_heads, config.mlp_hidden, attention, operations,
                ratio=ratios.get(i, 1), mode=config.compression_mode, qk_norm=config.qk_norm, linear=linear, **factory,
            )  # fmt: skip
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(size, config.patch_size, config.out_channels, operations, **factory)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
        *,
        block_wrappers: Mapping[int, BlockWrapper] | None = None,
        block_residuals: Mapping[int, Tensor] | None = None,
        attention_options: Any = None,
        kv_compression: Sequence[KVCompression] = (),
        positions: Positions | None = None,
        one_token: OneToken | None = None,
    ) -> Tensor:
        """Predicts from a noisy latent.

        latent: (B, in_channels, H, W); timestep: (B,), 0..999; context: (B, M, caption_channels), T5
        states; context_mask: (B, M), nonzero is a real token; size: (B, 2), height and width in
        pixels, for models with micro-conditioning (default: the latent's own).
        block_wrappers: called as wrapper(inputs, block) in place of that block.
        block_residuals: (B, N, D) each, added to that block's output.
        attention_options: handed to the attention function as it is.
        kv_compression: training-free approximations that hold at this step (their percents are the caller's
        to look at), each block in at most one.
        positions: of `positions_of` a latent of this size, which is the same in every step (default: made here).
        one_token: captions that the mask shortens to their first token, of `attention.one_token_of`; they are spared
        cross-attention (default: none is).
        Returns (B, out_channels, H, W). Raises InputError where a shape doesn't fit.
        """
        self._check(latent, timestep, context, context_mask, size, block_wrappers, block_residuals, one_token)
        height, width = latent.shape[-2:]
        grid = self._grid(latent)
        self.check_grid(grid, positions)
        compression = plan_blocks(listed(kv_compression), self.config, grid[0] * grid[1])
        hidden, embedded_time = self._run_blocks(
            self.embed(latent, timestep, context, context_mask, size, attention_options, positions, one_token),
            block_wrappers or {}, block_residuals or {}, compression,
        )  # fmt: skip
        return self.unembed(hidden, embedded_time, grid)[..., :height, :width]

    def embed(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
        attention_options: Any = None,
        positions: Positions | None = None,
        one_token: OneToken | None = None,
    ) -> tuple[BlockInputs, Tensor]:
        """What the first block sees, and the embedded time (B, D), which the final layer needs too."""
        dtype = latent.dtype
        embedded_time = self._embed_time(timestep, size, latent.shape[-2:], dtype)  # (B, D)
        inputs = BlockInputs(
            hidden=self.embed_latent(latent, positions),
            context=self.y_embedder(context.to(dtype)),
            context_mask=None if context_mask is None else context_mask.bool(),
            modulation=self.t_block(embedded_time).float().unflatten(-1, (6, -1)),
            grid=self._grid(latent),
            attention_options=attention_options,
            one_token=one_token,
        )
        return inputs, embedded_time

    def embed_latent(self, latent: Tensor, positions: Positions | None = None) -> Tensor:
        """Patches with their positions, (B, N, D); a ControlNet's hint enters here too. fp32, see PixArtBlock."""
        hidden = self.x_embedder(pad_to_patches(latent, self.config.patch_size)).float()
        return add_positions(hidden, self.positions_of(latent) if positions is None else positions)

    def positions_of(self, latent: Tensor) -> Positions:
        """Positions of a latent's tokens, fp32 on its device; only its height and width matter."""
        return axis_positions(*self._grid(latent), self.config.hidden_size, self.config.position_range, latent.device)

    def unembed(self, hidden: Tensor, embedded_time: Tensor, grid: tuple[int, int]) -> Tensor:
        """The last block's output as a latent, (B, out_channels, rows * patch, columns * patch)."""
        return self._unpatchify(self.final_layer(hidden, embedded_time), grid)

    def _grid(self, latent: Tensor) -> tuple[int, int]:
        """Token rows and columns, those that are padded to whole patches included."""
        patch = self.config.patch_size
        return -(-latent.shape[-2] // patch), -(-latent.shape[-1] // patch)

    def _embed_time(self, timestep: Tensor, size: Tensor | None, latent_size: tuple[int, int], dtype) -> Tensor:
        embedded = self.t_embedder(timestep, dtype)
        if not self.config.micro_condition:
            return embedded
        if size is None:
            size = pixel_size(timestep, *latent_size)
        size = size.float()
        ratio = size[:, :1] / size[:, 1:]
        return embedded + torch.cat([self.csize_embedder(size, dtype), self.ar_embedder(ratio, dtype)], dim=-1)

    def _run_blocks(
        self,
        embedded: tuple[BlockInputs, Tensor],
        wrappers: Mapping[int, BlockWrapper],
        residuals: Mapping[int, Tensor],
        compression: Mapping[int, KVCompression],
    ) -> tuple[Tensor, Tensor]:
        """The last block's output, and the embedded time as it was given.

        The embedding comes without a name at the caller, which would keep the first tokens alive through all blocks.
        """
        inputs, embedded_time = embedded
        del embedded
        hidden = inputs.hidden
        for index, block in enumerate(self.blocks):
            inputs = replace(inputs, hidden=hidden, compression=compression.get(index))
            wrapper = wrappers.get(index)
            hidden = block(inputs) if wrapper is None else wrapper(inputs, block)
            if index in residuals:
                hidden = hidden + residuals[index]
        return hidden, embedded_time

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        patch = self.config.patch_size
        return rearrange(
            tokens, "b (r c) (p q k) -> b k (r p) (c q)", r=grid[0], c=grid[1], p=patch, q=patch
        )

    def _check(self, latent, timestep, context, context_mask, size, wrappers, residuals, one_token) -> None:
        """Everything a caller can get wrong about shapes, before any work is done."""
        config, batch = self.config, latent.shape[0]
        if latent.ndim != 4 or latent.shape[1] != config.in_channels or 0 in latent.shape:
            raise InputError(
                f"latent has shape {tuple(latent.shape)}; expected (batch, {config.in_channels}, height/8, width/8)."
            )
        if timestep.shape != (batch,):
            raise InputError(f"timestep has shape {tuple(timestep.shape)}; expected ({batch},), one per latent.")
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != config.caption_channels:
            raise InputError(
                f"context has shape {tuple(context.shape)}; expected ({batch}, tokens, {config.caption_channels}). "
                "The text encoder's width must be the one this model was trained with."
            )
        if context_mask is not None and context_mask.shape != context.shape[:2]:
            raise InputError(
                f"context_mask has shape {tuple(context_mask.shape)}; expected {tuple(context.shape[:2])}."
            )
        if one_token is not None and not 0 <= one_token.start < one_token.stop <= batch:
            raise InputError(f"one_token names captions {one_token.start} to {one_token.stop - 1}; expected some of 0 to {batch - 1}.")
        if size is not None and not config.micro_condition:
            raise InputError("size was given, but this model has no size conditioning (only alpha-1024 has it); leave it out.")
        if size is not None and size.shape != (batch, 2):
            raise InputError(f"size has shape {tuple(size.shape)}; expected ({batch}, 2): height and width in pixels.")
        for name, hooks in (("block_wrappers", wrappers), ("block_residuals", residuals)):
            outside = sorted(i for i in hooks or () if not 0 <= i < config.depth)
            if outside:
                raise InputError(f"{name} names block(s) {outside}; this model has blocks 0..{config.depth - 1}.")

    def check_grid(self, grid: tuple[int, int], positions: Positions | None = None) -> None:
        """Raises InputError unless positions are of this size and trained compression, which floors the grid, leaves something of it."""
        given = grid if positions is None else tuple(map(len, positions))
        if given != grid:
            raise InputError(f"positions are of {given[0]} x {given[1]} tokens; expected {grid[0]} x {grid[1]}, those of this latent.")
        every = self.config.compression_mode == "uniform_every"
        cells = grid[0] * grid[1] if every else min(grid)
        for block, ratio in self.config.compressed_blocks:
            if cells < ratio:
                pixels = ratio * self.config.patch_size * PIXELS_PER_LATENT
                raise InputError(
                    f"block {block} compresses keys and values by {ratio}, which leaves nothing of {grid[0]} x {grid[1]} tokens; "
                    + (f"expected at least {ratio} tokens." if every else f"expected sides of at least {pixels} px.")
                )


def pixel_size(timestep: Tensor, height: int, width: int) -> Tensor:
    """(B, 2), height and width in pixels of a latent of this size; timestep: (B,).

    Filled on the device: a tensor made from a list would be copied there, and waited for, in every step.
    """
    sides = [torch.full_like(timestep, side * PIXELS_PER_LATENT, dtype=torch.float32) for side in (height, width)]
    return torch.stack(sides, dim=1)


def pad_to_patches(latent: Tensor, patch_size: int) -> Tensor:
    """Repeats the last row or column until both sides divide by the patch size."""
    bottom = -latent.shape[-2] % patch_size
    right = -latent.shape[-1] % patch_size
    return F.pad(latent, (0, right, 0, bottom), mode="replicate") if bottom or right else latent
