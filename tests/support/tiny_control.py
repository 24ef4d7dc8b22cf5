"""Tiny random ControlNets in every layout, and their outputs computed once more with diffusers' own blocks."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear


class ReferenceControl(nn.Module):
    """The adapter as diffusers' example and SimpleTuner store it: `controlnet_blocks.i.*`."""

    def __init__(self, hidden: int, depth: int) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.controlnet_blocks = nn.ModuleList()
        for i in range(depth):
            block = nn.Module()
            if i == 0:
                block.before_proj = Linear(hidden, hidden)
            block.transformer_block = BasicTransformerBlock(
                hidden, hidden // 72, 72, cross_attention_dim=hidden, activation_fn="gelu-approximate", attention_bias=True,
                norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, num_embeds_ada_norm=1000,
            )  # fmt: skip
            block.after_proj = Linear(hidden, hidden)
            self.controlnet_blocks.append(block)

    def randomize(self, seed: int) -> ReferenceControl:
        """Weights large enough that each of them shows."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                scale = 0.02 if name.endswith("bias") else 0.3 if "scale_shift" in name else weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        return self.eval().requires_grad_(False)


def reference_control(hidden: int = 144, depth: int = 2, seed: int = 5) -> ReferenceControl:
    """A random adapter."""
    return ReferenceControl(hidden, depth).randomize(seed)


def original_keys(adapter: ReferenceControl) -> dict[str, Tensor]:
    """The same weights under the names of PixArt-delta's training code, spelled out once more."""
    plain = {
        "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear", "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    for i, block in enumerate(adapter.controlnet_blocks):
        state = block.state_dict()
        here = f"controlnet.{i}"
        for leaf in ("weight", "bias"):
            for name in ("before_proj", "after_proj"):
                if f"{name}.{leaf}" in state:
                    out[f"{here}.{name}.{leaf}"] = state.pop(f"{name}.{leaf}")
            joined = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v")}
            for native, sources in joined.items():
                parts = [state.pop(f"transformer_block.{source}.{leaf}") for source in sources]
                out[f"{here}.copied_block.{native}.{leaf}"] = torch.cat(parts)
            for source, native in plain.items():
                out[f"{here}.copied_block.{native}.{leaf}"] = state.pop(f"transformer_block.{source}.{leaf}")
        out[f"{here}.copied_block.scale_shift_table"] = state.pop("transformer_block.scale_shift_table")
        assert not state, sorted(state)
    return out


@torch.no_grad()
def reference_forward(
    base: nn.Module, adapters: list[tuple[ReferenceControl, Tensor, float]], latent: Tensor, timestep: Tensor,
    context: Tensor, mask: Tensor | None = None, added: dict[str, Any] | None = None,
) -> tuple[Tensor, list[list[Tensor]]]:  # fmt: skip
    """diffusers' transformer with (adapter, hint, strength) each; returns the output and each adapter's residuals.

    Written from section 4 of the PixArt-delta paper: base block 0, then for i = 1, 2, ... the copy i-1 and base block i.
    """
    batch = latent.shape[0]
    bias = None if mask is None else ((1 - mask.float()) * -10000.0)[:, None]
    added = added or {"resolution": None, "aspect_ratio": None}
    modulation, embedded = base.adaln_single(timestep, added, batch_size=batch, hidden_dtype=latent.dtype)
    text = base.caption_projection(context)

    def run(block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=modulation)

    hidden = run(base.transformer_blocks[0], base.pos_embed(latent))
    states = [base.pos_embed(hint) for _, hint, _ in adapters]
    residuals: list[list[Tensor]] = [[] for _ in adapters]
    for i, block in enumerate(base.transformer_blocks[1:], start=1):
        entering = hidden  # every adapter sees the base's own output of block 0
        for n, (adapter, _, strength) in enumerate(adapters):
            if i > len(adapter.controlnet_blocks):
                continue
            copied = adapter.controlnet_blocks[i - 1]
            if i == 1:
                states[n] = entering + copied.before_proj(states[n])
            states[n] = run(copied.transformer_block, states[n])
            residuals[n].append(copied.after_proj(states[n]))
            hidden = hidden + strength * residuals[n][-1]
        hidden = run(block, hidden)
    shift, scale = (base.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    tokens = base.proj_out(base.norm_out(hidden) * (1 + scale) + shift)
    rows, columns = latent.shape[-2] // 2, latent.shape[-1] // 2
    patches = tokens.reshape(batch, rows, columns, 2, 2, -1)
    return torch.einsum("brcpqk->bkrpcq", patches).reshape(batch, -1, 2 * rows, 2 * columns), residuals
