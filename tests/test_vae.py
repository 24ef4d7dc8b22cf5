"""VAEs against diffusers' own classes, through every file layout."""
import logging
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from pixart.errors import CheckpointError, InputError, UnsupportedError
from pixart.vae import load_vae
from tests.support.tiny_vae import SD1, SDXL, tiny_kl, tiny_taesd


def to_ldm(tensors: dict) -> dict:
    """diffusers' names to LDM's, written the other way round than in the package."""
    swaps = [
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("resnets.", "block."),
        ("down_blocks.", "down."),
    ]
    renamed = {}
    for key, value in tensors.items():
        for old, new in swaps:
            key = key.replace(old, new)
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", key)
        if "attn_1" in key and value.ndim == 2:
            value = value[..., None, None]
        renamed[key] = value.contiguous()
    return renamed


def check_kl(vae, model, scale):
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        latents = model.encode(images * 2 - 1).latent_dist.mode() * scale
        decoded = model.decode(latents / scale).sample / 2 + 0.5
    assert (vae.pixels_per_latent, vae.latent_channels) == (8, 4)
    torch.testing.assert_close(vae.encode(images), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_the_spread_of_a_latent_is_in_the_models_space(tmp_path):
    model = tiny_kl()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        found = model.encode(images * 2 - 1).latent_dist
    mean, std = load_vae(tmp_path, SDXL, latent_shift=0.5).distribution(images)
    torch.testing.assert_close(mean, (found.mean - 0.5) * SDXL, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, found.std * SDXL, rtol=1e-4, atol=1e-5)
    tiny_taesd().save_pretrained(tmp_path / "tiny")
    assert load_vae(tmp_path / "tiny", SDXL).distribution(images)[1] is None


def test_kl_folder_and_pipeline_folder(tmp_path):
    model = tiny_kl()
    model.save_pretrained(tmp_path / "vae")
    check_kl(load_vae(tmp_path / "vae", SDXL), model, SDXL)
    check_kl(load_vae(tmp_path, SDXL), model, SDXL)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_kl_single_file_in_ldm_names(tmp_path, prefix):
    model = tiny_kl()
    ldm = to_ldm(model.state_dict())
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    if hasattr(utils, "convert_ldm_vae_checkpoint"):  # the test's renaming is LDM's indeed
        config = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
        assert set(utils.convert_ldm_vae_checkpoint(dict(ldm), config)) == set(model.state_dict())
    save_file({prefix + k: v for k, v in ldm.items()} | {"model_ema.decay": torch.zeros(1)}, tmp_path / "v.safetensors")
    check_kl(load_vae(tmp_path / "v.safetensors", SD1), model, SD1)


def test_kl_single_file_in_diffusers_names_old_and_new(tmp_path):
    model = tiny_kl()
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "new.safetensors")
    check_kl(load_vae(tmp_path / "new.safetensors", SDXL), model, SDXL)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in tensors.items():
        for new_name, old_name in names.items():
            key = key.replace(new_name, old_name)
        old[key] = value
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "old.safetensors")
    check_kl(load_vae(tmp_path / "old.safetensors", SDXL), model, SDXL)


def test_autoencoder_tiny_folder_and_file_work_in_model_space(tmp_path):
    model = tiny_taesd()
    model.save_pretrained(tmp_path / "taesd")
    latents, images = torch.randn(2, 4, 4, 6), torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected = model.decode(latents).sample / 2 + 0.5
        encoded = model.encode(images * 2 - 1).latents
    for path in (tmp_path / "taesd", tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"):
        vae = load_vae(path, SDXL)
        torch.testing.assert_close(vae.decode(latents), expected)
        torch.testing.assert_close(vae.encode(images), encoded)


@pytest.mark.parametrize("scaled", [True, False])
def test_taesd_layout_of_the_demo(tmp_path, scaled):
    autoencoder = pytest.importorskip("demo.training.autoencoder")
    decoder = autoencoder.build_decoder(seed=3)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    path = tmp_path / "vae.safetensors"
    autoencoder.save_autoencoder(decoder.half().float(), path)
    if not scaled:
        save_file({k: v for k, v in load_file(path).items() if not k.startswith("vae_")}, path)
    vae = load_vae(path, SDXL)
    latents, images = torch.randn(2, 4, 4, 6), torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected = decoder(latents)
    assert expected.std() > 0.01
    torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    torch.testing.assert_close(vae.encode(images), autoencoder.encode(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", ["TAESD", "diffusers", "LDM"])
def test_the_vae_in_an_all_in_one_file_is_the_same_as_alone(tmp_path, prefix, layout):
    """As CheckpointSave writes it: beside a transformer and a T5, all of the VAE's own keys under one prefix."""
    if layout == "TAESD":
        autoencoder = pytest.importorskip("demo.training.autoencoder")
        autoencoder.save_autoencoder(autoencoder.build_decoder(seed=3), tmp_path / "alone.safetensors")
        tensors = {**load_file(tmp_path / "alone.safetensors"), "vae_scale": torch.tensor(0.5), "vae_shift": torch.tensor(0.25)}
    else:
        tensors = tiny_taesd().state_dict() if layout == "diffusers" else to_ldm(tiny_kl().state_dict())
    others = {
        "model.diffusion_model.x_embedder.proj.weight": torch.zeros(8, 4, 2, 2),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
    }
    save_file(tensors, tmp_path / "alone.safetensors")
    save_file({**others, **{prefix + key: value for key, value in tensors.items()}}, tmp_path / "all.safetensors")
    alone, inside = (load_vae(tmp_path / f"{name}.safetensors", SDXL) for name in ("alone", "all"))
    latents, images = torch.randn(1, 4, 4, 6), torch.rand(1, 3, 32, 48)
    assert (inside.factor, inside.shift) == (alone.factor, alone.shift)
    assert torch.equal(inside.decode(latents), alone.decode(latents)) and torch.equal(inside.encode(images), alone.encode(images))


def test_an_all_in_one_file_without_a_vae_is_none(tmp_path):
    save_file({"model.taesd_decoder.1.bias": torch.zeros(2), "vae_scale": torch.ones(())}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="m.safetensors is not a VAE"):
        load_vae(tmp_path / "m.safetensors", SDXL)


def test_taesd_scale_and_shift_are_the_hosts(tmp_path):
    autoencoder = pytest.importorskip("demo.training.autoencoder")
    path = tmp_path / "vae.safetensors"
    autoencoder.save_autoencoder(autoencoder.build_decoder(), path)
    tensors = load_file(path)
    plain = load_vae(path, SDXL)
    save_file({**tensors, "vae_scale": torch.tensor(0.5), "vae_shift": torch.tensor(0.25)}, path)
    moved = load_vae(path, SDXL)
    latents = torch.randn(1, 4, 2, 2)
    wanted = (latents / SDXL - 0.25) * 0.5  # what the host feeds its taesd_decoder
    torch.testing.assert_close(moved.decode(latents), plain.decode(wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.encode(moved.decode(latents)[:, :, :16, :16]).shape, latents.shape)


@pytest.mark.parametrize("own, model, word", [(SDXL, SD1, "SD1 VAE"), (SD1, SDXL, "SDXL VAE")])
def test_a_wrong_vae_is_reported_once(tmp_path, caplog, own, model, word):
    tiny_kl(own).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="pixart"):
        load_vae(tmp_path, model)
    warnings = [r.getMessage() for r in caplog.records if r.name == "pixart.vae"]
    assert len(warnings) == 1 and word in warnings[0] and str(own) in warnings[0]
    caplog.clear()
    load_vae(tmp_path, own)
    assert not [r for r in caplog.records if r.name == "pixart.vae" and r.levelno >= logging.WARNING]


def test_bad_files(tmp_path):
    file = tmp_path / "v.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_vae(file, SDXL)
    tensors = {k: v.contiguous() for k, v in tiny_kl().state_dict().items()}
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match="download it again"):
        load_vae(file, SDXL)
    save_file({"x_embedder.proj.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="is not a VAE"):
        load_vae(file, SDXL)
    nan = {**tensors, "decoder.conv_out.bias": torch.full((3,), torch.nan), "decoder.extra": torch.zeros(1)}
    del nan["decoder.conv_out.weight"]
    save_file(nan, file)
    with pytest.raises(CheckpointError, match="missing decoder.conv_out.weight; unknown decoder.extra; NaN.*conv_out.bias"):
        load_vae(file, SDXL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a VAE folder"):
        load_vae(tmp_path / "empty", SDXL)
    tiny_kl().save_pretrained(tmp_path / "folder")
    for text, found in (("{", "not readable as JSON"), ("[]", "holds a list")):
        (tmp_path / "folder" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=found):
            load_vae(tmp_path / "folder", SDXL)


def test_wrong_kind_of_autoencoder(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "VQModel"))
    with pytest.raises(UnsupportedError, match="VQModel"):
        load_vae(tmp_path, SDXL)


def test_without_diffusers_the_error_says_what_to_install(tmp_path, monkeypatch):
    tiny_kl().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnsupportedError, match="pip install diffusers"):
        load_vae(tmp_path, SDXL)


def test_encode_checks_the_picture(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="multiples of 8"):
        load_vae(tmp_path, SDXL).encode(torch.zeros(1, 3, 17, 33))


@pytest.mark.parametrize("state", [{1: torch.zeros(2)}, {"decoder.conv_in.weight": 3, 2: "x"}])
def test_entries_that_are_no_tensors_are_named(tmp_path, state):
    torch.save(state, tmp_path / "vae.pt")
    with pytest.raises(CheckpointError, match="vae.pt.*(is not a VAE|not tensors)"):
        load_vae(tmp_path / "vae.pt", 0.13025)
