"""What a run shows and says: log, plot, samples, validation, trackers, and what a dry run foresees."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import autocast

from pixart.cli import main
from pixart.errors import ConfigError, PixArtError
from pixart.sampling_note import LCM
from pixart.training import dry_run as planning
from pixart.training.dry_run import activation_bytes
from pixart.training.loop import Loop
from pixart.training.methods import full
from pixart.training.optimizers import block_matrices, state_bytes
from pixart.training.recipe import load_recipe
from pixart.training.run import dry_run, train
from pixart.training.samples import Sampler, contact_sheet
from pixart.training.sources import scenes
from pixart.training.trackers import check_trackers
from pixart.training.validation import validation_losses
from tests.support.tiny_training import VARIANT, TwoPictures

SAMPLES = {"prompts": ["bright", "dark"], "every": 2, "steps": 3, "ratios": [1.0, 0.5]}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def test_log_plot_samples_and_tensorboard(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_path(steps=4, log_every=2, validation_every=2, samples=SAMPLES, trackers=["tensorboard"])
    train(recipe)
    rows = rows_of(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [2, 4]
    assert all(row["loss"] == pytest.approx(row["noise_loss"] + row["variance_loss"], abs=2e-5) for row in steps)
    assert {"grad_norm", "learning_rate", "pictures_per_second", "seconds", "base_size"} <= steps[0].keys()
    assert [row["step"] for row in rows if "validation_noise_loss" in row] == [2, 4]
    assert sorted(file.name for file in (tmp_path / "run/samples").iterdir()) == ["00000002.png", "00000004.png"]
    with Image.open(tmp_path / "run/loss.png") as plot:
        assert len(np.unique(np.asarray(plot))) > 10
    events = list((tmp_path / "run/pixart").rglob("events.*"))
    assert events and any(b"validation_noise_loss" in file.read_bytes() for file in events)


def test_looking_changes_no_weight(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    def final(**changes: object) -> dict[str, torch.Tensor]:
        loop = Loop(load_recipe(recipe_path(steps=3, caption_dropout=0.3, **changes)))
        loop.run()
        return {name: value.clone() for name, value in loop.network.state_dict().items()}

    plain, watched = final(), final(samples={**SAMPLES, "every": 1}, validation_every=1, log_every=1)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_samples_are_dpm_solver_with_guidance_of_the_averaged_weights(recipe_path: Callable[..., Path]) -> None:
    from diffusers import DPMSolverMultistepScheduler

    loop = Loop(load_recipe(recipe_path(steps=4, samples=SAMPLES)))
    loop.run()
    sampler = Sampler(loop.recipe, loop.method, loop.source)
    bright, dark = sampler._prompted(0)
    assert (bright.size, dark.size) == ((64, 64), (48, 96))  # the bins of 256 px nearest to the ratios, scaled to 64
    with loop.average.applied():
        found = sampler.draw(loop.network, bright, 5, loop.device)
        scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        scheduler.set_timesteps(3)
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        states, _ = loop.source.encode(["", "bright"])
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                both = [loop.network(latent, timestep[None], each[None])[:, :4] for each in states]
            latent = scheduler.step(both[0] + 4.5 * (both[1] - both[0]), timestep, latent).prev_sample
    torch.testing.assert_close(found, latent, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, sampler.draw(loop.network, bright, 5, loop.device))  # the weights of the last step differ


def test_samples_of_a_model_in_distillation_are_drawn_as_it_is_made_for(recipe_path: Callable[..., Path]) -> None:
    loop = Loop(load_recipe(recipe_path(steps=1, samples={"prompts": ["bright"]})))
    usual = Sampler(loop.recipe, loop.method, loop.source)
    distilled = Sampler(loop.recipe, loop.method, loop.source, LCM)
    assert (usual.steps, usual.guidance) == (20, 4.5) and (distilled.steps, distilled.guidance) == (4, 1)


def test_samples_of_a_controlnet_are_held_out_pictures_with_their_own_hints(recipe_path: Callable[..., Path]) -> None:
    hinted = {"name": "scenes", "text_encoder": "", "hints": True}
    recipe = load_recipe(recipe_path(steps=1, samples=SAMPLES, source=hinted))
    source = TwoPictures(recipe.source.settings, recipe)
    shown = Sampler(recipe, recipe.method.make(recipe), source)._hinted(0)
    batches = source.validation(recipe.source.settings, recipe.stages[0], range(2))
    assert [one.title for one in shown] == [batch.captions[0] for batch in batches]
    for one, batch in zip(shown, batches):
        assert torch.equal(one.hint, batch.hint) and one.context.shape == (2, 2, 8)
        assert one.mask.tolist() == [[True, False], [True, True]]  # the empty caption first, of one token


def test_validation_is_the_loss_at_the_same_noise_each_time(recipe_path: Callable[..., Path]) -> None:
    loop = Loop(load_recipe(recipe_path(steps=2)))
    with torch.no_grad():
        first, again = validation_losses(loop, 0), validation_losses(loop, 0)
    assert first == again and first.keys() == {"noise_loss", "variance_loss"}
    loop._train_step()
    with torch.no_grad():
        assert validation_losses(loop, 0) != first


def test_a_source_without_held_out_pictures_has_no_validation(
    recipe_path: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TwoPictures, "validation", lambda *given: [])
    train(recipe_path(steps=1, validation_every=1))
    assert not any("validation_noise_loss" in row for row in rows_of(tmp_path))


def test_a_sheet_holds_every_picture_whole() -> None:
    pictures = [Image.new("RGB", (400, 200), "red"), Image.new("RGB", (100, 300), "blue"), Image.new("RGB", (64, 64), "lime")]
    sheet = contact_sheet(pictures, ["a red one", "ein blaues " * 40, "\u7eff\u8272"])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == 256 * 128 and colours[(0, 255, 0)] == 64 * 64
    assert colours[(0, 0, 255)] == pytest.approx(256 * 85, abs=256)


def test_a_log_that_can_not_be_written_ends_no_run(recipe_path: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    recipe = recipe_path(steps=2, log_every=1)
    loop = Loop(load_recipe(recipe))
    (tmp_path / "run/log.jsonl").mkdir()
    loop.run()
    assert Path(loop.recipe.output).is_file()


def test_trackers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'wandb', which is not installed; `pip install wandb`"):
        check_trackers(["wandb"])


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "came", "prodigy", "muon"])
def test_a_dry_run_foresees_what_optimizers_keep(recipe_path: Callable[..., Path], name: str) -> None:
    loop = Loop(load_recipe(recipe_path(optimizer=name)))
    loop._train_step()
    trained = [value for value in loop.network.parameters() if value.requires_grad]
    kept = sum(value.nbytes for each in loop.optimizers for state in each.state.values() for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1)
    maps = sum(value.nbytes for each in loop.optimizers for state in each.state.values() for what, value in state.items() if what.startswith("qmap"))
    foreseen = state_bytes(name, trained, block_matrices(loop.method.blocks(loop.network)))
    assert foreseen == pytest.approx(kept - maps, rel=0.02)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_dry_run_foresees_what_activations_keep(recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, checkpointed: bool) -> None:
    monkeypatch.setattr(planning, "get_variant", lambda name: replace(VARIANT, max_tokens=2))
    recipe = load_recipe(recipe_path(precision="bf16", checkpoint_blocks=checkpointed))
    with torch.device("meta"):
        network = recipe.method.make(recipe).build(None, torch.device("meta"))
    foreseen = activation_bytes(recipe, recipe.stages[0], recipe.method.make(recipe), network, 8, torch.device("cpu"))

    loop, alive = Loop(recipe), {}
    weights = {value.untyped_storage()._cdata for value in (*loop.network.parameters(), *loop.network.buffers())}

    def keep(value: torch.Tensor) -> torch.Tensor:
        alive[value.untyped_storage()._cdata] = (value, value.untyped_storage().nbytes())
        return value

    batch = loop.source.batch(recipe.source.settings, recipe.stages[0], planning_draws())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast("cpu", torch.bfloat16, cache_enabled=False):
        loop.network(batch.latent, torch.zeros(8), batch.context, batch.mask)
    kept = sum(size for storage, (_, size) in alive.items() if storage not in weights)
    if checkpointed:  # hooks see what lies outside of blocks; each of the two blocks has its input, and one is computed at a time
        assert kept < foreseen < 0.75 * activation_bytes(replace(recipe, checkpoint_blocks=False), recipe.stages[0], recipe.method.make(recipe), meta_network(recipe), 8, torch.device("cpu"))
    else:
        assert foreseen == pytest.approx(kept, rel=0.05)


def planning_draws() -> object:
    from pixart.training.draws import Draws

    return Draws(0, 0, 0, range(8))


def meta_network(recipe: object) -> torch.nn.Module:
    with torch.device("meta"):
        return recipe.method.make(recipe).build(None, torch.device("meta"))


@pytest.mark.parametrize(("method", "kept"), [("full", 1), ({"name": "lora", "rank": 2}, 0)])
def test_a_dry_run_counts_the_model_that_is_imitated(
    recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: Any, kept: int
) -> None:
    """A LoRA's is the network itself."""
    monkeypatch.setattr(planning, "get_variant", lambda name: VARIANT)
    lines = list(dry_run(recipe_path(initialize="not here.safetensors", method=method, objective="imitate")))
    assert len([line for line in lines if "imitate also keeps: teacher" in line]) == kept


@pytest.mark.parametrize("run", [dry_run, train])
def test_a_prior_that_isnt_there_is_told_first(recipe_path: Callable[..., Path], run: Callable[[Path], Any]) -> None:
    objective = {"name": "imitate", "prior_only": True}
    (recipe_path().parent / "empty.safetensors").touch()
    with pytest.raises(ConfigError, match="no picture shows what to keep"):
        list(run(recipe_path(initialize=str(recipe_path().parent / "empty.safetensors"), objective=objective)))
    with pytest.raises(ConfigError, match="there is nothing to keep; set initialize"):
        list(run(recipe_path(objective=objective)))


def test_a_dry_run_loads_and_writes_nothing(recipe_path: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "get_variant", lambda name: VARIANT)
    lines = list(dry_run(recipe_path(steps=7, initialize="not here.safetensors", optimizer="came")))
    text = "\n".join(lines)
    assert lines[0] == "two pictures" and "7 steps at 64 px, 8 pictures each, 56 in all" in text
    trained = sum(value.numel() for value in Loop(load_recipe(recipe_path())).network.parameters() if value.requires_grad)
    assert f"trains {trained:,} of" in text and "by came, precision fp32" in text
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]
    with pytest.raises(PixArtError, match="not here.safetensors"):
        train(recipe_path(initialize=str(tmp_path / "not here.safetensors")))


def test_the_command_line_gives_the_places(
    recipe_path: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "get_variant", lambda name: VARIANT)
    values = json.loads(recipe_path(steps=2).read_text())
    del values["output"], values["run_dir"]
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(values))
    assert main(["train", str(path)]) == 2
    assert "leaves --output to the command line" in capsys.readouterr().err
    out = tmp_path / "made.safetensors"
    assert main(["train", str(path), "--text-encoder", "t5 here", "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and (tmp_path / "made-run/states/00000002").is_dir()
    recipe = json.loads((tmp_path / "made-run/states/00000002/info.json").read_text())["recipe"]
    assert recipe["source"]["text_encoder"] == "t5 here"
    assert main(["train", str(path), "--dry-run", "--output", str(tmp_path / "other.safetensors")]) == 0
    assert "trains" in capsys.readouterr().out and not (tmp_path / "other-run").exists()


def test_weights_to_begin_from_must_be_given_for_pictures_of_ones_own(recipe_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    from pixart.training.recipe import check_given

    @dataclass(frozen=True)
    class WithData(scenes.Settings):
        data: str | None = None

    monkeypatch.setattr(scenes, "Settings", WithData)
    monkeypatch.setattr(full, "get_variant", lambda name: VARIANT)
    with pytest.raises(ConfigError, match="leaves --transformer .* to the command line"):
        check_given(load_recipe(recipe_path()))
    check_given(load_recipe(recipe_path(from_scratch=True)))
    check_given(load_recipe(recipe_path(initialize="x.safetensors")))
