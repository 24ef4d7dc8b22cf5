"""A run on a tiny model: it learns, resumes to the bit, buckets by size, and refuses bad recipes."""
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.bins import bin_table
from pixart.checkpoints import inspect_file, load_transformer
from pixart.config import TransformerConfig, Variant
from pixart.errors import ConfigError, UnsupportedError
from pixart.training import data, initialize, loop
from pixart.training.data import Batch, bucket_sizes, draw_buckets
from pixart.training.initialize import initialize_weights, pass_noise_through
from pixart.training.recipe import load_recipe
from pixart.model import PixArtTransformer

TINY = TransformerConfig(hidden_size=72, depth=2, num_heads=1, mlp_hidden=144, caption_channels=8)
VARIANT = Variant("demo", "tiny", "sigma", 256, 300, 0.13025, "demo", TINY)


class TwoPictures:
    """A context of ones means a bright latent, of minus ones a dark one."""

    def __init__(self, recipe):
        self.sizes = []

    def batch(self, size, count, rng):
        self.sizes.append(size)
        sign = torch.from_numpy(rng.choice([-1.0, 1.0], count)).float()
        latent = sign[:, None, None, None].expand(count, 4, size[0] // 8, size[1] // 8).clone()
        context = sign[:, None, None].expand(count, 2, 8)
        return Batch(latent, context, torch.ones(count, 2, dtype=torch.bool), torch.tensor([size] * count).float())


@pytest.fixture
def recipe_path(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "get_variant", lambda name: VARIANT)
    monkeypatch.setattr(loop, "make_source", TwoPictures)

    def write(steps=6, **changes):
        values = {
            "variant": "demo", "source": "scenes", "text_encoder": "", "output": str(tmp_path / "out.safetensors"),
            "run_dir": str(tmp_path / "run"), "precision": "no", "warmup_steps": 2, "ema_decay": 0.9, "save_every": 1000,
            "stages": [{"base_size": 64, "steps": steps, "batch_size": 8, "learning_rate": 2e-3}], **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(values))
        return path

    return write


def test_learns_what_the_caption_says(recipe_path):
    stage = {"base_size": 64, "steps": 150, "batch_size": 16, "learning_rate": 4e-3}
    out = loop.train(recipe_path(stages=[stage], max_loss_weight=20))
    model = load_transformer(out, dtype=torch.float32)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.stack([torch.ones(2, 8), -torch.ones(2, 8)])
    timestep = torch.full((2,), 600)
    schedule = loop.NoiseSchedule()
    with torch.no_grad():
        predicted = model(noise, timestep, context)[:, :4]
    bright, dark = schedule.predicted_latent(noise, predicted, timestep).mean((1, 2, 3))
    assert bright - dark > 0.2  # from noise alone, which says neither


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_run_resumes_where_it_stopped(recipe_path, optimizer):
    config = recipe_path(steps=6, optimizer=optimizer)
    trainer = loop.Trainer(load_recipe(config))
    trainer.run(stop_after=0)  # one step
    trainer.save()
    assert trainer.step == 1
    resumed = loop.Trainer(load_recipe(config))
    resumed.resume()
    assert resumed.step == 1
    for left, right in zip(trainer.transformer.parameters(), resumed.transformer.parameters(), strict=True):
        assert torch.equal(left, right)
    trainer.run()
    resumed.run()
    assert trainer.step == resumed.step == 6
    for left, right in zip(trainer.ema.module.parameters(), resumed.ema.module.parameters(), strict=True):
        assert torch.equal(left, right)


def test_written_weights_are_the_averaged_ones(recipe_path):
    trainer = loop.Trainer(load_recipe(recipe_path(steps=4)))
    trainer.run()
    trainer.save()
    written = load_transformer(trainer.recipe.output, dtype=torch.float32).state_dict()
    averaged = trainer.ema.module.state_dict()["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(written["blocks.0.attn.qkv.weight"], averaged, atol=1e-3, rtol=1e-3)
    assert not torch.equal(averaged, trainer.transformer.state_dict()["blocks.0.attn.qkv.weight"])


def test_starts_from_given_weights(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))
    first = loop.train(recipe_path(steps=3))
    begun = loop.Trainer(load_recipe(recipe_path(initialize=str(first), output=str(tmp_path / "second.safetensors"))))
    torch.testing.assert_close(begun.transformer.state_dict(), load_transformer(first, dtype=torch.float32).state_dict())


def test_weights_of_another_model_are_refused_by_name(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))
    first = loop.train(recipe_path(steps=1))
    deeper = Variant("demo", "tiny", "sigma", 256, 300, 0.13025, "demo", replace(TINY, depth=3))
    monkeypatch.setattr(loop, "get_variant", lambda name: deeper)
    with pytest.raises(ConfigError, match=r"blocks\.2\."):
        loop.Trainer(load_recipe(recipe_path(initialize=str(first))))


def test_weights_without_a_null_caption_can_begin_a_run(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))
    weights = {k: v for k, v in load_file(loop.train(recipe_path(steps=1))).items() if "y_embedding" not in k}
    save_file(weights, tmp_path / "bare.safetensors")
    begun = loop.Trainer(load_recipe(recipe_path(initialize=str(tmp_path / "bare.safetensors"))))
    torch.testing.assert_close(begun.transformer.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"].float())


def test_written_weights_say_that_they_are_an_average(recipe_path):
    assert inspect_file(loop.train(recipe_path(steps=1))).ema


def test_alignment_teaches_tokens_their_features_and_leaves_no_trace(recipe_path, monkeypatch):
    """Half of the tokens of each picture are marked; only the positions tell which."""

    class Marked(TwoPictures):
        feature_count = 2

        def batch(self, size, count, rng):
            made = super().batch(size, count, rng)
            tokens = size[0] * size[1] // 256
            half = (torch.arange(tokens) < tokens // 2).float()
            return replace(made, features=torch.stack([half, 1 - half], dim=-1).expand(count, -1, -1))

    monkeypatch.setattr(loop, "make_source", Marked)
    stage = {"base_size": 64, "steps": 75, "batch_size": 8, "learning_rate": 1e-2}
    config = recipe_path(stages=[stage], align_weight=1.0, align_block=1)
    out = loop.train(config)
    rows = [json.loads(line) for line in (Path(load_recipe(config).run_dir) / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["align_loss"] < 0.5 * rows[0]["align_loss"]
    assert not [key for key in load_file(out) if "head" in key]
    resumed = loop.Trainer(load_recipe(config))
    resumed.resume()
    assert resumed.step == 75


def test_a_source_without_features_can_not_align(recipe_path):
    with pytest.raises(ConfigError, match="align_weight"):
        loop.Trainer(load_recipe(recipe_path(align_weight=1.0)))


def test_squares_get_their_share():
    sizes = bucket_sizes(256, 256)
    drawn = draw_buckets(sizes, np.random.default_rng(0), square_share=0.5)
    squares = np.mean([height == width for height, width in (next(drawn) for _ in range(2000))])
    assert 0.5 < squares < 0.6  # its own weight among 40 bins is about a twentieth


def test_learning_rate_warms_up_and_ends_where_it_should(recipe_path):
    stages = [
        {"base_size": 64, "steps": 100, "batch_size": 1, "learning_rate": 1.0},
        {"base_size": 128, "steps": 100, "batch_size": 1, "learning_rate": 1.0, "final_learning_rate": 0.0},
    ]
    recipe = load_recipe(recipe_path(stages=stages, warmup_steps=10))
    rates = [recipe.learning_rate(step) for step in (0, 9, 99, 100, 150, 199)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.01])


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(recipe_path):
    trainer = loop.Trainer(load_recipe(recipe_path(optimizer="muon")))
    muon, adam = [{id(p) for group in o.param_groups for p in group["params"]} for o in trainer.optimizers]
    named = dict(trainer.transformer.named_parameters())
    assert id(named["blocks.1.attn.qkv.weight"]) in muon and id(named["blocks.1.scale_shift_table"]) in adam
    assert not muon & adam and len(muon) + len(adam) == len(named)


def test_unknown_optimizer_is_refused(recipe_path):
    with pytest.raises(ConfigError, match="sgd.*adamw"):
        loop.Trainer(load_recipe(recipe_path(optimizer="sgd")))


def test_fresh_weights_predict_nothing_and_blocks_begin_gated():
    model = PixArtTransformer(TINY)
    initialize_weights(model)
    out = model(torch.randn(1, 4, 4, 4), torch.tensor([5.0]), torch.randn(1, 2, 8))
    assert out.abs().max() == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("base", [128, 256])
def test_buckets_are_the_bins_scaled_to_whole_tokens(base):
    sizes = bucket_sizes(256, base)
    wanted = [(h * base / 256, w * base / 256) for h, w in bin_table(256).values()]
    assert all(side % 16 == 0 for size in sizes for side in size)
    assert all(min(abs(h - wh) + abs(w - ww) for h, w in sizes) <= 16 for wh, ww in wanted)
    drawn = draw_buckets(sizes, np.random.default_rng(0))
    seen = [next(drawn) for _ in range(2000)]
    assert set(seen) == set(sizes)
    assert seen.count((base, base)) > seen.count(max(sizes, key=lambda s: s[1] / s[0]))


@pytest.mark.parametrize("change, named", [({"speed": 3}, "speed"), ({"stages": []}, "no stages"), ({"variant": "sigma-9"}, "sigma-9")])
def test_bad_recipes_are_refused_by_name(recipe_path, change, named):
    with pytest.raises(ConfigError, match=named):
        load_recipe(recipe_path(**change))


def test_a_recipe_can_not_name_code():
    with pytest.raises(ConfigError, match="os:system.*scenes"):
        data.make_source(type("R", (), {"source": "os:system"})())


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


def test_gradients_that_are_not_finite_are_skipped_and_many_are_an_error(recipe_path):
    trainer = loop.Trainer(load_recipe(recipe_path()))
    before = {name: value.clone() for name, value in trainer.transformer.state_dict().items()}
    for parameter in trainer.transformer.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    for _ in range(loop.MAX_SKIPPED):
        trainer._update(finite=False)
    assert all(torch.equal(value, before[name]) for name, value in trainer.transformer.state_dict().items())
    with pytest.raises(UnsupportedError, match="not finite.*learning rate"):
        trainer._update(finite=False)


def test_termination_ends_the_run_after_its_step_and_saves(recipe_path, monkeypatch):
    class Terminated(TwoPictures):
        def batch(self, *given):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(*given)

    monkeypatch.setattr(loop, "make_source", Terminated)
    handler = signal.getsignal(signal.SIGTERM)
    config = recipe_path(steps=6)
    loop.train(config)
    resumed = loop.Trainer(load_recipe(config))
    resumed.resume()
    assert resumed.step == 1
    assert signal.getsignal(signal.SIGTERM) is handler
