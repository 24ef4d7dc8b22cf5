"""One step of consistency distillation against diffusers' schedulers and the formulas, and runs with it."""
from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from pixart.checkpoints import load_transformer
from pixart.config import TransformerConfig
from pixart.errors import ConfigError
from pixart.sampling_note import LCM, read_note
from pixart.training.draws import Draws
from pixart.training.loop import Loop
from pixart.training.objectives.lcm import Part, Settings
from pixart.training.parts import choose
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.training.state import newest_state
from tests.support.distilled import (
    ALPHA,
    COMPRESSED,
    NullSource,
    assert_equal,
    batch_of,
    conditions_of,
    gradients,
    move,
    network_of,
)  # fmt: skip
from tests.support.tiny_training import TINY

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
DRAWS = Draws(5, 0, 0, range(4))


def expected_loss(settings: Settings, student: Any, teacher: Any, target: Any, config: TransformerConfig, guidance: list[float]) -> torch.Tensor:
    """Picture by picture, by diffusers' DDIM and LCM schedulers."""
    ddim = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    lcm = LCMScheduler(**BETAS)
    batch, losses = batch_of(config), []
    noise, uniform = DRAWS.normal("noise", batch.latent.shape[1:]), DRAWS.uniform("timestep")

    def jump(model: Any, x: torch.Tensor, t: int, told: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = model(x, torch.tensor([t]), **told)[:, :4]
        original = (x - (1 - lcm.alphas_cumprod[t]).sqrt() * predicted) / lcm.alphas_cumprod[t].sqrt()
        skip, out = lcm.get_scalings_for_boundary_condition_discrete(t)
        return out * original + skip * x

    for row in range(4):
        start = sorted(ddim.timesteps.tolist())[int(uniform[row] * 50)]
        real = int(batch.mask[row].sum())
        told = {"context": batch.context[row : row + 1, :real]}
        told |= {"size": batch.size[row : row + 1]} if config.micro_condition else {}
        noisy = ddim.add_noise(batch.latent[row : row + 1], noise[row : row + 1], torch.tensor([start]))
        with torch.no_grad():
            caption, empty = (teacher(noisy, torch.tensor([start]), **{**told, "context": each})[:, :4] for each in (told["context"], NullSource.null_context[None]))
            found = empty + guidance[row] * (caption - empty)
            earlier = ddim.step(found, start, noisy).prev_sample
            wanted = jump(target, earlier, max(start - 20, 0), told)
        difference = jump(student, noisy, start, told) - wanted
        losses.append(difference.square().mean() if settings.loss == "l2" else ((difference**2 + 0.001**2).sqrt() - 0.001).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("settings", "config", "lora"),
    [
        (Settings(), TINY, 0), (Settings(loss="l2", guidance=1.0), TINY, 0), (Settings(guidance=(2.0, 7.0)), ALPHA, 0),
        (Settings(guidance=4.5), COMPRESSED, 0), (Settings(guidance=4.5), TINY, 4),
    ],
)  # fmt: skip
def test_a_steps_loss_and_gradients_are_those_of_diffusers_schedulers(settings: Settings, config: TransformerConfig, lora: int) -> None:
    network = network_of(config, lora=lora)
    before = copy.deepcopy(network)
    part = Part(settings)
    assert part.wrap(network, NullSource()) is network
    move(network)
    part.after_update(None)
    target = copy.deepcopy(before)
    with torch.no_grad():
        for own, new in zip(target.parameters(), network.parameters()):
            own.copy_(0.95 * own + 0.05 * new)
    batch = batch_of(config)
    loss = part.losses(settings, network, conditions_of(config, batch), batch, DRAWS)["consistency_loss"]
    least, most = settings.guidance if isinstance(settings.guidance, tuple) else (settings.guidance, settings.guidance)
    guidance = [least + (most - least) * float(u) for u in DRAWS.uniform("guidance")]
    expected = expected_loss(settings, network, before, target, config, guidance)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_equal(gradients(loss.sum(), network), gradients(expected.sum(), network))


def test_a_whole_network_is_copied_twice_and_of_a_lora_its_matrices_alone() -> None:
    for lora, copied in ((0, True), (4, False)):
        network, part = network_of(lora=lora), Part(Settings())
        part.wrap(network, NullSource())
        frozen = {id(value) for value in network.parameters() if not value.requires_grad}
        own = [value for value in part.target.parameters() if id(value) not in frozen]
        assert len(own) == len([value for value in network.parameters() if value.requires_grad])
        assert not any(value.requires_grad for value in part.target.parameters())
        assert ("teacher" in part.companions()) == copied


def test_distilled_in_parts_as_in_one_run(recipe_path, tmp_path) -> None:
    base = train(recipe_path(steps=3, output=str(tmp_path / "base.safetensors"), run_dir=str(tmp_path / "base")))
    stage = {"base_size": 64, "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "accumulation": 2}
    changes = {"initialize": str(base), "objective": {"name": "lcm", "guidance": [2, 5]}, "stages": [stage]}
    whole = Loop(load_recipe(recipe_path(run_dir=str(tmp_path / "whole"), output=str(tmp_path / "whole.safetensors"), **changes)))
    whole.run()
    config = recipe_path(**changes)
    for _ in range(4):
        out = train(config, stop_after=0)
    parts = Loop(load_recipe(config))
    parts.resume(newest_state(tmp_path / "run"))
    left, right = whole._tensors(), parts._tensors()
    assert left.keys() == right.keys() and any(name.startswith("objective.target.") for name in left)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert read_note(out) == LCM


def test_a_lora_says_how_to_sample(recipe_path, tmp_path) -> None:
    base = train(recipe_path(steps=1, output=str(tmp_path / "base.safetensors"), run_dir=str(tmp_path / "base")))
    out = train(recipe_path(steps=2, initialize=str(base), method={"name": "lora", "rank": 2}, objective="lcm"))
    assert read_note(out) == LCM and "4 steps, cfg 1" in LCM.describe()


def test_another_teacher(tmp_path, recipe_path) -> None:
    path = train(recipe_path(steps=2))
    network, part = network_of(), Part(Settings(teacher=str(path)))
    part.wrap(network, NullSource())
    loaded, batch = load_transformer(path, dtype=torch.float32), batch_of()
    given = batch.latent, torch.full((4,), 300), batch.context, batch.mask
    torch.testing.assert_close(part.teacher(*given), loaded(*given))


BAD = {
    "guidance 0": ({"guidance": 0}, "guidance is 0; expected a cfg of 1 or more.*4.5 is what PixArt"),
    "a range that falls": ({"guidance": [7, 2]}, r"guidance is \[7, 2\]"),
    "no number": ({"guidance": float("nan")}, "guidance is nan"),
    "an unknown loss": ({"loss": "l1"}, "loss is 'l1'; expected one of pseudo_huber, l2"),
    "steps that don't divide": ({"solver_steps": 30}, "solver_steps is 30; expected a number that divides 1000"),
    "a target that never moves": ({"target_decay": 1.0}, "target_decay is 1.0"),
    "no scale": ({"huber_c": 0}, "huber_c is 0"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_settings_that_can_not_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose("objective", {"name": "lcm", **values}, "recipe")


@pytest.mark.parametrize("objective", ["lcm", "dmd"])
def test_what_can_not_be_distilled(recipe_path, tmp_path, objective: str) -> None:
    base = train(recipe_path(steps=1, output=str(tmp_path / "base.safetensors"), run_dir=str(tmp_path / "base")))
    with pytest.raises(ConfigError, match="over a quantized base.*Leave base null"):
        Loop(load_recipe(recipe_path(initialize=str(base), method={"name": "lora", "base": "fp8"}, objective=objective)))
    with pytest.raises(ConfigError, match="trains a ControlledTransformer"):
        source = {"name": "scenes", "text_encoder": "", "hints": True}
        Loop(load_recipe(recipe_path(initialize=str(base), method={"name": "controlnet", "blocks": 1}, source=source, objective=objective)))
    from pixart.training.teachers import make_teacher

    with pytest.raises(ConfigError, match="another size than the model in training: depth 2 instead of 3"):
        make_teacher(network_of(replace(TINY, depth=3)), str(base), objective)
