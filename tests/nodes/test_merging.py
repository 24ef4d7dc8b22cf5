"""Merges, saved models and `diff` patches: every weight of the result is what was asked for, tables and null caption too."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes as host_nodes
from tests.support import host
from tests.support.host_models import captions, difference, load_model, sample, write_model
from tests.support.kv_reference import write_compressed

merging = importlib.import_module("comfy_extras.nodes_model_merging")
NAMES = ("blocks.1.scale_shift_table", "final_layer.scale_shift_table", "y_embedder.y_embedding", "blocks.0.mlp.fc1.weight")


def call(node, *arguments):
    """A node's first result, of either API."""
    made = getattr(node(), node.FUNCTION)(*arguments) if hasattr(node, "FUNCTION") else node.execute(*arguments)
    return getattr(made, "result", made)[0]
# The host merges in fp16 on a card
CLOSE = {"atol": 2e-3, "rtol": 2e-3} if host.on_card() else {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture
def pair(sigma_file: Path, tmp_path: Path):
    """Two models of the same sizes, and their weights."""
    first = load_file(sigma_file)
    order = torch.Generator().manual_seed(5)
    second = {key: value + 0.1 * torch.randn(value.shape, generator=order) for key, value in first.items()}
    save_file(second, tmp_path / "second.safetensors")
    return load_model(sigma_file), load_model(tmp_path / "second.safetensors"), first, second


def loaded(model) -> dict[str, torch.Tensor]:
    """The weights that a run uses."""
    run(model)
    network = model.model.diffusion_model
    return {name: comfy.utils.get_attr(network, name).detach().clone().cpu() for name in NAMES}


def run(model) -> torch.Tensor:
    return sample(model, captions(5), captions(2, seed=1), steps=1)


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.0])
def test_simple_merges_reach_every_weight(pair, ratio: float) -> None:
    """ratio is the first model's part."""
    one, two, first, second = pair
    merged = call(merging.ModelMergeSimple, one, two, ratio)
    found = loaded(merged)
    for name in NAMES:
        torch.testing.assert_close(found[name], ratio * first[name] + (1 - ratio) * second[name], **CLOSE)
    found = loaded(merged)  # a second run patches nothing twice
    torch.testing.assert_close(found[NAMES[0]], ratio * first[NAMES[0]] + (1 - ratio) * second[NAMES[0]], **CLOSE)
    found = loaded(one)
    assert all(torch.equal(found[name], first[name]) for name in NAMES)


def test_a_whole_merge_draws_the_second_models_picture(pair) -> None:
    one, two, *_ = pair
    assert difference(run(call(merging.ModelMergeSimple, one, two, 0.0)), run(two)) < (5e-3 if host.on_card() else 1e-5)


def test_sums_and_differences(pair) -> None:
    one, two, first, second = pair
    delta = call(merging.ModelSubtract, two, one, 1.0)
    found = loaded(call(merging.ModelAdd, one, delta))
    for name in NAMES:
        torch.testing.assert_close(found[name], second[name], **CLOSE)


@pytest.mark.parametrize("name", ["blocks.1.scale_shift_table", "y_embedder.y_embedding"])
def test_diff_of_a_table_through_the_hosts_lora_loader(sigma, sigma_file: Path, models: Path, name: str) -> None:
    before = load_file(sigma_file)[name]
    save_file({f"diffusion_model.{name}.diff": torch.full_like(before, 0.5)}, str(models / "loras" / "d.safetensors"))
    patched = host_nodes.LoraLoaderModelOnly().load_lora_model_only(sigma, "d.safetensors", 0.5)[0]
    torch.testing.assert_close(loaded(patched)[name], before + 0.25, **CLOSE)


class Saved:
    """ModelSave into a folder, and the file back through PixArtModelLoader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def again(self, model):
        node = merging.ModelSave()
        node.output_dir = str(self.folder)
        node.save(model, "saved")
        (file,) = self.folder.glob("saved*.safetensors")
        return load_model(file), load_file(file)


def test_a_merged_model_comes_back_as_it_drew(pair, tmp_path: Path) -> None:
    one, two, *_ = pair
    merged = call(merging.ModelMergeSimple, one, two, 0.4)
    expected = run(merged)
    again, weights = Saved(tmp_path / "out").again(merged)
    assert difference(run(again), expected) < 1e-5
    assert not [key for key in weights if key.endswith("pixart_note")]  # the weights tell all


@pytest.mark.parametrize("mode", ["uniform", "uniform_every", "ave"])
def test_compression_without_weights_is_saved(tmp_path: Path, mode: str) -> None:
    path, _ = write_compressed("safetensors", tmp_path, {1: 2}, mode, depth=3, captions=32, null_rows=None)
    model = load_model(path)
    again, weights = Saved(tmp_path / "out").again(model)
    (note,) = [value for key, value in weights.items() if key.endswith("pixart_note")]
    assert json.loads(bytes(note.tolist()))["compression_mode"] == mode
    assert again.model.diffusion_model.config == model.model.diffusion_model.config
    assert torch.equal(run(again), run(model))


FACTS = ("variant", "family", "base_size", "vae", "latent_scale", "max_tokens", "family_known", "config")


def assert_comes_back(model, folder: Path) -> None:
    again, _ = Saved(folder).again(model)
    for name in FACTS:
        assert getattr(again.model.detection, name) == getattr(model.model.detection, name), name
    assert type(again.model.latent_format) is type(model.model.latent_format)
    if model.model.diffusion_model.config.in_channels == 4:
        assert torch.equal(run(again), run(model))


@pytest.mark.parametrize(("sizes", "variant"), [
    ({"null_rows": 120}, "alpha-256"), ({"null_rows": None}, "alpha-256"), ({"null_rows": None}, "alpha-512"),
    ({"channels": 16}, "sigma-flux"), ({"channels": 16}, "sigma-sd3"), ({}, "sigma-2k"), ({}, "sigma-256"), ({"null_rows": None}, "auto"),
])  # fmt: skip
def test_a_chosen_variant_is_saved(tmp_path: Path, sizes: dict, variant: str) -> None:
    assert_comes_back(load_model(write_model(tmp_path, **sizes), variant=variant), tmp_path / "out")


@pytest.mark.parametrize(("pixels", "positions"), [(1024, 16), (512, 16), (512, 64), (256, 32), (2048, 64)])
def test_the_positions_of_a_config_are_saved(tmp_path: Path, pixels: int, positions: int) -> None:
    path = write_model(tmp_path, "diffusers-folder", pixels=pixels, position_range=positions, null_rows=None)
    model = load_model(path)
    assert model.model.diffusion_model.config.position_range == positions
    assert_comes_back(model, tmp_path / "out")


def test_a_note_of_another_form_is_an_error(sigma_file: Path, tmp_path: Path) -> None:
    errors = host.pack_module("pixart.errors")
    save_file({**load_file(sigma_file), "pixart_note": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(errors.CheckpointError, match="pixart_note is .3,. in torch.float32"):
        load_model(tmp_path / "m.safetensors")
