"""Files of models trained with KV compression: run exactly, in every format and mode; contradictions are errors."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.checkpoints import convert_file, inspect_file, load_transformer
from pixart.checkpoints.convert import parse_compression
from pixart.config import COMPRESSION_MODES, TransformerConfig
from pixart.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from tests.support.checkpoint_factory import FORMATS, tiny_weights
from tests.support.kv_reference import compressed_model, note, predict, write_compressed

BLOCKS = {0: 3, 2: 2}
SIZES = {"depth": 3, "hidden": 144, "null_rows": None}


def inputs(rows: int, columns: int):
    """A batch of two with captions of unequal length, for a grid of tokens."""
    generator = torch.Generator().manual_seed(rows)
    latent = torch.randn(2, 4, 2 * rows, 2 * columns, generator=generator)
    context = torch.randn(2, 5, 32, generator=generator)
    return latent, torch.tensor([999, 30]), context, torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def assert_same(model, reference, grid):
    latent, timestep, context, mask = inputs(*grid)
    expected = predict(reference, latent, timestep, context, mask)
    with torch.no_grad():
        found = model(latent, timestep.float(), context, mask)
    assert (found - expected).norm() / expected.norm() < 1e-5
    return expected


@pytest.mark.parametrize("kind", FORMATS)
def test_conv_in_every_format(tmp_path, kind):
    """5 x 7 tokens, which neither ratio divides."""
    path, config = write_compressed(kind, tmp_path, BLOCKS, "conv", **SIZES)
    model = load_transformer(path, ema=kind == "pth-ema")
    assert dict(model.config.compressed_blocks) == BLOCKS and model.config.compression_mode == "conv"
    compressed = assert_same(model, compressed_model(config, BLOCKS, "conv", (5, 7)), (5, 7))
    plain = predict(compressed_model(config, {}, "conv", (5, 7)), *inputs(5, 7))
    assert (compressed - plain).norm() / plain.norm() > 1e-2  # the reference does compress


@pytest.mark.parametrize("mode", [mode for mode in COMPRESSION_MODES if mode != "conv"])
def test_modes_without_weights_are_noted_and_exact(tmp_path, mode):
    for kind in FORMATS:
        path, config = write_compressed(kind, tmp_path / kind, BLOCKS, mode, **SIZES)
        model = load_transformer(path, ema=kind == "pth-ema")
        assert (dict(model.config.compressed_blocks), model.config.compression_mode) == (BLOCKS, mode), kind
        assert any(f"KV compression {mode}" in reason for reason in model.detection.reasons)
    for grid in ((4, 6), (6, 6), (5, 7), (7, 11)):
        assert_same(model, compressed_model(config, BLOCKS, mode, grid), grid)


def test_any_ratio_in_every_block(tmp_path):
    blocks = {0: 4, 1: 5, 2: 2}
    path, config = write_compressed("safetensors", tmp_path, blocks, "conv", **SIZES)
    assert_same(load_transformer(path), compressed_model(config, blocks, "conv", (9, 14)), (9, 14))


def test_report_names_mode_and_blocks(tmp_path):
    path, _ = write_compressed("safetensors", tmp_path, BLOCKS, "uniform_every", **SIZES)
    assert "block 0: 1 of 3, block 2: 1 of 2 (uniform_every)" in inspect_file(path).describe()


def test_convert_notes_what_the_user_knows(tmp_path):
    _, _, original = tiny_weights(**SIZES)
    save_file(original, tmp_path / "plain.safetensors")
    for name in ("a.safetensors", "a.pth"):
        told = convert_file(tmp_path / "plain.safetensors", tmp_path / name, "original", kv_compression="ave:2:1-2")
        again = convert_file(told, tmp_path / f"again-{name}", "original")
        found = inspect_file(again).config
        assert (found.compressed_blocks, found.compression_mode) == (((1, 2), (2, 2)), "ave")
        with pytest.raises(UnsupportedError, match="KV compression"):
            convert_file(told, tmp_path / "folder", "diffusers")
    assert set(load_file(tmp_path / "a.safetensors")) == set(original)


@pytest.mark.parametrize("text", ["", "mean:2:0-1", "ave:1:0-1", "ave:2:2-1", "ave:2", "ave:2:0-1:3", "ave:x:0-1"])
def test_bad_notes_on_the_command_line(text):
    with pytest.raises(CheckpointError, match="expected MODE:RATIO:FIRST-LAST"):
        parse_compression(text)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"compressed_blocks": [[0, 2]], "compression_mode": "uniform"}, "says KV compression uniform.*attn.sr in 2 blocks"),
        ({"compressed_blocks": [[0, 2]], "compression_mode": "conv"}, "says KV compression conv"),
        ({"compressed_blocks": [[0, 2]], "compression_mode": "median"}, "median.*one of conv, uniform"),
        ({"compressed_blocks": "all", "compression_mode": "ave"}, r"pairs \[block, ratio\]"),
        ({"compressed_blocks": [[0, 2], [0, 3]], "compression_mode": "ave"}, "each block once"),
        ({"compressed_blocks": [[0, 1]], "compression_mode": "ave"}, r"pairs \[block, ratio\]"),
    ],
)
def test_contradicting_notes_are_refused(tmp_path, facts, message):
    path, _ = write_compressed("safetensors", tmp_path, BLOCKS, "conv", **SIZES)
    note(path, facts)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(path)


def test_a_note_on_blocks_that_are_not_there(tmp_path):
    path, _ = write_compressed("safetensors", tmp_path, {3: 2}, "ave", **SIZES)
    with pytest.raises(CheckpointError, match="3 blocks"):
        load_transformer(path)


def test_damaged_compression_layers_are_named(tmp_path):
    path, _ = write_compressed("safetensors", tmp_path, BLOCKS, "conv", **SIZES)
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors["blocks.0.attn.sr.weight"] = torch.ones(144, 1, 1, 1)
    del tensors["blocks.2.attn.norm.bias"]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_transformer(tmp_path / "bad.safetensors")
    for shape in ((144, 1, 2, 3), (144, 144, 2, 2), (144, 4)):
        save_file({**tensors, "blocks.0.attn.sr.weight": torch.ones(shape)}, tmp_path / "shape.safetensors")
        with pytest.raises(CheckpointError, match="blocks.0.attn.sr.weight"):
            load_transformer(tmp_path / "shape.safetensors")
    assert "unknown key blocks.0.attn.sr.weight" in str(caught.value) and "missing blocks.2.attn.norm.bias" in str(caught.value)


@pytest.mark.parametrize("mode", COMPRESSION_MODES)
def test_a_latent_that_compression_would_empty(tmp_path, mode):
    path, _ = write_compressed("safetensors", tmp_path, {1: 3}, mode, **SIZES)
    latent, timestep, context, mask = inputs(1, 2)
    with pytest.raises(InputError, match="block 1 compresses keys and values by 3.*1 x 2 tokens; expected at least 3 tokens|48 px"):
        load_transformer(path)(latent, timestep.float(), context, mask)


@pytest.mark.parametrize("blocks", [((8, 2),), ((0, 1),), ((0, 2), (0, 3)), ((-1, 2),)])
def test_impossible_configs_are_refused(blocks):
    with pytest.raises(ConfigError, match="compressed_blocks"):
        TransformerConfig(depth=8, compressed_blocks=blocks)
    with pytest.raises(ConfigError, match="median.*conv"):
        TransformerConfig(compression_mode="median")


def test_json_report_holds_the_mode(tmp_path):
    path, _ = write_compressed("pth", tmp_path, BLOCKS, "ave", **SIZES)
    assert json.loads(json.dumps(inspect_file(path).to_dict()))["config"]["compression_mode"] == "ave"
