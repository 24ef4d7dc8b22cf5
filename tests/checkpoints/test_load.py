"""Files: every format gives the same model; what a host hands over is prepared the same way."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import pixart
from pixart.checkpoints import inspect_file, prepare, read_checkpoint
from pixart.checkpoints.load import QUANTIZATION_SUFFIXES, load_transformer
from pixart.config import TransformerConfig
from pixart.errors import CheckpointError, UnsupportedError
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, "float16"])
def test_dtypes_without_layers_are_refused(tmp_path, dtype):
    save_file(tiny_weights()[2], tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedError, match="expected torch.float32, torch.bfloat16 or torch.float16"):
        load_transformer(tmp_path / "m.safetensors", dtype=dtype)


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
    with pytest.raises(CheckpointError, match="(?s)blocks.0.mlp.fc1.scale_weight.*PixArtModelLoader"):
        load_transformer(tmp_path / "q.safetensors")


def test_prepare_leaves_the_given_dict_alone():
    diffusers = tiny_weights()[1]
    before = set(diffusers)
    prepare(diffusers, source="x")
    assert set(diffusers) == before


def test_tensors_without_storage_are_accepted():
    config = TransformerConfig(depth=2)
    state = PixArtTransformer(config, device="meta").state_dict()
    assert prepare(state, source="x").detection.config == config


def test_read_checkpoint_names_its_container(tmp_path):
    raw = read_checkpoint(write("safetensors", tmp_path, *tiny_weights()))
    assert raw.container == "safetensors" and raw.source == str(tmp_path / "model.safetensors")
