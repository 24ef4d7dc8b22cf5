"""The core's transformer under the host's forward contract: wrappers, block replacement, control, overrides."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.ldm.common_dit
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...pixart.attention import OneToken
from ...pixart.config import TransformerConfig
from ...pixart.embeddings import Positions
from ...pixart.errors import InputError
from ...pixart.kv_compress import KVCompression
from ...pixart.layers import BlockInputs
from ...pixart.model import PixArtTransformer, pixel_size
from .attention import host_attention
from .conds import ONE_TOKEN
from .linear import host_linear

Block = Callable[[BlockInputs], Tensor]
# What may change from step to step reaches the network as an argument of its own, by these names. The host's
# TorchCompileModel drops guards on transformer_options: a graph would keep for good what it found there at first.
KV_COMPRESSION, IDENTITY_BLOCKS, SKIPPED_BLOCKS = "kv_compression", "identity_blocks", "skipped_blocks"
ATTENTION_OVERRIDE = "optimized_attention_override"  # the host's own
ReplacedBlocks = Mapping[tuple[str, int], Callable[[dict, dict], dict]]


class Weakened(NamedTuple):
    """Blocks that a weakened prediction changes, for guidance away from it."""

    identity_blocks: Sequence[int] = ()
    skipped_blocks: Sequence[int] = ()


class HostTransformer(PixArtTransformer):
    """PixArt as a `diffusion_model` of the host; returns the noise alone, (B, in_channels, H, W)."""

    def __init__(self, config: TransformerConfig, *, operations: Any, dtype: torch.dtype | None, device: Any) -> None:
        super().__init__(config, operations=operations, attention=host_attention, linear=host_linear, dtype=dtype, device=device)
        self.dtype = dtype  # the host reads the dtype of the weights here
        self.patch_size = config.patch_size
        # As the host's own PixArt has them; nodes of the host and of other packs read them.
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.depth, self.num_heads, self.hidden_size = config.depth, config.num_heads, config.hidden_size
        self.pred_sigma, self.micro_conditioning = config.out_channels == 2 * config.in_channels, config.micro_condition

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
        positions: Positions | None = None,
        crossattn_controlnet: Tensor | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        kv_compression: Sequence[KVCompression] = (),
        identity_blocks: Sequence[int] = (),
        skipped_blocks: Sequence[int] = (),
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """x: (B, C, H, W) in the dtype of computation; see `PixArtTransformer.forward` for the others.

        control: {"input": residuals (B, tokens, D) or None, per block}. crossattn_controlnet is for the
        ControlNet, which has read it already. identity_blocks: whose self-attention doesn't mix tokens, on top of any
        replacement; skipped_blocks: that change nothing. transformer_options stays last: EasyCache looks for it there.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._denoise, self, wrappers)
        weakened = Weakened(identity_blocks, skipped_blocks)
        return executor.execute(x, timesteps, context, context_mask, size, positions, control, kv_compression, weakened, options)

    def _denoise(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        size: Tensor | None,
        positions: Positions | None,
        control: dict[str, list[Tensor | None]] | None,
        kv_compression: Sequence[KVCompression],
        weakened: Weakened,
        transformer_options: dict[str, Any],
    ) -> Tensor:
        height, width = x.shape[-2:]
        padded, size = self._padded(x, timesteps, size)
        tokens = padded.shape[-2] * padded.shape[-1] // self.patch_size**2
        options = self._block_options(transformer_options)
        out = super().forward(
            padded,
            timesteps,
            context,
            context_mask,
            size,
            block_wrappers=_block_wrappers(self.config.depth, options, weakened),
            block_residuals=control_residuals(control, self.config, tokens),
            attention_options=options,
            kv_compression=kv_compression,
            positions=self.fitting(positions, x),
            one_token=one_token_in(context_mask, options),
        )
        return out[:, : self.config.in_channels, :height, :width]

    def first_block(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        size: Tensor | None,
        positions: Positions | None,
        identity_blocks: Sequence[int],
        skipped_blocks: Sequence[int],
        transformer_options: dict[str, Any],
    ) -> BlockInputs:
        """What block 1 would see without control: where a ControlNet branches off. Arguments as in `forward`."""
        padded, size = self._padded(x, timesteps, size)
        options = self._block_options(transformer_options)
        one_token = one_token_in(context_mask, options)
        inputs, _ = self.embed(padded, timesteps, context, context_mask, size, options, self.fitting(positions, x), one_token)
        hidden = _block_wrappers(1, options, Weakened(identity_blocks, skipped_blocks))[0](inputs, self.blocks[0])
        return replace(inputs, hidden=hidden)

    def _padded(self, x: Tensor, timesteps: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The latent in whole patches, and the size of the picture before that, for alpha-1024."""
        if size is None and self.config.micro_condition:
            size = pixel_size(timesteps, *x.shape[-2:])
        return comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size,) * 2, padding_mode="replicate"), size

    def fitting(self, positions: Positions | None, latent: Tensor) -> Positions | None:
        """The positions of the conditioning, or None for a part of the picture: areas and tiles are placed as whole pictures."""
        fits = positions is not None and tuple(map(len, positions)) == self._grid(latent)
        return tuple(each.to(latent.device) for each in positions) if fits else None

    def check_grid(self, grid: tuple[int, int], positions: Positions | None = None) -> None:
        """As the core's, with the node's name: an area of a picture may be too small where the picture isn't."""
        try:
            super().check_grid(grid, positions)
        except InputError as error:
            problem = str(error)
        else:
            return
        raise InputError(f"PixArtModelLoader's model: {problem}")  # torch.compile traces no "from"

    def _block_options(self, transformer_options: dict[str, Any]) -> dict[str, Any]:
        return {**transformer_options, "total_blocks": self.config.depth, "block_type": "double"}


def one_token_in(mask: Tensor | None, options: dict[str, Any]) -> OneToken | None:
    """What is known of a mask that nobody changed; None where a patch of attention wants to see every caption."""
    return None if mask is None or ATTENTION_OVERRIDE in options else getattr(mask, ONE_TOKEN, None)


def _patched_outputs(inputs: BlockInputs, options: dict[str, Any]) -> BlockInputs:
    """With the patches that nodes such as NAGuidance put on attention outputs: here that of cross-attention, which alone reads the
    prompt. They may write into the tensor they are given, which is the block's own."""
    patches = options.get("patches", {}).get("attn1_output_patch", ())
    if not patches:
        return inputs

    def patched(out: Tensor) -> Tensor:
        for patch in patches:
            out = patch(out, inputs.attention_options)
        return out

    return replace(inputs, cross_output=patched, one_token=None)


def _block_wrappers(depth: int, options: dict[str, Any], weakened: Weakened) -> dict[int, Callable[[BlockInputs, Block], Tensor]]:
    """One wrapper per block: says which block is running, and calls the host's replacement if there is one."""
    replaced: ReplacedBlocks = options.get("patches_replace", {}).get("dit", {})

    def wrapper(index: int) -> Callable[[BlockInputs, Block], Tensor]:
        replacement = replaced.get(("double_block", index))

        def run(inputs: BlockInputs, block: Block) -> Tensor:
            if index in weakened.skipped_blocks:
                return inputs.hidden
            inputs.attention_options["block_index"] = index  # our own copy of transformer_options
            inputs = _patched_outputs(inputs, inputs.attention_options)
            if index in weakened.identity_blocks:
                inputs = replace(inputs, identity_attention=True)
            return block(inputs) if replacement is None else _call_replacement(replacement, inputs, block)

        return run

    return {index: wrapper(index) for index in range(depth)}


def _call_replacement(replacement: Callable[[dict, dict], dict], inputs: BlockInputs, block: Block) -> Tensor:
    """Calls a `patches_replace["dit"]` entry with the arguments Flux gives to its double blocks.

    img: (B, N, D), fp32; txt: (B, M, D), projected captions, which PixArt's blocks read but don't change;
    vec: (B, 6, D), fp32, the modulation; pe: None, positions are added before the first block.
    """

    def original(args: dict[str, Any]) -> dict[str, Any]:
        mask = args.get("attn_mask", inputs.context_mask)
        changed = replace(
            inputs,
            hidden=args["img"],
            context=args["txt"],
            modulation=args["vec"],
            context_mask=mask,
            one_token=inputs.one_token if mask is inputs.context_mask else None,
            attention_options=args.get("transformer_options", inputs.attention_options),
        )
        return {"img": block(changed), "txt": args["txt"]}

    args = {
        "img": inputs.hidden,
        "txt": inputs.context,
        "vec": inputs.modulation,
        "pe": None,
        "attn_mask": inputs.context_mask,
        "transformer_options": inputs.attention_options,
    }
    return replacement(args, {"original_block": original})["img"]


def control_residuals(
    control: dict[str, list[Tensor | None]] | None, config: TransformerConfig, tokens: int
) -> dict[int, Tensor]:
    """Block index -> residual (B, N, D), from the host's `control`; raises InputError for another model's ControlNet."""
    if control is None:
        return {}
    strangers = [kind for kind, given in control.items() if kind != "input" and any(r is not None for r in given)]
    residuals = {i: r for i, r in enumerate(control.get("input", ())) if r is not None}
    wrong = [f"{i}: {tuple(r.shape)}" for i, r in residuals.items() if r.shape[1:] != (tokens, config.hidden_size)]
    outside = [i for i in residuals if i >= config.depth]
    if strangers or wrong or outside:
        found = [f"outputs {strangers}"] * bool(strangers) + [f"residual of block {text}" for text in wrong]
        found += [f"residuals for blocks {outside}"] * bool(outside)
        raise InputError(
            f"This ControlNet isn't for this PixArt model: found {'; '.join(found)}; expected residuals of shape "
            f"(batch, {tokens}, {config.hidden_size}) for blocks 0..{config.depth - 1} under 'input'. "
            "Remove it or choose a PixArt ControlNet."
        )
    return residuals
