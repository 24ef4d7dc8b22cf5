"""PixArts on a VAE of 16 channels, SD3's or Flux's: named, sampled in its space, and decoded in Python."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.latent_formats
import pytest
import torch

import nodes as host_nodes
from tests.support import checkpoint_factory, host
from tests.support.host_models import captions, sample

core = host.pack_module("pixart.checkpoints.load")
errors = host.pack_module("pixart.errors")
vae_module = host.pack_module("pixart.vae")
loader = host.pack_module("nodes.host.loader")
resolution = host.pack_module("nodes.resolution").PixArtResolution


def write(folder: Path, channels: int = 16, scale: float | None = None) -> Path:
    """A tiny model in diffusers' layout; with `scale` in a pipeline's folder whose VAE has it."""
    config = {**checkpoint_factory.diffusers_config(depth=2), "in_channels": channels, "out_channels": 2 * channels}
    weights = checkpoint_factory.reference_model(config).state_dict()
    path = checkpoint_factory.write("pipeline-folder" if scale else "diffusers-folder", folder, config, weights, {})
    if scale:
        (path / "vae").mkdir()
        (path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": scale}))
    return path


@pytest.mark.parametrize(
    ("scale", "variant", "vae"), [(None, "auto", "sd3"), (0.3611, "auto", "flux"), (1.5305, "auto", "sd3"), (None, "sigma-flux", "flux")]
)
def test_the_vae_is_named(tmp_path: Path, scale: float | None, variant: str, vae: str) -> None:
    report = core.inspect_file(write(tmp_path, scale=scale), variant=variant)
    assert report.vae == vae and report.config.in_channels == 16
    assert (report.latent_scale, report.latent_shift) == {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}[vae]
    text = report.describe()
    assert {"sd3": "SD3 (16", "flux": "Flux (16"}[vae] in text and "SDXL" not in text
    assert (scale is None and variant == "auto") == ("choose variant sigma-flux" in text)


@pytest.mark.parametrize("vae", ["sd3", "flux"])
def test_the_host_samples_in_that_space(tmp_path: Path, vae: str) -> None:
    """Its empty latents of 4 channels are widened by the host, pictures go through the format's scale and shift."""
    model = loader.load_model(str(write(tmp_path)), f"sigma-{vae}", "default")
    kind = {"sd3": comfy.latent_formats.SD3, "flux": comfy.latent_formats.Flux}[vae]
    assert type(model.model.latent_format) is kind
    empty = resolution.execute("256", 256, 256, 1).result[0]
    found = host_nodes.common_ksampler(model, 1, 2, 4.5, "euler", "normal", captions(5), captions(2, seed=1), empty)[0]["samples"]
    assert found.shape[1] == 16 and torch.isfinite(found).all()
    picture = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    scale, shift = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}[vae]
    torch.testing.assert_close(model.model.process_latent_in(picture), (picture - shift) * scale)
    assert torch.isfinite(sample(model, captions(5), captions(2, seed=1), picture, steps=4, denoise=0.5)).all()


def test_python_decodes_with_scale_and_shift(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    module = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=8, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    module.save_pretrained(tmp_path)
    vae = vae_module.load_vae(tmp_path, 0.3611, latent_shift=0.1159)
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        expected = module.decode(latents / 0.3611 + 0.1159).sample / 2 + 0.5
        images = torch.rand(1, 3, 32, 32)
        encoded = (module.encode(images * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    torch.testing.assert_close(vae.decode(latents), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.encode(images), encoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [3, 8, 32])
def test_other_channels_are_refused_by_name(tmp_path: Path, channels: int) -> None:
    with pytest.raises(errors.CheckpointError, match=f"reads latents of {channels} channels; expected 4 or 16"):
        loader.load_model(str(write(tmp_path, channels)), "auto", "default")


def test_a_variant_of_other_channels_contradicts_the_file(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="latents of 16 channels; sigma-1024 has 4"):
        core.inspect_file(write(tmp_path), variant="sigma-1024")


def test_the_log_names_the_vae(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        loader.load_model(str(write(tmp_path)), "auto", "default")
    assert any("SD3 (16 channels" in text for text in caplog.messages)
