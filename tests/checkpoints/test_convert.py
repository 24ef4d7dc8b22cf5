"""Conversion changes names and nothing else, and what it writes opens elsewhere."""
from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.checkpoints import convert_file, inspect_file
from pixart.config import TransformerConfig
from pixart.errors import CheckpointError, UnsupportedError
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import FORMATS, tiny_weights, write


def assert_bit_equal(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key].view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_format_to_both_layouts(tmp_path, kind, dtype):
    config, diffusers, original = tiny_weights(null_rows=None, dtype=dtype)
    src = write(kind, tmp_path / "src", config, diffusers, original)
    ema = kind == "pth-ema"
    assert_bit_equal(load_file(convert_file(src, tmp_path / "o.safetensors", "original", ema=ema)), original)
    folder = convert_file(src, tmp_path / "d", "diffusers", ema=ema)
    assert_bit_equal(load_file(folder / "diffusion_pytorch_model.safetensors"), diffusers)
    stored = torch.load(convert_file(src, tmp_path / "o.pth", "original", ema=ema), weights_only=True)
    assert_bit_equal(stored["state_dict"], original)


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_there_and_back_keeps_every_bit(tmp_path, micro, dtype):
    original = {key: value.to(dtype) for key, value in tiny_weights(micro, null_rows=120)[2].items()}
    torch.save({"state_dict": {**original, "pos_embed": torch.zeros(1, 4, 144)}}, tmp_path / "a.pth")
    there = convert_file(tmp_path / "a.pth", tmp_path / "b", "diffusers")
    assert_bit_equal(load_file(convert_file(there, tmp_path / "c.safetensors", "original")), original)


def test_detection_survives_both_ways(tmp_path):
    """Range 16, 4 heads and the family are in no weight."""
    config, diffusers, original = tiny_weights(null_rows=None, pixels=256, position_range=16, hidden=128, heads=4)
    src = write("diffusers-folder", tmp_path / "src", config, diffusers, original)
    first = inspect_file(src)
    assert first.variant == "alpha-256"
    for name in ("one.safetensors", "one.pth"):
        single = convert_file(src, tmp_path / name, "original")
        second = inspect_file(single)
        third = inspect_file(convert_file(single, tmp_path / f"{name}-back", "diffusers"))
        for found in (second, third):
            assert (found.variant, found.config, found.base_size) == (first.variant, first.config, first.base_size)


def test_an_assumed_family_stays_assumed(tmp_path):
    save_file(tiny_weights(null_rows=None)[2], tmp_path / "a.safetensors")
    assert not inspect_file(convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "original")).family_known
    alpha = convert_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "original", variant="alpha-512")
    assert inspect_file(alpha).variant == "alpha-512"


@pytest.mark.parametrize(
    "micro, rows, variant", [(False, 300, "auto"), (True, 120, "auto"), (False, 120, "alpha-256"), (False, None, "sigma-512")]
)
def test_diffusers_opens_the_folder_and_agrees(tmp_path, micro, rows, variant):
    from diffusers import PixArtTransformer2DModel

    from pixart.checkpoints.load import load_transformer

    config, diffusers, original = tiny_weights(micro, null_rows=rows)
    save_file(original, tmp_path / "a.safetensors")
    folder = convert_file(tmp_path / "a.safetensors", tmp_path / "d", "diffusers", variant=variant)
    theirs = PixArtTransformer2DModel.from_pretrained(folder)
    ours = load_transformer(tmp_path / "a.safetensors", variant=variant)
    latent, context, t = torch.randn(1, 4, 8, 12), torch.randn(1, 7, 32), torch.tensor([500])
    added = {"resolution": torch.tensor([[64.0, 96.0]]), "aspect_ratio": torch.tensor([[64 / 96]])} if micro else None
    with torch.no_grad():
        expected = theirs(latent, context, t, added_cond_kwargs=added, return_dict=False)[0]
        assert torch.allclose(ours(latent, t, context), expected, atol=1e-5)


def test_single_diffusers_file(tmp_path):
    _, diffusers, original = tiny_weights(null_rows=None)
    save_file(original, tmp_path / "a.safetensors")
    assert_bit_equal(load_file(convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")), diffusers)


def test_kv_compression_is_not_dropped_silently(tmp_path):
    config = TransformerConfig(hidden_size=72, depth=2, num_heads=1, mlp_hidden=288, caption_channels=32, compressed_blocks=((1, 2),))
    state = {key: torch.zeros(value.shape) for key, value in PixArtTransformer(config).state_dict().items()}
    save_file(state, tmp_path / "kv.safetensors")
    with pytest.raises(UnsupportedError, match="KV compression"):
        convert_file(tmp_path / "kv.safetensors", tmp_path / "d", "diffusers")
    assert_bit_equal(load_file(convert_file(tmp_path / "kv.safetensors", tmp_path / "o.safetensors", "original")), state)


@pytest.mark.skipif(os.name == "nt", reason="modes are those of Unix")
@pytest.mark.parametrize(("to", "name"), [("original", "m.safetensors"), ("original", "m.pth"), ("diffusers", "folder")])
def test_others_may_read_what_is_written(tmp_path, to, name):
    """As the umask says, e.g. for ComfyUI in a container."""
    written = convert_file(write("safetensors", tmp_path, *tiny_weights()), tmp_path / name, to)
    (tmp_path / "plain").touch()
    files = list(written.iterdir()) if written.is_dir() else [written]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "plain").stat().st_mode}


def test_a_bad_source_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="bad.safetensors"):
        convert_file(tmp_path / "bad.safetensors", tmp_path / "out", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def test_destinations(tmp_path):
    src = tmp_path / "a.safetensors"
    save_file(tiny_weights()[2], src)
    with pytest.raises(CheckpointError, match="source itself"):
        convert_file(src, src, "original")
    with pytest.raises(CheckpointError, match="original, diffusers"):
        convert_file(src, tmp_path / "b", "onnx")
    with pytest.raises(CheckpointError, match="as .safetensors or as a folder"):
        convert_file(src, tmp_path / "b.pth", "diffusers")
    assert convert_file(src, tmp_path / "plain", "original") == tmp_path / "plain.safetensors"
    assert convert_file(src, tmp_path / "new" / "deep.safetensors", "original").is_file()
    assert json.loads((convert_file(src, tmp_path / "f", "diffusers") / "config.json").read_text())["num_layers"] == 2
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("sizes", "variant"), [
    ({"channels": 16}, "sigma-flux"), ({"null_rows": None}, "alpha-512"), ({"null_rows": None}, "alpha-256"), ({}, "sigma-2k"),
])  # fmt: skip
@pytest.mark.parametrize(("to", "name"), [
    ("original", "m.safetensors"), ("original", "m.pth"), ("diffusers", "m.safetensors"), ("diffusers", "folder"),
])  # fmt: skip
def test_the_variant_that_was_chosen_comes_back(tmp_path, sizes, variant, to, name):
    """Family, VAE and positions, which the weights don't tell."""
    source = write("safetensors", tmp_path, *tiny_weights(**sizes))
    before = inspect_file(source, variant)
    after = inspect_file(convert_file(source, tmp_path / name, to, variant=variant))
    for fact in ("variant", "family", "family_known", "base_size", "vae", "latent_scale", "latent_shift", "config"):
        assert getattr(after, fact) == getattr(before, fact), fact


def test_a_pipeline_around_the_weights_knows_better_than_their_note(tmp_path):
    """Somebody put converted weights into another family's folder."""
    source = write("safetensors", tmp_path, *tiny_weights(null_rows=None))
    folder = convert_file(source, tmp_path / "pipeline" / "transformer", "diffusers", variant="sigma-512")
    assert inspect_file(folder).variant == "sigma-512"
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}', encoding="utf-8")
    assert inspect_file(tmp_path / "pipeline").family == "alpha"


def test_noted_compression_holds_beside_a_config_too(tmp_path):
    """A mode without weights, in a folder whose config.json has no place for it."""
    source = write("safetensors", tmp_path, *tiny_weights())
    folder = convert_file(source, tmp_path / "folder", "diffusers")
    convert_file(source, folder / "diffusion_pytorch_model.safetensors", "original", kv_compression="uniform:2:0-1")
    found = inspect_file(folder)
    assert found.config.compressed_blocks == ((0, 2), (1, 2)) and found.config.compression_mode == "uniform"
