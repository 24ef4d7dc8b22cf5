"""Files: every format gives the same model, and a bad one gives an error that helps."""
from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import pixart
from pixart.checkpoints import inspect_file, prepare, read_checkpoint
from pixart.checkpoints.load import QUANTIZATION_SUFFIXES, load_transformer
from pixart.config import TransformerConfig
from pixart.errors import CheckpointError, PixArtError
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import FORMATS, PREFIXES, stored_positions, tiny_weights, write


def run(model, context_dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 6, 10, generator=generator).to(context_dtype)
    context = torch.randn(2, 5, model.config.caption_channels, generator=generator).to(context_dtype)
    with torch.no_grad():
        return model(latent, torch.tensor([10.0, 900.0]), context, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("micro", [False, True])
def test_every_format_gives_the_same_model(tmp_path, kind, micro):
    config, diffusers, original = tiny_weights(micro, null_rows=None)
    model = pixart.load_transformer(write(kind, tmp_path, config, diffusers, original), ema=kind == "pth-ema")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = model.state_dict()
    assert set(state) == set(original)
    assert all(torch.equal(state[key], original[key]) for key in original)
    assert model.detection.variant == ("alpha-1024" if micro else "sigma-1024")
    assert model.detection.ema == (kind == "pth-ema")
    assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", (*PREFIXES, "model.transformer.", "module.model.", "module._orig_mod."))
def test_prefixes(tmp_path, layout, prefix):
    _, diffusers, original = tiny_weights()
    tensors = original if layout == "original" else diffusers
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "m.safetensors")
    model = load_transformer(tmp_path / "m.safetensors")
    assert model.detection.prefix == prefix and model.detection.format == layout
    assert torch.equal(model.blocks[1].attn.qkv.weight, original["blocks.1.attn.qkv.weight"])


def test_ema_is_taken_on_request_only(tmp_path):
    path = write("pth-ema", tmp_path, *tiny_weights())
    assert load_transformer(path).blocks[0].attn.qkv.weight.abs().max() == 0
    assert load_transformer(path, ema=True).blocks[0].attn.qkv.weight.abs().max() > 0
    assert any("state_dict_ema" in reason for reason in inspect_file(path).reasons)


def test_ema_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no state_dict_ema.*state_dict"):
        load_transformer(write("pth", tmp_path, *tiny_weights()), ema=True)


def test_legacy_pth_and_plain_state_dict(tmp_path):
    original = tiny_weights()[2]
    torch.save(original, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_transformer(tmp_path / "old.pth").t_block[1].weight, original["t_block.1.weight"])


def test_stored_positions_never_reach_the_model(tmp_path):
    original = tiny_weights()[2]
    torch.save({"state_dict": original}, tmp_path / "a.pth")
    torch.save({"state_dict": {**original, "pos_embed": 100 * torch.randn(1, 64, 144)}}, tmp_path / "b.pth")
    torch.save({"state_dict": {**original, "pos_embed": stored_positions(16, 144, 16)}}, tmp_path / "c.pth")
    first = run(load_transformer(tmp_path / "a.pth"))
    assert torch.equal(first, run(load_transformer(tmp_path / "b.pth")))
    assert torch.equal(first, run(load_transformer(tmp_path / "c.pth")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_files_or_the_asked_for(tmp_path, dtype):
    save_file(tiny_weights(dtype=dtype)[2], tmp_path / "m.safetensors")
    model = load_transformer(tmp_path / "m.safetensors")
    assert {p.dtype for p in model.parameters()} == {dtype} and model.detection.dtype == str(dtype)[6:]
    assert {p.dtype for p in load_transformer(tmp_path / "m.safetensors", dtype=torch.float32).parameters()} == {torch.float32}


def test_fp8_file_is_computed_in_bf16(tmp_path):
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tiny_weights()[2].items()}, tmp_path / "m.safetensors")
    model = load_transformer(tmp_path / "m.safetensors")
    assert model.detection.dtype == "float8_e4m3fn"
    assert torch.isfinite(run(model, torch.bfloat16)).all()


def test_alpha_256_from_a_diffusers_config(tmp_path):
    weights = tiny_weights(null_rows=None, pixels=256, position_range=16)
    model = load_transformer(write("diffusers-folder", tmp_path, *weights))
    assert model.detection.variant == "alpha-256" and model.config.position_range == 16
    sigma = load_transformer(write("diffusers-folder", tmp_path / "s", *tiny_weights(null_rows=None, pixels=256)))
    assert sigma.detection.variant == "sigma-256" and sigma.config.position_range == 32


def test_a_converters_range_of_32_for_alpha_256_is_followed_and_said(tmp_path):
    weights = tiny_weights(null_rows=None, pixels=256, position_range=32)
    path = write("pipeline-folder", tmp_path, *weights)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    found = inspect_file(path)
    assert (found.variant, found.config.position_range) == ("alpha-256", 32)
    assert any("variant=alpha-256 uses that" in reason for reason in found.reasons)
    assert inspect_file(path, variant="alpha-256").config.position_range == 16


def test_pipeline_folder_tells_the_family(tmp_path):
    path = write("pipeline-folder", tmp_path, *tiny_weights(null_rows=None, pixels=512))
    assert inspect_file(path).variant == "sigma-512" and inspect_file(path).family_known
    (path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    assert inspect_file(path).variant == "alpha-512"
    (path / "model_index.json").unlink()
    (path / "vae").mkdir()
    (path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.18215}))
    assert inspect_file(path).family == "alpha"


def test_heads_come_from_the_config(tmp_path):
    path = write("diffusers-folder", tmp_path, *tiny_weights(hidden=128, heads=4))
    assert load_transformer(path).config.num_heads == 4
    assert load_transformer(path / "diffusion_pytorch_model.safetensors").config.num_heads == 4


def test_kv_compressed_file(tmp_path):
    config = TransformerConfig(
        hidden_size=144, depth=3, num_heads=2, mlp_hidden=576, caption_channels=32, compressed_blocks=((1, 2), (2, 2))
    )
    state = {key: torch.randn(value.shape) * 0.05 for key, value in PixArtTransformer(config).state_dict().items()}
    save_file(state, tmp_path / "kv.safetensors")
    model = load_transformer(tmp_path / "kv.safetensors")
    assert model.config == config and torch.equal(model.blocks[1].attn.sr.weight, state["blocks.1.attn.sr.weight"])
    assert torch.isfinite(run(model)).all()


def test_companions_in_a_full_checkpoint_are_left_out(tmp_path):
    original = tiny_weights()[2]
    tensors = {f"model.diffusion_model.{k}": v for k, v in original.items()} | {"vae.decoder.conv_in.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "full.safetensors")
    assert any("vae." in reason for reason in inspect_file(tmp_path / "full.safetensors").reasons)


# Bad input


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
        ("m.pth", b"hello there, no weights", ("neither safetensors nor",)),
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


def test_missing_shards_are_all_named(tmp_path):
    path = write("diffusers-shards", tmp_path, *tiny_weights())
    for shard in sorted(path.glob("*.safetensors"))[1:]:
        shard.unlink()
    refused(path, "00002-of-00003", "00003-of-00003", "2 of 3")


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


# What a host hands over


def scaled(tensors):
    """A state dict as quantizers write it: fp8 weights with a scale beside each."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in tensors.items():
        if key.endswith(("mlp.fc1.weight", "mlp.fc2.weight")):
            out[key] = value.to(torch.float8_e4m3fn)
            out[key.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
        else:
            out[key] = value
    return out


def test_quantization_extras_are_kept_apart():
    original = tiny_weights()[2]
    given = {f"model.diffusion_model.{key}": value for key, value in scaled(original).items()}
    prepared = prepare(given, source="x", passthrough_suffixes=QUANTIZATION_SUFFIXES)
    assert set(prepared.state_dict) == set(original)
    assert prepared.extras["blocks.0.mlp.fc1.scale_weight"] == 0.5 and "scaled_fp8" in prepared.extras
    assert len(prepared.extras) == 5 and len(given) == len(original) + 5


def test_quantization_extras_follow_renamed_layers():
    _, diffusers, _ = tiny_weights()
    diffusers["transformer_blocks.1.ff.net.2.weight_scale"] = torch.tensor(2.0)
    prepared = prepare(diffusers, source="x", passthrough_suffixes=QUANTIZATION_SUFFIXES)
    assert prepared.extras == {"blocks.1.mlp.fc2.weight_scale": torch.tensor(2.0)}
    diffusers["transformer_blocks.1.attn1.to_q.weight_scale"] = torch.tensor(2.0)
    with pytest.raises(CheckpointError, match="to_q.weight_scale"):
        prepare(diffusers, source="x", passthrough_suffixes=QUANTIZATION_SUFFIXES)


def test_packed_weights_are_checked_by_rows_only():
    original = tiny_weights()[2]
    original["blocks.0.mlp.fc1.comfy_quant"] = torch.zeros(3, dtype=torch.uint8)
    original["blocks.0.mlp.fc1.weight"] = torch.zeros(576, 72, dtype=torch.uint8)
    assert prepare(original, source="x", passthrough_suffixes=QUANTIZATION_SUFFIXES)
    original["blocks.0.mlp.fc1.weight"] = torch.zeros(570, 72, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="blocks.0.mlp.fc1.weight has shape"):
        prepare(original, source="x", passthrough_suffixes=QUANTIZATION_SUFFIXES)


def test_quantization_extras_without_a_host_say_what_to_do(tmp_path):
    save_file(scaled(tiny_weights()[2]), tmp_path / "q.safetensors")
    refused(tmp_path / "q.safetensors", "blocks.0.mlp.fc1.scale_weight", "PixArtModelLoader")


def test_prepare_leaves_the_given_dict_alone():
    diffusers = tiny_weights()[1]
    before = set(diffusers)
    prepare(diffusers, source="x")
    assert set(diffusers) == before


def test_tensors_without_storage_are_accepted():
    config = TransformerConfig(depth=2)
    state = PixArtTransformer(config, device="meta").state_dict()
    assert prepare(state, source="x").detection.config == config


def test_read_checkpoint_maps_files_instead_of_reading_them(good):
    raw = read_checkpoint(good)
    assert raw.container == "safetensors" and raw.source == str(good)
