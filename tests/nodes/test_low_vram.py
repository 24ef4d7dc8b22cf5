"""A MODEL that the card can't hold: weights that are moved for each use give the same picture, LoRA included."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nodes as host_nodes
from tests.support.host_models import captions, difference, forward, noise

HELD = 64  # bytes that may stay on the device: as good as nothing


@pytest.fixture
def with_lora(sigma, models: Path):
    """The tiny Sigma with a LoRA on one layer of each of two blocks."""
    order = torch.Generator().manual_seed(0)
    hidden = sigma.model.diffusion_model.config.hidden_size
    lora = {}
    for name, rows in {"blocks.0.attn.qkv": 3 * hidden, "blocks.2.cross_attn.proj": hidden}.items():
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=order) * 0.2
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, hidden, generator=order) * 0.2
    save_file(lora, str(models / "loras" / "test.safetensors"))
    return host_nodes.LoraLoaderModelOnly().load_lora_model_only(sigma, "test.safetensors", 1.0)[0]


def drawn(model, **patch) -> torch.Tensor:
    """One forward on weights as the host patched them; undone afterwards."""
    model.patch_model(torch.device("cpu"), **patch)
    try:
        with torch.inference_mode():
            return forward(model, noise(), torch.tensor([500.0]), captions(5)[0][0])
    finally:
        model.unpatch_model(torch.device("cpu"))


def test_weights_cast_at_each_use_draw_the_same(sigma, with_lora) -> None:
    plain = drawn(sigma)
    whole = drawn(with_lora)
    piecewise = drawn(with_lora, lowvram_model_memory=HELD)
    assert difference(whole, plain) > 1e-2
    assert difference(piecewise, whole) < 1e-5
    assert torch.equal(drawn(sigma), plain)


def test_low_vram_really_leaves_weights_behind(with_lora) -> None:
    with_lora.patch_model(torch.device("cpu"), lowvram_model_memory=HELD)
    layers = [m for m in with_lora.model.diffusion_model.modules() if hasattr(m, "comfy_cast_weights")]
    waiting = [layer for layer in layers if getattr(layer, "comfy_patched_weights", False) is not True]
    assert len(waiting) > len(layers) / 2
    with_lora.unpatch_model(torch.device("cpu"))
