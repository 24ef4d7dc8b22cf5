"""Pairs of noise and picture: what is drawn, what DMD makes of them, and which are refused."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from pixart.checkpoints import load_transformer
from pixart.cli import main
from pixart.errors import ConfigError
from pixart.training import pairs as pairs_module
from pixart.training.draw_pairs import draw_pairs
from pixart.training.draws import Draws
from pixart.training.loop import Loop
from pixart.training.parts import choose
from pixart.training.recipe import load_recipe
from pixart.training.run import train
from pixart.vae import load_vae
from tests.support.tiny_vae import tiny_taesd
from tests.training.test_dmd import picture, run_changes


@pytest.fixture
def base(recipe_path, tmp_path: Path) -> Path:
    return train(recipe_path(steps=3, output=str(tmp_path / "base.safetensors"), run_dir=str(tmp_path / "base")))


@pytest.fixture
def drawn(recipe_path, tmp_path: Path, base: Path) -> tuple[Path, Path]:
    """A recipe of DMD, and a folder of six pairs in three files."""
    config = recipe_path(**run_changes(base))
    assert draw_pairs(load_recipe(config), tmp_path / "pairs", 5, 3, 2.0, 2, 0) == 3
    return config, tmp_path / "pairs"


def test_pairs_are_what_the_solver_makes_of_their_noise(drawn: tuple[Path, Path], base: Path) -> None:
    files = sorted(drawn[1].glob("*.safetensors"))
    assert [file.name for file in files] == [f"{number:08}.safetensors" for number in range(3)]
    found, teacher = load_file(files[1]), load_transformer(base, dtype=torch.float32)
    context = torch.cat([torch.zeros(2, 2, 8), found["context"].float()])
    mask = torch.cat([torch.tensor([[True, False]] * 2), found["context_mask"]])
    steps = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    steps.set_timesteps(3)
    latent = found["noise"]
    with torch.no_grad():
        for t in steps.timesteps:
            empty, caption = teacher(torch.cat([latent, latent]), t.expand(4), context, mask)[:, :4].chunk(2)
            latent = steps.step(empty + 2.0 * (caption - empty), t, latent).prev_sample
    torch.testing.assert_close(found["latent"], latent, rtol=1e-4, atol=1e-4)


def test_drawing_goes_on_where_it_stopped(drawn: tuple[Path, Path]) -> None:
    config, folder = drawn
    before = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    (folder / "00000001.safetensors").unlink()
    kept = (folder / "00000002.safetensors").stat().st_mtime_ns
    draw_pairs(load_recipe(config), folder, 8, 3, 2.0, 2, 0)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (folder / "00000002.safetensors").stat().st_mtime_ns == kept and len(pairs_module.pair_files(folder)) == 4
    with pytest.raises(ConfigError, match="were drawn with steps 3 instead of 4"):
        draw_pairs(load_recipe(config), folder, 8, 4, 2.0, 2, 0)


def test_pairs_add_a_loss_of_latents(drawn: tuple[Path, Path], base: Path, recipe_path) -> None:
    settings = {"name": "dmd", "pairs": str(drawn[1]), "pair_loss": "l2", "pair_share": 1.0, "pair_weight": 0.5, "fake_updates": 1}
    loop = Loop(load_recipe(recipe_path(**run_changes(base, objective=settings))))
    stage, draws = loop.recipe.stages[0], Draws(0, 0, 3, range(4))
    batch = loop.source.batch(loop.recipe.source.settings, stage, draws)
    losses = loop.objective.losses(loop.objective.settings, loop.network, loop.method.conditions(loop.network, batch), batch, draws)
    pair = loop.objective.pairs.draw(draws, range(4), (8, 8), {})
    expected = [
        (picture(loop.network, x[None], 400, {"context": context[None]}) - wanted[None]).square().mean()
        for x, wanted, context in zip(pair.noise, pair.latent, pair.conditions["context"])
    ]
    torch.testing.assert_close(losses["pair_loss"], 0.5 * torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert {"matching_loss", "pair_loss"} == set(losses)
    assert "pair_loss" in loop._train_step()


def test_pairs_are_the_same_whatever_parts_a_batch_is_computed_in(drawn: tuple[Path, Path], base: Path, recipe_path) -> None:
    """The first half of the rows has one each, weighed so that the batch's mean is that of its pairs."""
    settings = {"name": "dmd", "pairs": str(drawn[1]), "pair_loss": "l2", "pair_share": 0.5}
    loop = Loop(load_recipe(recipe_path(**run_changes(base, objective=settings))))
    stage, found = loop.recipe.stages[0], []
    for parts in ([range(4)], [range(1), range(1, 4)], [range(0, 4, 2), range(1, 4, 2)]):
        rows = torch.zeros(4)
        for part in parts:
            draws = Draws(0, 0, 3, part)
            batch = loop.source.batch(loop.recipe.source.settings, stage, draws)
            told = loop.method.conditions(loop.network, batch)
            rows[list(part)] = loop.objective._pair_loss(loop.objective.settings, loop.network, told, batch, draws).detach()
        found.append(rows)
    assert (found[0][:2] > 0).all() and not found[0][2:].any()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def test_pairs_by_lpips_are_compared_as_pictures(drawn: tuple[Path, Path], base: Path, recipe_path, tmp_path: Path, monkeypatch) -> None:
    """LPIPS' network with random weights; the pictures are the VAE's."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    network = _LPIPS(net="squeeze", pnet_rand=True)
    monkeypatch.setattr(pairs_module, "lpips_network", lambda net: network)
    tiny_taesd().save_pretrained(tmp_path / "vae")
    settings = {"name": "dmd", "pairs": str(drawn[1]), "vae": str(tmp_path / "vae"), "lpips_net": "squeeze"}
    loop = Loop(load_recipe(recipe_path(**run_changes(base, objective=settings))))
    pair = loop.objective.pairs.draw(Draws(0, 0, 0, range(2)), range(2), (8, 8), {})
    latent = pair.latent.clone().requires_grad_(True)
    distance = loop.objective.pairs.distance(latent, pair.noise)
    vae = load_vae(tmp_path / "vae", 0.13025)
    shown = [(vae.decode(each) * 2 - 1).clamp(-1, 1) for each in (pair.latent, pair.noise)]
    torch.testing.assert_close(distance, network(*shown).flatten(), rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(distance.sum(), latent)[0].abs().sum() > 0
    assert loop.objective.pairs.distance(pair.latent, pair.latent).abs().max() < 1e-6


def test_lpips_without_its_library_or_weights_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ConfigError, match="pip install torchmetrics torchvision.*or choose pair_loss 'l2'"):
        pairs_module.lpips_network("vgg")


def test_pairs_of_another_model_are_refused(drawn: tuple[Path, Path], base: Path, recipe_path, tmp_path: Path) -> None:
    other = train(recipe_path(steps=1, seed=8, output=str(tmp_path / "other.safetensors"), run_dir=str(tmp_path / "other")))
    settings = {"name": "dmd", "pairs": str(drawn[1]), "pair_loss": "l2"}
    weights = {name: value + 0.05 * torch.randn(value.shape).to(value) for name, value in load_file(other).items()}
    save_file(weights, other)
    with pytest.raises(ConfigError, match="drawn by other weights than the teacher"):
        Loop(load_recipe(recipe_path(**run_changes(other, objective=settings))))
    save_file({name: value * 1.01 for name, value in load_file(base).items()}, other)  # a fine-tune may be as near
    with pytest.raises(ConfigError, match="drawn by other weights than the teacher"):
        Loop(load_recipe(recipe_path(**run_changes(other, objective=settings))))
    info = json.loads((drawn[1] / "info.json").read_text())
    for change, message in (({"caption_channels": 4096}, "made for another model: caption_channels 4096 instead of 8"), ({"probe": "x"}, "not a folder of pairs")):
        (drawn[1] / "info.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(ConfigError, match=message):
            Loop(load_recipe(recipe_path(**run_changes(base, objective=settings))))
    (drawn[1] / "info.json").write_text(json.dumps(info))
    for file in drawn[1].glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="no pairs .*Remove the file"):
        Loop(load_recipe(recipe_path(**run_changes(base, objective=settings))))._train_step()


def test_pairs_of_another_base_size_are_refused(drawn: tuple[Path, Path], base: Path, recipe_path) -> None:
    stage = {"base_size": 128, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    settings = {"name": "dmd", "pairs": str(drawn[1]), "pair_loss": "l2"}
    loop = Loop(load_recipe(recipe_path(**run_changes(base, objective=settings, stages=[stage]))))
    with pytest.raises(ConfigError, match="has pairs of 64x64 instead of 128x128 px. Draw pairs with this recipe"):
        loop._train_step()


def test_pairs_are_drawn_by_the_objectives_own_teacher(base: Path, recipe_path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({name: value * 1.2 for name, value in load_file(base).items()}, other)
    config = recipe_path(**run_changes(base, objective={"name": "dmd", "teacher": str(other)}))
    draw_pairs(load_recipe(config), tmp_path / "pairs", 2, 2, 2.0, 2, 0)
    settings = {"name": "dmd", "teacher": str(other), "pairs": str(tmp_path / "pairs"), "pair_loss": "l2"}
    assert "pair_loss" in Loop(load_recipe(recipe_path(**run_changes(base, objective=settings))))._train_step()


def test_pairs_of_another_precision_are_not_mixed(drawn: tuple[Path, Path], base: Path, recipe_path) -> None:
    with pytest.raises(ConfigError, match="were drawn with precision fp32 instead of bf16"):
        draw_pairs(load_recipe(recipe_path(**run_changes(base, precision="bf16"))), drawn[1], 8, 3, 2.0, 2, 0)


def test_lpips_needs_a_decoder() -> None:
    with pytest.raises(ConfigError, match="set vae to one that decodes them, or choose 'l2'"):
        choose("objective", {"name": "dmd", "pairs": "somewhere"}, "recipe")


def test_the_command_draws_pairs(drawn: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    assert main(["pairs", str(drawn[0]), str(tmp_path / "more"), "--count", "2", "--steps", "2", "--batch-size", "2"]) == 0
    assert "1 files of pairs in" in capsys.readouterr().out and (tmp_path / "more/00000000.safetensors").is_file()
    assert main(["pairs", str(drawn[0]), str(tmp_path / "more"), "--count", "1", "--steps", "2000"]) == 2
    assert "--steps is 2000; expected at most 1000" in capsys.readouterr().err
    assert main(["pairs", str(drawn[0]), str(tmp_path / "more"), "--count", "0"]) == 2
    assert "--count is 0; expected 1 or more" in capsys.readouterr().err
