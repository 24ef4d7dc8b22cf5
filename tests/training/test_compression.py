"""KV compression that begins in a trained model: what it keeps, and a run that starts with it."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pixart.checkpoints import inspect_file, load_transformer
from pixart.checkpoints.keys import to_native
from pixart.config import TransformerConfig
from pixart.errors import ConfigError
from pixart.model import PixArtTransformer
from pixart.training import initialize
from pixart.training.compression import begin_compression
from pixart.training.loop import Loop
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.state import newest_state
from tests.support.checkpoint_factory import diffusers_config, reference_model

CONFIG = TransformerConfig(hidden_size=144, depth=3, num_heads=2, mlp_hidden=576, caption_channels=32, null_caption=False)
BLOCKS = {1: 2, 2: 2}


@pytest.fixture
def plain():
    """A model whose keys are short, and whose values are long and have something in common."""
    model = PixArtTransformer(CONFIG)
    model.load_state_dict(to_native(reference_model(diffusers_config(depth=3)).state_dict()))
    for block in model.blocks:
        block.attn.qkv.weight.data[144:288] *= 0.4
        block.attn.qkv.weight.data[288:] *= 3
        block.attn.qkv.bias.data[288:] += 0.5 * torch.randn(144, generator=torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def compressed(plain):
    """The same weights, with compression layers as torch makes them."""
    model = PixArtTransformer(replace(CONFIG, compressed_blocks=tuple(BLOCKS.items())))
    model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval().requires_grad_(False)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, 12, 16, generator=generator), torch.tensor([0.0, 300, 600, 999]), torch.randn(4, 3, 32, generator=generator)


def test_mean_of_cells_with_scores_and_values_of_the_usual_size(plain):
    model = compressed(plain)
    before = model.blocks[1].attn.qkv.weight[:144].clone()
    begin_compression(model, BLOCKS, inputs())
    attention, seen = model.blocks[1].attn, {}
    attention.qkv.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
    attention.norm.register_forward_hook(lambda m, i, out: seen.setdefault("out", []).append(out))
    with torch.no_grad():
        model(*inputs())
    pooled = F.avg_pool2d(seen["qkv"].unflatten(1, (6, 8)).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)  # by torch itself
    _, keys, values = pooled.chunk(3, dim=-1)
    new_keys, new_values = seen["out"]
    torch.testing.assert_close(new_values.mean((0, 1)), values.mean((0, 1)), atol=1e-4, rtol=1e-4)
    deviations = [x.var(-1).mean().sqrt() for x in (keys, new_keys, values, new_values)]
    assert deviations[3] / deviations[2] == pytest.approx(1, abs=0.05)
    scale = (attention.qkv.weight[:144] / before).median()
    centred = new_keys - attention.norm.bias  # which adds the same to every score of a query
    assert centred.var(-1).mean().sqrt() * scale / deviations[0] == pytest.approx(1, abs=0.02)


def test_nearer_to_the_uncompressed_model_than_the_papers_beginning(plain):
    model, paper = compressed(plain), compressed(plain)
    begin_compression(model, BLOCKS, inputs())
    for block in BLOCKS:
        torch.nn.init.constant_(paper.blocks[block].attn.sr.weight, 0.25)
        torch.nn.init.zeros_(paper.blocks[block].attn.sr.bias)
    fresh = inputs(seed=1)
    with torch.no_grad():
        expected = plain(*fresh)
        errors = [float((each(*fresh) - expected).norm() / expected.norm()) for each in (model, paper)]
    assert errors[0] < 0.7 * errors[1], errors


def test_a_run_begins_from_weights_without_compression(recipe_path, tmp_path):
    first = str(train(recipe_path(steps=1)))
    asked = {"initialize": first, "method": {"name": "kv", "blocks": [[1, 2]]}, "run_dir": str(tmp_path / "kv")}
    config = recipe_path(steps=3, output=str(tmp_path / "kv.safetensors"), **asked)
    begun = Loop(load_recipe(config)).network
    start = load_transformer(first, dtype=torch.float32)
    assert torch.equal(begun.blocks[1].attn.sr.weight, torch.full((72, 1, 2, 2), 0.25))
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"):
        assert torch.equal(begun.state_dict()[name], start.state_dict()[name])
    out = train(config)
    assert inspect_file(out).config.compressed_blocks == ((1, 2),)
    resumed = Loop(load_recipe(config))
    resumed.resume(newest_state(tmp_path / "kv"))
    assert resumed.step == 3
    again = recipe_path(**{**asked, "initialize": str(out), "run_dir": str(tmp_path / "again")})  # goes on, begins nothing anew
    continued = Loop(load_recipe(again)).network.state_dict()
    torch.testing.assert_close(continued, load_transformer(out, dtype=torch.float32).state_dict())
    with pytest.raises(ConfigError, match=r"was trained with KV compression, conv, .*\[\(1, 2\)\]; this run has conv of \[\]"):
        Loop(load_recipe(recipe_path(initialize=str(out), run_dir=str(tmp_path / "plain"))))


def test_compression_without_weights_is_no_start_of_a_run_without_it(tmp_path, monkeypatch):
    """No key tells the two apart."""
    config = replace(CONFIG, compressed_blocks=((1, 2),), compression_mode="uniform")
    monkeypatch.setattr(initialize, "load_transformer", lambda *_, **__: PixArtTransformer(config))
    with pytest.raises(ConfigError, match=r"uniform, of the blocks and ratios \[\(1, 2\)\]; this run has conv of \[\]"):
        initialize.copy_weights(PixArtTransformer(CONFIG), "first.safetensors", "demo")


@pytest.mark.parametrize("mode", ["uniform", "ave"])
def test_modes_without_weights_are_trained_and_noted(recipe_path, tmp_path, mode):
    first = str(train(recipe_path(steps=1)))
    asked = {"initialize": first, "method": {"name": "kv", "blocks": [[1, 2]], "mode": mode}, "run_dir": str(tmp_path / "kv")}
    found = inspect_file(train(recipe_path(steps=1, output=str(tmp_path / "kv.safetensors"), **asked))).config
    assert (found.compressed_blocks, found.compression_mode) == (((1, 2),), mode)


@pytest.mark.parametrize("value", [[], [[9, 2]], [[1, 1]]])
def test_blocks_that_can_not_be(recipe_path, value):
    with pytest.raises(ConfigError, match="blocks"):
        Loop(load_recipe(recipe_path(method={"name": "kv", "blocks": value})))
