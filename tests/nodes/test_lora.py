"""LoRA through the host's own loader: fused and split names, strength, and back."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes as host_nodes
from tests.support.host_models import ADDED, captions, difference, load_model, sample

RANK, HIDDEN = 4, 144


def pair(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down matrices of one layer."""
    order = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=order) * 0.2, torch.randn(RANK, columns, generator=order) * 0.2


def native() -> tuple[dict, dict]:
    """A LoRA on native names, and the change of each weight that it means."""
    lora, deltas = {}, {}
    for seed, (name, rows) in enumerate({"blocks.0.attn.qkv": 3 * HIDDEN, "blocks.1.mlp.fc1": 4 * HIDDEN}.items()):
        up, down = pair(rows, HIDDEN, seed)
        lora[f"diffusion_model.{name}.lora_up.weight"], lora[f"diffusion_model.{name}.lora_down.weight"] = up, down
        deltas[f"{name}.weight"] = up @ down
    return lora, deltas


def diffusers() -> tuple[dict, dict]:
    """A LoRA on diffusers names, as PEFT writes them; split projections patch slices of the fused weights."""
    lora, deltas = {}, {}
    places = {
        "attn1.to_q": ("attn.qkv", 0, 3),
        "attn1.to_v": ("attn.qkv", 2, 3),
        "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
        "attn2.to_q": ("cross_attn.q_linear", 0, 1),
    }
    for seed, (name, (target, part, parts)) in enumerate(places.items()):
        up, down = pair(HIDDEN, HIDDEN, seed)
        lora[f"transformer.transformer_blocks.2.{name}.lora_A.weight"] = down
        lora[f"transformer.transformer_blocks.2.{name}.lora_B.weight"] = up
        delta = deltas.setdefault(f"blocks.2.{target}.weight", torch.zeros(parts * HIDDEN, HIDDEN))
        delta[part * HIDDEN : (part + 1) * HIDDEN] += up @ down
    return lora, deltas


@pytest.mark.parametrize("make", [native, diffusers])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_lora_changes_exactly_its_weights(sigma, sigma_file: Path, models: Path, make, strength: float) -> None:
    """The picture is that of a file to whose weights the products were added."""
    lora, deltas = make()
    save_file(lora, str(models / "loras" / "test.safetensors"))
    summed = {key: value + strength * deltas.pop(key, 0) for key, value in load_file(sigma_file).items()}
    assert not deltas
    save_file(summed, str(models / "summed.safetensors"))

    plain = sample(sigma, captions(5), captions(2, seed=1))
    patched = host_nodes.LoraLoaderModelOnly().load_lora_model_only(sigma, "test.safetensors", strength)[0]
    changed = sample(patched, captions(5), captions(2, seed=1))
    expected = sample(load_model(models / "summed.safetensors"), captions(5), captions(2, seed=1))
    assert difference(changed, expected) < ADDED
    assert difference(changed, plain) > 1e-2
    assert torch.equal(sample(sigma, captions(5), captions(2, seed=1)), plain)


def test_every_key_finds_its_layer(sigma) -> None:
    """No layer of the model is out of a LoRA's reach."""
    import comfy.lora

    reached = comfy.lora.model_lora_keys_unet(sigma.model, {}).values()
    weights = {target if isinstance(target, str) else target[0] for target in reached}
    linear = {key for key in sigma.model.state_dict() if key.endswith(".weight") and key.startswith("diffusion_model.")}
    assert linear <= weights
