"""A ControlNet learns from its hints alone, and its base stays as it was."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixart.checkpoints import load_transformer
from pixart.checkpoints.controlnet import load_controlnet
from pixart.controlnet import ControlledTransformer
from pixart.errors import ConfigError
from pixart.model import PixArtTransformer
from pixart.training.diffusion import NoiseSchedule
from pixart.training.initialize import initialize_weights
from pixart.training.loop import Loop
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.sources import scenes
from pixart.training.state import newest_state
from tests.support.tiny_training import TINY, TwoPictures

HINTED = {"name": "scenes", "text_encoder": "", "hints": True}
CONTROL = {"name": "controlnet", "blocks": 1}


class Silent(TwoPictures):
    """The caption says nothing."""

    def batch(self, settings, stage, draws):
        from dataclasses import replace

        made = super().batch(settings, stage, draws)
        return replace(made, context=torch.zeros_like(made.context))


@pytest.fixture
def base_file(recipe_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Weights to be controlled; recipes of this module draw hinted pictures."""
    monkeypatch.setattr(scenes, "Part", Silent)
    torch.manual_seed(0)
    model = PixArtTransformer(TINY)
    initialize_weights(model)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.05)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    return str(tmp_path / "base.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learns_what_the_hint_says(recipe_path, base_file: str, optimizer: str) -> None:
    stage = {"base_size": 64, "steps": 60, "batch_size": 16, "learning_rate": 8e-3}
    objective = {"name": "denoise", "timesteps": "logit_normal", "max_loss_weight": 20}
    out = train(recipe_path(stages=[stage], initialize=base_file, method=CONTROL, source=HINTED, objective=objective, optimizer=optimizer))
    base, control = load_transformer(base_file, dtype=torch.float32), load_controlnet(out, dtype=torch.float32)
    assert control.config.depth == 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    hint = torch.stack([torch.ones(4, 8, 8), -torch.ones(4, 8, 8)])
    timestep = torch.full((2,), 600)
    with torch.no_grad():
        predicted = ControlledTransformer(base, control)(noise, timestep, torch.zeros(2, 2, 8), hint=hint)[:, :4]
    bright, dark = NoiseSchedule().predicted_latent(noise, predicted, timestep).mean((1, 2, 3))
    assert bright - dark > 0.2


def test_the_base_is_frozen_and_runs_resume(recipe_path, tmp_path: Path, base_file: str) -> None:
    config = recipe_path(steps=4, initialize=base_file, method=CONTROL, source=HINTED)
    loop = Loop(load_recipe(config))
    before = {key: value.clone() for key, value in loop.network.base.state_dict().items()}
    loop.run(stop_after=0)
    resumed = Loop(load_recipe(config))
    resumed.resume(newest_state(tmp_path / "run"))
    assert resumed.step == 1
    resumed.run()
    assert all(torch.equal(value, before[key]) for key, value in resumed.network.base.state_dict().items())
    assert resumed.network.controlnet.controlnet[0].after_proj.weight.abs().max() > 0


@pytest.mark.parametrize(("change", "message"), [({"initialize": None}, "needs finished weights to start from"), ({"method": {"name": "controlnet", "blocks": 2}}, "at most 1")])
def test_recipes_that_can_not_be(recipe_path, base_file: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loop(load_recipe(recipe_path(**{"initialize": base_file, "method": CONTROL, "source": HINTED, **change})))


def test_a_source_without_hints_is_refused(recipe_path, base_file: str) -> None:
    loop = Loop(load_recipe(recipe_path(initialize=base_file, method=CONTROL)))
    with pytest.raises(ConfigError, match="gives no hints"):
        loop.run()
