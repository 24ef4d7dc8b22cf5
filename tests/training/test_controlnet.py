"""A ControlNet learns from its hints alone, and its base stays as it was."""
import pytest
import torch

from pixart.checkpoints.controlnet import load_controlnet
from pixart.checkpoints.load import load_transformer
from pixart.controlnet import ControlledTransformer
from pixart.errors import ConfigError
from pixart.model import PixArtTransformer
from pixart.training import loop
from pixart.training.data import Batch
from pixart.training.initialize import initialize_weights
from pixart.training.recipe import load_recipe
from tests.training.test_loop import TINY, recipe_path  # noqa: F401 - a fixture


class HintedPictures:
    """A hint of ones means a bright latent, of minus ones a dark one; the caption says nothing."""

    def __init__(self, recipe):
        self.hinted = recipe.control_blocks > 0

    def batch(self, size, count, rng):
        sign = torch.from_numpy(rng.choice([-1.0, 1.0], count)).float()[:, None, None, None]
        latent = sign.expand(count, 4, size[0] // 8, size[1] // 8).clone()
        mask = torch.ones(count, 2, dtype=torch.bool)
        return Batch(latent, torch.zeros(count, 2, 8), mask, torch.tensor([size] * count).float(),
                     hint=latent.clone() if self.hinted else None)  # fmt: skip


@pytest.fixture
def base_file(recipe_path, tmp_path, monkeypatch):  # noqa: F811
    """Weights to be controlled; recipes of this module draw hinted pictures."""
    from safetensors.torch import save_file

    monkeypatch.setattr(loop, "make_source", HintedPictures)

    def copy_weights(model, path, variant) -> list[int]:
        model.load_state_dict(load_transformer(path).state_dict())
        return []

    monkeypatch.setattr(loop, "copy_weights", copy_weights)
    torch.manual_seed(0)
    model = PixArtTransformer(TINY)
    initialize_weights(model)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.05)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learns_what_the_hint_says(recipe_path, base_file, optimizer):  # noqa: F811
    stage = {"base_size": 64, "steps": 60, "batch_size": 16, "learning_rate": 8e-3}
    out = loop.train(recipe_path(stages=[stage], initialize=str(base_file), control_blocks=1, max_loss_weight=20, optimizer=optimizer))
    base, control = load_transformer(base_file, dtype=torch.float32), load_controlnet(out, dtype=torch.float32)
    assert control.config.depth == 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    hint = torch.stack([torch.ones(4, 8, 8), -torch.ones(4, 8, 8)])
    timestep = torch.full((2,), 600)
    with torch.no_grad():
        predicted = ControlledTransformer(base, control)(noise, timestep, torch.zeros(2, 2, 8), hint=hint)[:, :4]
    bright, dark = loop.NoiseSchedule().predicted_latent(noise, predicted, timestep).mean((1, 2, 3))
    assert bright - dark > 0.2


def test_the_base_is_frozen_and_runs_resume(recipe_path, base_file):  # noqa: F811
    config = recipe_path(steps=4, initialize=str(base_file), control_blocks=1)
    trainer = loop.make_trainer(load_recipe(config))
    before = {key: value.clone() for key, value in trainer.transformer.base.state_dict().items()}
    trainer.run(stop_after=0)
    trainer.save()
    resumed = loop.make_trainer(load_recipe(config))
    resumed.resume()
    assert resumed.step == 1
    resumed.run()
    assert all(torch.equal(value, before[key]) for key, value in resumed.transformer.base.state_dict().items())
    projection = resumed.transformer.controlnet.controlnet[0].after_proj.weight
    assert projection.abs().max() > 0
    for left, right in zip(trainer.transformer.parameters(), loop.make_trainer(load_recipe(config)).transformer.parameters()):
        assert left.shape == right.shape


@pytest.mark.parametrize(("change", "message"), [({"initialize": None}, "beside finished weights"), ({"control_blocks": 2}, "at most 1")])
def test_recipes_that_can_not_be(recipe_path, base_file, change, message):  # noqa: F811
    values = {"initialize": str(base_file), "control_blocks": 1, **change}
    with pytest.raises(ValueError, match=message):
        loop.make_trainer(load_recipe(recipe_path(**values)))


def test_a_source_without_hints_is_refused(recipe_path, base_file, monkeypatch):  # noqa: F811
    monkeypatch.setattr(HintedPictures, "__init__", lambda self, recipe: setattr(self, "hinted", False))
    trainer = loop.make_trainer(load_recipe(recipe_path(initialize=str(base_file), control_blocks=1)))
    with pytest.raises(ConfigError, match="gives no hints"):
        trainer.run()
