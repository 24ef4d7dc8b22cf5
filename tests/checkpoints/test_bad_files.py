"""Files that are damaged, foreign, incomplete or dangerous: one typed error that helps, never a partial model."""
from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.checkpoints import inspect_file
from pixart.checkpoints.load import load_transformer
from pixart.errors import CheckpointError, PixArtError
from tests.support.checkpoint_factory import tiny_weights, write


def refused(path, *words, **options):
    with pytest.raises(CheckpointError) as caught:
        load_transformer(path, **options)
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message, message
    return message


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file(tiny_weights()[2], path)
    return path


def test_missing_file(tmp_path):
    refused(tmp_path / "nowhere.safetensors", "no such file")


def test_empty_file(tmp_path):
    (tmp_path / "e.safetensors").touch()
    refused(tmp_path / "e.safetensors", "empty", "download")


@pytest.mark.parametrize("keep", [4, 100, 5000, 0.5, 0.999])
def test_truncated_safetensors(good, keep):
    size = good.stat().st_size
    os.truncate(good, int(keep * size) if keep < 1 else keep)
    refused(good, "truncated", "download")


@pytest.mark.parametrize("keep", [10, 0.5, 0.999])
@pytest.mark.parametrize("new", [True, False])
def test_truncated_pth(tmp_path, keep, new):
    path = tmp_path / "t.pth"
    torch.save({"state_dict": tiny_weights()[2]}, path, _use_new_zipfile_serialization=new)
    os.truncate(path, int(keep * path.stat().st_size) if keep < 1 else keep)
    refused(path, "truncated", "download")


@pytest.mark.parametrize("name", ["m.pth", "old.pth", "m.safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_never_give_an_untyped_error(tmp_path, name):
    original, path, rng = tiny_weights()[2], tmp_path / name, random.Random(0)
    if name.endswith("pth"):
        torch.save({"state_dict": original}, path, _use_new_zipfile_serialization=name == "m.pth")
    else:
        save_file(original, path)
    data, refusals = path.read_bytes(), 0
    for _ in range(30):
        damaged = bytearray(data)
        for _ in range(20):  # where headers, pickles and zip directories lie
            damaged[rng.choice([rng.randrange(3000), -1 - rng.randrange(3000)])] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            inspect_file(path)  # bytes of a weight may change unseen
        except PixArtError:
            refusals += 1
    assert refusals > 5


def test_damaged_header(good):
    data = bytearray(good.read_bytes())
    data[9:40] = b"?" * 31
    good.write_bytes(data)
    refused(good, "header is damaged")


class Payload:
    """Runs code when unpickled the unsafe way."""

    def __reduce__(self):
        return os.system, ("touch /tmp/pixart_payload_ran",)


@pytest.mark.parametrize("new", [True, False])
def test_pickle_with_code_is_not_run(tmp_path, new):
    path, flag = tmp_path / "evil.pth", "/tmp/pixart_payload_ran"
    torch.save({"state_dict": tiny_weights()[2], "x": Payload()}, path, _use_new_zipfile_serialization=new)
    refused(path, "could run code", "(posix.system)", "safetensors")
    assert not os.path.exists(flag)


@pytest.mark.parametrize(
    "name, start, words",
    [
        ("m.gguf", b"GGUF\x03\0\0\0", ("GGUF", "ComfyUI-GGUF")),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ("LFS pointer",)),
        ("m.safetensors", b"<!DOCTYPE html><html>", ("web page",)),
        ("m.pth", b"hello there, no weights", ("text file", "hello there")),
        ("m.pth", bytes(range(200, 255)), ("neither safetensors nor",)),
        ("m.safetensors", b"\0" * 64, ("header",)),
        ("m.safetensors", struct.pack("<Q", 2) + b"{}", ("no PixArt layers", "0 keys")),
    ],
)
def test_not_weights_at_all(tmp_path, name, start, words):
    (tmp_path / name).write_bytes(start)
    refused(tmp_path / name, *words)


@pytest.mark.parametrize(
    "keys, kind, loader",
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.0.bias"], "SDXL", "UNETLoader"),
        (["down_blocks.0.conv1.weight", "mid_block.conv1.weight", "time_embedding.linear_1.weight"], "UNet", "UNETLoader"),
        (["transformer.blocks.0.attn.qkv.lora_A.weight", "transformer.blocks.0.attn.qkv.lora_B.weight"], "LoRA", "LoraLoaderModelOnly"),
        (["lora_unet_blocks_0_attn_qkv.lora_down.weight"], "LoRA", "LoRA loader"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight", "quant_conv.weight"], "VAE", "VAELoader"),
        (["taesd_decoder.1.weight"], "VAE", "VAELoader"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "T5", "load_text_encoder"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "CLIP", "T5"),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "Flux", "UNETLoader"),
        (["controlnet.0.copied_block.attn.qkv.weight", "base_model.t_block.1.weight"], "ControlNet", "transformer"),
        (["blocks.0.cross_attn.kv_linear.weight", "blocks.0.mlp.inverted_conv.conv.weight"], "Sana", "UNETLoader"),
        (["foo.weight", "bar.weight"], "no PixArt layers", "foo.weight"),
    ],
)  # fmt: skip
def test_foreign_files_are_named(tmp_path, keys, kind, loader):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "f.safetensors")
    refused(tmp_path / "f.safetensors", kind, loader)


def test_all_problems_are_listed_at_once(good):
    tensors = load_file(good)
    del tensors["blocks.0.attn.proj.bias"], tensors["blocks.1.attn.proj.bias"], tensors["final_layer.scale_shift_table"]
    tensors["blocks.0.mlp.fc2.bias"] = torch.zeros(3)
    tensors["t_embedder.mlp.0.bias"] = torch.full((144,), float("nan"))
    tensors["x_embedder.proj.weight"][0, 0, 0, 0] = float("inf")
    tensors["banana"] = torch.zeros(1)
    save_file(tensors, good)
    refused(
        good, "missing blocks.{0-1}.attn.proj.bias", "missing final_layer.scale_shift_table", "unknown key banana",
        "blocks.0.mlp.fc2.bias has shape (3,), expected (144,)", "t_embedder.mlp.0.bias has 144 NaN",
        "x_embedder.proj.weight has 1 NaN or infinite",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_in_fp8_weights(good, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(good).items()}
    tensors["blocks.0.mlp.fc1.weight"][0, :3] = float("nan")
    save_file(tensors, good)
    refused(good, "blocks.0.mlp.fc1.weight has 3 NaN")


def test_sparse_weights(tmp_path):
    tensors = tiny_weights()[2]
    tensors["t_block.1.weight"] = tensors["t_block.1.weight"].to_sparse()
    torch.save(tensors, tmp_path / "sparse.pth")
    refused(tmp_path / "sparse.pth", "t_block.1.weight", "dense")


def test_a_missing_block_is_named(good):
    tensors = {key: value for key, value in load_file(good).items() if not key.startswith("blocks.0.")}
    save_file(tensors, good)
    refused(good, "missing blocks.0.attn.qkv.weight", "missing blocks.0.scale_shift_table")


def test_last_blocks_missing_from_a_folder(tmp_path):
    config, diffusers, original = tiny_weights()
    left = {key: value for key, value in diffusers.items() if not key.startswith("transformer_blocks.1.")}
    refused(write("diffusers-folder", tmp_path, config, left, original), "config.json says depth 2, the weights have 1")


def test_config_of_another_model(tmp_path):
    path = write("diffusers-folder", tmp_path, *tiny_weights())
    (path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    refused(path, "FluxTransformer2DModel", "PixArtTransformer2DModel")
    (path / "config.json").write_text("{nonsense")
    assert "not readable as JSON" in str(pytest.raises(CheckpointError, load_transformer, path).value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("sample_size", None), ("sample_size", "128"), ("sample_size", 0), ("sample_size", 10**400), ("patch_size", 0),
        ("patch_size", [2]), ("num_attention_heads", True), ("attention_head_dim", -72), ("interpolation_scale", 0),
        ("interpolation_scale", "x"), ("interpolation_scale", float("nan")), ("sample_size", {"a": ["b"] * 99}),
    ],
)  # fmt: skip
def test_config_with_values_of_no_model(tmp_path, field, value):
    path = write("diffusers-folder", tmp_path, *tiny_weights())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, field: value}))
    assert len(refused(path, f"config.json says {field} ", "above 0")) < 400


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("num_layers", "2", 'num_layers "2"; expected a whole number above 0'),
        ("in_channels", [4], "in_channels [4]; expected"),
        ("use_additional_conditions", "false", 'use_additional_conditions "false"; expected true, false or null'),
    ],
)
def test_config_with_text_for_a_number(tmp_path, field, value, expected):
    """Text looks like the number that was expected, and "false" like true."""
    path = write("diffusers-folder", tmp_path, *tiny_weights())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, field: value}))
    refused(path, f"config.json says {expected}")


@pytest.mark.parametrize("value", [[0.13025], {"a": 1}, "x", None])
def test_odd_values_beside_a_pipeline_tell_nothing(tmp_path, value):
    path = write("pipeline-folder", tmp_path, *tiny_weights(null_rows=None))
    expected = inspect_file(path / "transformer")
    (path / "model_index.json").write_text(json.dumps({"_class_name": value}))
    (path / "vae").mkdir()
    (path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": value}))
    found = inspect_file(path)
    assert not found.family_known and (found.family, found.config) == (expected.family, expected.config)


@pytest.mark.parametrize(
    "note",
    [
        {"num_heads": "x"}, {"num_heads": 0}, {"position_range": "z"}, {"position_range": float("nan")}, {"position_range": 10**400},
        {"base_size": "y"}, {"base_size": [1024]}, {"base_size": True}, {"family": "gamma"}, {"family": ["alpha"]},
    ],
)  # fmt: skip
def test_note_with_values_of_no_model_is_not_used(good, note, caplog):
    expected = inspect_file(good)
    save_file(load_file(good), good, metadata={"pixart": json.dumps(note)})
    assert inspect_file(good) == expected
    assert any(next(iter(note)) in message and "not used" in message for message in caplog.messages)


def test_the_sound_part_of_a_note_is_used(good):
    save_file(load_file(good), good, metadata={"pixart": json.dumps({"base_size": 512, "num_heads": "x"})})
    assert inspect_file(good).base_size == 512


def test_missing_shards_are_all_named(tmp_path):
    path = write("diffusers-shards", tmp_path, *tiny_weights())
    for shard in sorted(path.glob("*.safetensors"))[1:]:
        shard.unlink()
    refused(path, "00002-of-00003", "00003-of-00003", "2 of 3")


def test_one_shard_names_its_folder_as_the_remedy(tmp_path):
    path = write("diffusers-shards", tmp_path, *tiny_weights())
    for shard in sorted(path.glob("*.safetensors")):
        refused(shard, "one of several shards: choose their folder")


def test_index_can_not_leave_its_folder(tmp_path):
    path = write("diffusers-shards", tmp_path, *tiny_weights())
    index = next(path.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside its folder" in str(pytest.raises(CheckpointError, load_transformer, path).value)


def test_folder_without_weights(tmp_path):
    refused(tmp_path, "nothing", "diffusion_pytorch_model.safetensors")


def test_integer_weights(good):
    tensors = load_file(good)
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].to(torch.int8)
    save_file(tensors, good)
    refused(good, "blocks.0.mlp.fc1.weight holds torch.int8")


def test_contradicting_variant(good):
    refused(good, "csize_embedder", variant="alpha-1024")
