"""Adapters on a model as deep as PixArt-900M: LoRA and ControlNet reach its last block."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.nodes.test_controlnet import applied, expected_hint, loader, picture, steps_of
from tests.support import host
from tests.support.checkpoint_factory import diffusers_config, reference_model
from tests.support.host_models import ADDED, captions, difference, load_model, sample, write_model
from tests.support.tiny_control import original_keys, reference_control, reference_forward

DEPTH, HIDDEN = 42, 72
Loader = host.pack_module("nodes.lora").PixArtLoraLoader


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Sigma of 42 narrow blocks."""
    return write_model(tmp_path_factory.mktemp("deep"), depth=DEPTH, hidden=HIDDEN)


def test_a_lora_on_every_block(file: Path, models: Path) -> None:
    """Split q and v under diffusers' names, on each of the 42 fused weights."""
    order = torch.Generator().manual_seed(0)
    tensors, summed = {}, load_file(file)
    for block in range(DEPTH):
        for part, name in ((0, "to_q"), (2, "to_v")):
            up, down = (torch.randn(shape, generator=order) * 0.1 for shape in ((HIDDEN, 2), (2, HIDDEN)))
            tensors[f"transformer.transformer_blocks.{block}.attn1.{name}.lora_B.weight"] = up
            tensors[f"transformer.transformer_blocks.{block}.attn1.{name}.lora_A.weight"] = down
            summed[f"blocks.{block}.attn.qkv.weight"][part * HIDDEN : (part + 1) * HIDDEN] += 0.6 * up @ down
    save_file(tensors, models / "loras" / "deep.safetensors")
    save_file(summed, models / "summed.safetensors")
    model = load_model(file)
    output = Loader.execute(model, "deep.safetensors", 0.6)
    assert f"{4 * DEPTH} of {4 * DEPTH} keys applied ({2 * DEPTH} layers" in output.ui.as_dict()["text"][0]
    each = (output.result[0], load_model(models / "summed.safetensors"), model)
    found, expected, plain = (sample(one, captions(5), captions(2, seed=1), steps=1) for one in each)
    assert difference(found, expected) < ADDED
    assert difference(found, plain) > 1e-2


def test_a_controlnet_of_as_many_blocks_as_fit(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """41 copies on 42 blocks: each residual beside diffusers' blocks."""
    adapter = reference_control(HIDDEN, DEPTH - 1)
    save_file(original_keys(adapter), tmp_path / "control.safetensors")
    model = load_model(file)
    seen = steps_of(model, monkeypatch)
    found = sample(model, *applied(loader.load_control(str(tmp_path / "control.safetensors")), strength=0.3), steps=1)
    assert difference(found, sample(model, captions(5), captions(3, seed=1), steps=1)) > 1e-2
    x, timesteps, context, mask, given = seen[0]
    hint = expected_hint(picture()).expand(len(x), -1, -1, -1)
    mask = torch.ones(context.shape[:2]) if mask is None else mask
    base = reference_model(diffusers_config(depth=DEPTH, hidden=HIDDEN))
    _, (expected,) = reference_forward(base, [(adapter, hint, 0.3)], x, timesteps, context, mask)
    assert len(given["input"]) == len(expected) == DEPTH - 1
    for ours, theirs in zip(given["input"], expected, strict=True):
        assert difference(ours, 0.3 * theirs) < 1e-3
