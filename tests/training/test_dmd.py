"""One step of distribution matching against diffusers' schedulers and the formulas, the second network's training, and pairs."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from pixart.config import TransformerConfig
from pixart.errors import ConfigError
from pixart.sampling_note import dmd_note, note_metadata, read_note
from pixart.training import dry_run as dry_run_module
from pixart.training.draws import Draws
from pixart.training.loop import Loop
from pixart.training.objectives import Turn
from pixart.training.objectives.dmd import Part, Settings
from pixart.training.parts import choose
from pixart.training.recipe import load_recipe
from pixart.training.run import dry_run, train
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
from tests.support.tiny_training import TINY, VARIANT

DRAWS = Draws(5, 0, 0, range(4))


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def picture(model: Any, x: torch.Tensor, t: int, told: dict[str, torch.Tensor], guidance: float = 1.0) -> torch.Tensor:
    """x0 that a network sees in one picture, by diffusers' DDIM."""
    steps = scheduler()
    steps.set_timesteps(1000)
    predicted = model(x, torch.tensor([t]), **told)[:, :4]
    if guidance != 1:
        empty = model(x, torch.tensor([t]), **{**told, "context": NullSource.null_context[None]})[:, :4]
        predicted = empty + guidance * (predicted - empty)
    return steps.step(predicted, t, x).pred_original_sample


def row_conditions(config: TransformerConfig, row: int) -> dict[str, torch.Tensor]:
    batch = batch_of(config)
    told = {"context": batch.context[row : row + 1, : int(batch.mask[row].sum())]}
    return told | ({"size": batch.size[row : row + 1]} if config.micro_condition else {})


def asked_timesteps(settings: Settings, purpose: str) -> list[int]:
    least, most = settings.score_timesteps
    return [least + int(float(u) * (most - least + 1)) for u in DRAWS.uniform(f"{purpose} timestep")]


def expected_matching(settings: Settings, student: Any, real: Any, fake: Any, config: TransformerConfig) -> torch.Tensor:
    start, noise = DRAWS.normal("noise", (4, 8, 8)), DRAWS.normal("score noise", (4, 8, 8))
    losses = []
    for row, t in enumerate(asked_timesteps(settings, "score")):
        told = row_conditions(config, row)
        drawn = picture(student, start[row : row + 1], settings.timestep, told)
        with torch.no_grad():
            noisy = scheduler().add_noise(drawn, noise[row : row + 1], torch.tensor([t]))
            of_real, of_fake = picture(real, noisy, t, told, settings.guidance), picture(fake, noisy, t, told)
            p_real, p_fake = drawn - of_real, drawn - of_fake
            direction = (p_real - p_fake) / (p_real.abs().mean() + 1e-5)
            wanted = drawn - direction
        losses.append(0.5 * (drawn - wanted).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("settings", "config", "lora"),
    [(Settings(), TINY, 0), (Settings(guidance=1.0, timestep=999), ALPHA, 0), (Settings(score_timesteps=(20, 979)), COMPRESSED, 0),
     (Settings(guidance=4.5), TINY, 4)],
)  # fmt: skip
def test_a_steps_losses_and_gradients_are_those_of_the_formulas(settings: Settings, config: TransformerConfig, lora: int) -> None:
    network = network_of(config, lora=lora)
    real, part = copy.deepcopy(network), Part(settings)
    assert part.wrap(network, NullSource()) is network
    move(network)
    fake = part.companions()["fake"]
    move(fake, seed=4)
    batch = batch_of(config)
    conditions = conditions_of(config, batch)
    loss = part.losses(settings, network, conditions, batch, DRAWS)["matching_loss"]
    expected = expected_matching(settings, network, real, copy.deepcopy(fake), config)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_equal(gradients(loss.sum(), network), gradients(expected.sum(), network))

    turn = part.turns(settings)[1]
    loss = part.companion_losses(turn, settings, fake, conditions, batch, DRAWS)["fake_loss"]
    expected = expected_denoising(settings, network, fake, config)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_equal(gradients(loss.sum(), fake), gradients(expected.sum(), fake))


def expected_denoising(settings: Settings, student: Any, fake: Any, config: TransformerConfig) -> torch.Tensor:
    start, noise = DRAWS.normal("fake 1", (4, 8, 8)), DRAWS.normal("fake 1 noise", (4, 8, 8))
    losses = []
    for row, t in enumerate(asked_timesteps(settings, "fake 1")):
        told = row_conditions(config, row)
        with torch.no_grad():
            drawn = picture(student, start[row : row + 1], settings.timestep, told)
            noisy = scheduler().add_noise(drawn, noise[row : row + 1], torch.tensor([t]))
        losses.append((fake(noisy, torch.tensor([t]), **told)[:, :4] - noise[row : row + 1]).square().mean())
    return torch.stack(losses)


def test_scores_share_the_frozen_weights_of_a_lora() -> None:
    network, part = network_of(lora=4), Part(Settings())
    part.wrap(network, NullSource())
    assert list(part.companions()) == ["fake"]  # the real score is the network without its adapters
    fake, shared = part.fake.state_dict(), network.state_dict()
    own = [name for name in fake if fake[name].data_ptr() != shared[name].data_ptr()]
    assert own == [name for name in fake if "lora_" in name]
    trained = [name for name, value in part.fake.named_parameters() if value.requires_grad]
    assert sorted(trained) == sorted(own)
    before = {name: value.clone() for name, value in network.named_parameters()}
    move(part.fake)
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters())


def run_changes(base: Path, **more: Any) -> dict[str, Any]:
    stage = {"base_size": 64, "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "accumulation": 2}
    return {"initialize": str(base), "objective": {"name": "dmd", "fake_updates": 2, "fake_rate": 0.5}, "stages": [stage], **more}


@pytest.fixture
def base(recipe_path, tmp_path: Path) -> Path:
    return train(recipe_path(steps=3, output=str(tmp_path / "base.safetensors"), run_dir=str(tmp_path / "base")))


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_distilled_in_parts_as_in_one_run(recipe_path, tmp_path: Path, base: Path, method: Any) -> None:
    changes = run_changes(base, method=method)
    whole = Loop(load_recipe(recipe_path(run_dir=str(tmp_path / "whole"), output=str(tmp_path / "whole.safetensors"), **changes)))
    whole.run()
    config = recipe_path(**changes)
    for _ in range(4):
        out = train(config, stop_after=0)
    parts = Loop(load_recipe(config))
    parts.resume(newest_state(tmp_path / "run"))
    left, right = whole._tensors(), parts._tensors()
    assert left.keys() == right.keys()
    assert {name.split(".")[2] for name in left if name.startswith("companion.fake.")} == {"network", "optimizer"}
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert read_note(out) == dmd_note(400)


def test_a_companion_makes_its_own_updates(recipe_path, base: Path) -> None:
    """Two updates of the fake score for one of the network, at half its rate, by hand."""
    loop = Loop(load_recipe(recipe_path(**run_changes(base, warmup_steps=0, clip_norm=0.0))))
    fake, network = copy.deepcopy(loop.objective.fake), copy.deepcopy(loop.network)
    optimizer = torch.optim.AdamW(fake.parameters(), lr=0.5e-3, betas=loop.recipe.betas, weight_decay=0)
    stage, settings = loop.recipe.stages[0], loop.objective.settings
    draws = Draws(loop.recipe.seed, 0, 0, range(4))
    batch = loop.source.batch(loop.recipe.source.settings, stage, draws)
    conditions = loop.method.conditions(network, batch)
    for number in range(2):
        loss = loop.objective.companion_losses(Turn("fake", number), settings, fake, conditions, batch, draws)["fake_loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = loop._train_step()
    for name, value in loop.objective.fake.named_parameters():
        torch.testing.assert_close(value, fake.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert {"loss", "matching_loss", "fake_loss", "grad_norm"} == set(values) and values["loss"] == pytest.approx(values["matching_loss"])
    changed = [name for name, value in loop.network.named_parameters() if not torch.equal(value, network.get_parameter(name))]
    assert changed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_adapters_and_companions_learn_in_fp32_beside_16_bits(recipe_path, base: Path, precision: str) -> None:
    """fp16 scales the loss of every turn too."""
    loop = Loop(load_recipe(recipe_path(**run_changes(base, method={"name": "lora", "rank": 2}, precision=precision))))
    for network in (loop.network, loop.objective.fake):
        assert {value.dtype for value in network.parameters() if value.requires_grad} == {torch.float32}
        assert torch.float32 not in {value.dtype for value in network.blocks[0].attn.qkv.base_layer.parameters()}
    before = {name: value.clone() for name, value in loop._tensors().items() if ".network." in name or name.startswith("network.")}
    values = loop._train_step()
    assert all(torch.isfinite(torch.tensor(value)) for value in values.values()) and loop._skipped == 0
    after = loop._tensors()
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("network."))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("companion.fake."))


def test_gradients_of_a_companion_that_are_not_finite_change_nothing(recipe_path, base: Path, monkeypatch) -> None:
    loop = Loop(load_recipe(recipe_path(**run_changes(base))))
    before = {name: value.clone() for name, value in loop._tensors().items()}
    usual = loop.objective.companion_losses
    spoiled = lambda *given: {name: loss * float("nan") for name, loss in usual(*given).items()}
    monkeypatch.setattr(loop.objective, "companion_losses", spoiled)
    loop._train_step()
    after = loop._tensors()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [] and loop._skipped == 1


BAD = {
    "guidance 0": ({"guidance": 0}, "guidance is 0; expected a cfg of 1 or more"),
    "no such timestep": ({"timestep": 1000}, "timestep is 1000; expected 1 to 999, 400"),
    "scores nowhere": ({"score_timesteps": [900, 20]}, r"score_timesteps are \[900, 20\]"),
    "a fake score that stays": ({"fake_updates": 0}, "fake_updates is 0 .* leads it astray"),
    "no fake rate": ({"fake_rate": 0}, "fake_rate 0; expected"),
    "no pairs": ({"pair_share": 0}, "pair_share 0"),
    "an unknown loss": ({"pair_loss": "ssim"}, "pair_loss is 'ssim'.*expected one of lpips, l2"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_settings_that_can_not_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose("objective", {"name": "dmd", **values}, "recipe")


def test_a_note_is_of_the_stage_that_made_the_weights(base: Path, recipe_path) -> None:
    """Also where a finished run is started again."""
    stage = {"base_size": 64, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    changes = run_changes(base, stages=[stage, {**stage, "objective": {"timestep": 600}}])
    for _ in range(2):
        assert read_note(train(recipe_path(**changes))) == dmd_note(600)


@pytest.mark.parametrize("name", ["dmd", "lcm"])
def test_what_holds_for_the_whole_run_is_no_stages(base: Path, recipe_path, name: str) -> None:
    stage = {"base_size": 64, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "objective": {"teacher": "other"}}
    with pytest.raises(ConfigError, match="stages.0.objective: teacher can't differ from stage to stage"):
        load_recipe(recipe_path(**run_changes(base, objective=name, stages=[stage])))


@pytest.mark.parametrize("name", ["dmd", "lcm"])
def test_random_weights_have_nothing_to_teach(base: Path, recipe_path, name: str) -> None:
    with pytest.raises(ConfigError, match="random weights have nothing to teach. Give --transformer"):
        train(recipe_path(**run_changes(base, objective=name, initialize=None)))


@pytest.mark.parametrize("name", ["dmd", "lcm"])
@pytest.mark.parametrize("place", ["initialize", "teacher"])
def test_a_teacher_that_is_distilled_or_quantized_is_refused(base: Path, recipe_path, tmp_path: Path, name: str, place: str) -> None:
    def changes(path: Path) -> dict[str, Any]:
        return run_changes(path) | {"objective": name} if place == "initialize" else run_changes(base, objective={"name": name, "teacher": str(path)})

    weights, other = load_file(base), tmp_path / "other.safetensors"
    save_file(weights, other, note_metadata(dmd_note(400)))
    with pytest.raises(ConfigError, match="distilled to one step at timestep 400 .DMD. already: guidance would be folded in twice"):
        train(recipe_path(**changes(other)))
    save_file({key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in weights.items()}, other)
    with pytest.raises(ConfigError, match="quantized .*is F8_E4M3.*bf16, fp16 or fp32"):
        train(recipe_path(**changes(other)))


def test_a_dry_run_counts_the_networks_beside(recipe_path, base: Path, monkeypatch) -> None:
    """Of a whole network copies; of a LoRA its matrices alone."""
    monkeypatch.setattr(dry_run_module, "get_variant", lambda name: VARIANT)
    whole = list(dry_run(recipe_path(**run_changes(base))))
    assert [line.split(": ")[1].split(",")[0] for line in whole if "also keeps" in line] == ["teacher", "fake"]
    assert next(line for line in whole if "also keeps: fake" in line).count("GiB") == 3
    lora = list(dry_run(recipe_path(**run_changes(base, method={"name": "lora", "rank": 2}))))
    assert [line.split(": ")[1].split(",")[0] for line in lora if "also keeps" in line] == ["fake"]
