"""A run on a tiny model: it learns, goes on to the bit where it was stopped, and keeps what it wrote whole."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.bins import bin_table
from pixart.checkpoints import inspect_file, load_transformer
from pixart.config import TransformerConfig
from pixart.errors import CheckpointError, ConfigError, UnsupportedError
from pixart.model import PixArtTransformer
from pixart.training.buckets import bucket_sizes, draw_size
from pixart.training.diffusion import NoiseSchedule
from pixart.training.initialize import initialize_weights, pass_noise_through
from pixart.training.loop import MAX_SKIPPED, Loop
from pixart.training.methods import full
from pixart.training.optimizer_state import optimizer_tensors, optimizer_values
from pixart.training.recipe import OPTIMIZERS, load_recipe
from pixart.training.run import train
from pixart.training.sources import scenes
from pixart.training.state import newest_state
from tests.support.tiny_training import TINY, VARIANT, TwoPictures

ROOT = Path(__file__).resolve().parents[2]


def weights_of(loop: Loop) -> dict[str, torch.Tensor]:
    return {**{f"a.{name}": value for name, value in loop.average.values.items()}, **loop.network.state_dict()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_learns_what_the_caption_says(recipe_path):
    stage = {"base_size": 64, "steps": 250, "batch_size": 16, "learning_rate": 4e-3}
    out = train(recipe_path(stages=[stage], objective={"name": "denoise", "timesteps": "logit_normal", "max_loss_weight": 20}))
    model = load_transformer(out, dtype=torch.float32)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.stack([torch.ones(2, 8), -torch.ones(2, 8)])
    timestep = torch.full((2,), 600)
    with torch.no_grad():
        predicted = model(noise, timestep, context)[:, :4]
    bright, dark = NoiseSchedule().predicted_latent(noise, predicted, timestep).mean((1, 2, 3))
    assert bright - dark > 0.2  # from noise alone, which says neither


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_run_ends_with_the_weights_of_one_that_never_stopped(recipe_path, tmp_path, optimizer):
    rate = 1.0 if optimizer == "prodigy" else 2e-3
    stages = [{"base_size": 64, "steps": steps, "batch_size": 4, "learning_rate": rate, **more} for steps, more in (
        (2, {"accumulation": 2}), (3, {"schedule": "cosine", "final_learning_rate": 1e-4}))]  # fmt: skip
    changes = {"optimizer": optimizer, "stages": stages, "caption_dropout": 0.3, "weight_decay": 0.01}
    whole = Loop(load_recipe(recipe_path(run_dir=str(tmp_path / "whole"), output=str(tmp_path / "whole.safetensors"), **changes)))
    whole.run()
    config = recipe_path(**changes)
    for step in range(1, 6):  # a new process could begin at each
        assert train(config, stop_after=0).is_file()
        assert newest_state(tmp_path / "run").name == f"{step:08}"
    parts = Loop(load_recipe(config))
    parts.resume(newest_state(tmp_path / "run"))
    assert parts.step == 5
    assert_same(weights_of(whole), weights_of(parts))
    assert_same(optimizer_tensors(whole.optimizers, whole.trained.names), optimizer_tensors(parts.optimizers, parts.trained.names))
    assert optimizer_values(whole.optimizers, whole.trained.names) == optimizer_values(parts.optimizers, parts.trained.names)


def test_written_weights_are_the_averaged_ones(recipe_path):
    loop = Loop(load_recipe(recipe_path(steps=4)))
    loop.run()
    written = load_transformer(loop.recipe.output, dtype=torch.float32).state_dict()
    averaged = loop.average.values["blocks.0.attn.qkv.weight"].clone()
    torch.testing.assert_close(written["blocks.0.attn.qkv.weight"], averaged, atol=1e-3, rtol=1e-3)
    assert not torch.equal(averaged, loop.network.state_dict()["blocks.0.attn.qkv.weight"])
    with loop.average.applied():
        assert torch.equal(averaged, loop.network.state_dict()["blocks.0.attn.qkv.weight"])
    assert not torch.equal(averaged, loop.network.state_dict()["blocks.0.attn.qkv.weight"])
    assert inspect_file(loop.recipe.output).ema


def test_starts_from_given_weights(recipe_path, tmp_path):
    first = train(recipe_path(steps=3))
    begun = Loop(load_recipe(recipe_path(initialize=str(first), output=str(tmp_path / "second.safetensors"))))
    torch.testing.assert_close(begun.network.state_dict(), load_transformer(first, dtype=torch.float32).state_dict())


def test_weights_of_another_model_are_refused_by_name(recipe_path, monkeypatch):
    first = train(recipe_path(steps=1))
    monkeypatch.setattr(full, "get_variant", lambda name: replace(VARIANT, transformer=replace(TINY, depth=3)))
    with pytest.raises(ConfigError, match=r"blocks\.2\."):
        Loop(load_recipe(recipe_path(initialize=str(first))))


def test_weights_without_a_null_caption_can_begin_a_run(recipe_path, tmp_path):
    weights = {k: v for k, v in load_file(train(recipe_path(steps=1))).items() if "y_embedding" not in k}
    save_file(weights, tmp_path / "bare.safetensors")
    begun = Loop(load_recipe(recipe_path(initialize=str(tmp_path / "bare.safetensors"))))
    torch.testing.assert_close(begun.network.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"].float())


def test_alignment_teaches_tokens_their_features_and_leaves_no_trace(recipe_path, tmp_path, monkeypatch):
    """Half of the tokens of each picture are marked; only the positions tell which."""

    class Marked(TwoPictures):
        feature_count = 2

        def batch(self, settings, stage, draws):
            made = super().batch(settings, stage, draws)
            tokens = stage.base_size**2 // 256
            half = (torch.arange(tokens) < tokens // 2).float()
            return replace(made, features=torch.stack([half, 1 - half], dim=-1).expand(len(made.latent), -1, -1))

    monkeypatch.setattr(scenes, "Part", Marked)
    stage = {"base_size": 64, "steps": 75, "batch_size": 8, "learning_rate": 1e-2}
    config = recipe_path(stages=[stage], objective={"name": "aligned", "align_block": 1})
    out = train(config)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["align_loss"] < 0.5 * rows[0]["align_loss"]
    assert not [key for key in load_file(out) if "head" in key]
    resumed = Loop(load_recipe(config))
    resumed.resume(newest_state(tmp_path / "run"))
    assert resumed.step == 75


@pytest.mark.parametrize("block, message", [(0, "knows features"), (7, "number 7")])
def test_alignment_that_can_not_be(recipe_path, monkeypatch, block, message):
    monkeypatch.setattr(TwoPictures, "feature_count", 2 if block else 0)
    with pytest.raises(ConfigError, match=message):
        Loop(load_recipe(recipe_path(objective={"name": "aligned", "align_block": block})))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(recipe_path):
    loop = Loop(load_recipe(recipe_path(optimizer="muon")))
    muon, adam = [{id(p) for group in o.param_groups for p in group["params"]} for o in loop.optimizers]
    named = {name: value for name, value in loop.network.named_parameters() if value.requires_grad}
    assert id(named["blocks.1.attn.qkv.weight"]) in muon and id(named["blocks.1.scale_shift_table"]) in adam
    assert not muon & adam and len(muon) + len(adam) == len(named)


def test_gradients_that_are_not_finite_are_skipped_and_many_are_an_error(recipe_path):
    loop = Loop(load_recipe(recipe_path()))
    before = {name: value.clone() for name, value in weights_of(loop).items()}
    for parameter in loop.network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    for _ in range(MAX_SKIPPED):
        loop._update(finite=False)
    assert_same(weights_of(loop), before)
    with pytest.raises(UnsupportedError, match="not finite.*learning rate"):
        loop._update(finite=False)


def test_termination_ends_the_run_after_its_step_and_saves(recipe_path, tmp_path, monkeypatch):
    class Terminated(TwoPictures):
        def batch(self, *given):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(*given)

    monkeypatch.setattr(scenes, "Part", Terminated)
    handler = signal.getsignal(signal.SIGTERM)
    train(recipe_path(steps=6))
    assert newest_state(tmp_path / "run").name == "00000001"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_kill_while_a_state_is_written_leaves_the_one_before(recipe_path, tmp_path, monkeypatch):
    config = recipe_path(steps=3, save_every=1)
    train(config, stop_after=0)
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pixart.training import run, state
from pixart.training.methods import full
from pixart.training.sources import scenes
from tests.support.tiny_training import TwoPictures, VARIANT
scenes.Part, full.get_variant = TwoPictures, lambda name: VARIANT
state._flush = lambda folder: os.kill(os.getpid(), 9)  # everything is written but the name
run.train({str(config)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert newest_state(tmp_path / "run").name == "00000001"
    train(config)
    assert [folder.name for folder in (tmp_path / "run/states").iterdir()] == ["00000003"]


def test_a_former_run_is_only_replaced_when_told(recipe_path, tmp_path):
    config = recipe_path(steps=1)
    out = train(config)
    with pytest.raises(ConfigError, match="out.safetensors exists.*--overwrite"):
        train(config, ["run_dir=" + str(tmp_path / "other")])
    before = out.stat().st_mtime_ns
    train(config, overwrite=True)
    assert out.stat().st_mtime_ns > before and newest_state(tmp_path / "run").name == "00000001"


def test_a_changed_recipe_or_base_is_named(recipe_path, tmp_path):
    base = train(recipe_path(steps=1, run_dir=str(tmp_path / "base"), output=str(tmp_path / "base.safetensors")))
    config = recipe_path(initialize=str(base))
    train(config, stop_after=0)
    with pytest.raises(ConfigError, match=r"stages.0.learning_rate: 0.002 -> 0.5; seed: 0 -> 3.*--accept-changes"):
        train(config, ["seed=3", "stages.0.learning_rate=0.5"])
    train(config, ["save_every=7"], stop_after=0)  # changes no weight
    save_file({name: value + 1 for name, value in load_file(base).items()}, base)
    with pytest.raises(ConfigError, match="content of initialize"):
        train(config)
    train(config, ["seed=3"], accept_changes=True, stop_after=0)


def test_a_damaged_state_and_another_models_are_sentences(recipe_path, tmp_path):
    config = recipe_path(steps=2)
    train(config, stop_after=0)
    state = newest_state(tmp_path / "run")
    file = next(state.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged.*--overwrite"):
        train(config)
    save_file({"network.blocks.0.attn.qkv.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="another model"):
        train(config)
    (state / "info.json").write_text("{")
    with pytest.raises(CheckpointError, match="info.json is damaged"):
        train(config)


def test_a_full_disk_is_told_and_the_state_before_is_kept(recipe_path, tmp_path, monkeypatch):
    config = recipe_path(steps=3)
    train(config, stop_after=0)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full_disk)
    with pytest.raises(OSError, match="No space left.*disk full"):
        train(config)
    assert [folder.name for folder in (tmp_path / "run/states").iterdir()] == ["00000001"]


def test_squares_get_their_share():
    sizes = bucket_sizes(256, 256)
    rng = np.random.default_rng(0)
    squares = np.mean([height == width for height, width in (draw_size(sizes, rng, square_share=0.5) for _ in range(2000))])
    assert 0.5 < squares < 0.6  # its own weight among 40 bins is about a twentieth


def test_sizes_may_be_drawn_alike():
    sizes, rng = bucket_sizes(256, 256), np.random.default_rng(0)
    seen = [draw_size(sizes, rng, square_share=0.2, even=True) for _ in range(4000)]
    narrow, wide = seen.count((512, 128)), seen.count((240, 272))
    assert 50 < narrow < 120 and 50 < wide < 120 and seen.count((256, 256)) > 700  # 82 of each


@pytest.mark.parametrize("base", [128, 256])
def test_buckets_are_the_bins_scaled_to_whole_tokens(base):
    sizes, rng = bucket_sizes(256, base), np.random.default_rng(0)
    wanted = [(h * base / 256, w * base / 256) for h, w in bin_table(256).values()]
    assert all(side % 16 == 0 for size in sizes for side in size)
    assert all(min(abs(h - wh) + abs(w - ww) for h, w in sizes) <= 16 for wh, ww in wanted)
    seen = [draw_size(sizes, rng) for _ in range(2000)]
    assert set(seen) == set(sizes)
    assert seen.count((base, base)) > seen.count(max(sizes, key=lambda s: s[1] / s[0]))


def test_fresh_weights_predict_nothing_and_blocks_begin_gated():
    model = PixArtTransformer(TINY)
    initialize_weights(model)
    out = model(torch.randn(1, 4, 4, 4), torch.tensor([5.0]), torch.randn(1, 2, 8))
    assert out.abs().max() == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_passing_noise_predicts_noise_as_itself_at_any_size():
    torch.manual_seed(0)
    model = PixArtTransformer(TransformerConfig(hidden_size=216, depth=2, num_heads=3, mlp_hidden=432, caption_channels=8))
    initialize_weights(model)
    pass_noise_through(model)
    for height, width in ((16, 16), (12, 40)):
        noise = torch.randn(4, 4, height, width)
        with torch.no_grad():
            predicted = model(noise, torch.full((4,), 900), torch.randn(4, 3, 8))[:, :4]
        assert (predicted - noise).square().mean() < 0.01
