"""The consistency decoder, and the demo's autoencoder, through the host's VAE nodes."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import comfy.model_management as management
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes as host_nodes
from demo.data.scenes import render, sample_scene
from demo.training.autoencoder import VAE_FILE, load_decoder, save_autoencoder
from tests.support import host
from tests.support.tiny_consistency import tiny_decoder, write_decoder

errors = host.pack_module("pixart.errors")
consistency = host.pack_module("nodes.host.consistency")


@pytest.fixture
def vae(models):
    """The node's output."""
    write_decoder(models / "vae" / "consistency")
    return host.pack_module("nodes.vae").PixArtConsistencyDecoder.execute("consistency").result[0]


def latent(rows: int = 4, columns: int = 6) -> torch.Tensor:
    """Samples as a sampler hands them out: in VAE scale."""
    return torch.randn(1, 4, rows, columns, generator=torch.Generator().manual_seed(2)) / 0.18215


def test_decode_and_encode(vae) -> None:
    picture = host_nodes.VAEDecode().decode(vae, {"samples": latent()})[0]
    expected = tiny_decoder().decode(latent(), generator=torch.Generator().manual_seed(0)).sample / 2 + 0.5
    torch.testing.assert_close(picture, expected.clamp(0, 1).movedim(1, -1))
    again = host_nodes.VAEEncode().encode(vae, torch.nn.functional.pad(picture, (0, 0, 0, 3, 0, 5)))[0]["samples"]
    assert again.shape == (1, 4, 4, 6)


def test_tiled_decoding_of_one_tile_is_the_same(vae) -> None:
    whole = host_nodes.VAEDecode().decode(vae, {"samples": latent(8, 8)})[0]
    tiled = host_nodes.VAEDecodeTiled().decode(vae, {"samples": latent(8, 8)}, 64, 16)[0]
    torch.testing.assert_close(tiled, whole, rtol=1e-3, atol=1e-3)
    many = host_nodes.VAEDecodeTiled().decode(vae, {"samples": latent(12, 20)}, 64, 16)[0]
    assert many.shape == (1, 96, 160, 3) and torch.isfinite(many).all()


def picture(height: int, width: int) -> torch.Tensor:
    """An IMAGE."""
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(5))


def encoded(pixels: torch.Tensor) -> torch.Tensor:
    """diffusers' latent of an IMAGE."""
    return tiny_decoder().encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mean


def test_encoding_takes_the_middle_as_the_hosts_vae_does(vae) -> None:
    pixels = picture(45, 70)
    torch.testing.assert_close(host_nodes.VAEEncode().encode(vae, pixels)[0]["samples"], encoded(pixels[:, 2:42, 3:67]))


def test_tiled_encoding(vae) -> None:
    """One tile is the whole; where there are more, each is encoded by itself and they are blended where they overlap."""
    tiled = host_nodes.VAEEncodeTiled().encode
    pixels = picture(69, 64)
    torch.testing.assert_close(tiled(vae, pixels, 128, 32)[0]["samples"], encoded(pixels[:, 2:66]), rtol=1e-3, atol=1e-3)
    pixels = picture(64, 96)
    found = tiled(vae, pixels, 64, 32)[0]["samples"]
    left, right = encoded(pixels[:, :, :64]), encoded(pixels[:, :, 32:])
    assert found.shape == (1, 4, 8, 12)
    torch.testing.assert_close(found[..., :4], left[..., :4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[..., 8:], right[..., 4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 48), (37, 55)])
def test_encoding_for_inpainting(vae, size: tuple[int, int]) -> None:
    """The host greys the masked pixels out, and hands the mask on; 0.3.64 asks the VAE for `downscale_ratio`."""
    pixels, mask = picture(*size), torch.zeros(1, *size)
    mask[:, 10:20, 8:30] = 1
    found = host_nodes.VAEEncodeForInpaint().encode(vae, pixels, mask, 0)[0]
    grey = torch.where(mask[..., None] > 0, torch.tensor(0.5), pixels)
    top, left = size[0] % 8 // 2, size[1] % 8 // 2
    torch.testing.assert_close(found["samples"], encoded(grey[:, top : top + 32, left : left + 48]))
    assert torch.equal(found["noise_mask"][0], mask[:, top : top + 32, left : left + 48])
    assert vae.downscale_ratio == 8


class TestShortOfMemory:
    """Cards with too little room for a whole picture, or for the decoder itself."""

    @staticmethod
    def shrink(vae, monkeypatch, largest: int) -> list[int]:
        """No picture of more latents than `largest` fits; the list collects what was tried."""
        tried: list[int] = []

        def limited(original, pixels_per_latent: int):
            def call(tensor):
                tried.append(tensor.shape[-2] * tensor.shape[-1] // pixels_per_latent**2)
                if tried[-1] > largest:
                    raise management.OOM_EXCEPTION("CUDA out of memory")
                return original(tensor)

            return call

        monkeypatch.setattr(vae.vae, "decode", limited(vae.vae.decode, 1))
        monkeypatch.setattr(vae.vae, "encode", limited(vae.vae.encode, 8))
        return tried

    @pytest.mark.parametrize(("largest", "tile"), [(6 * 8, 8), (4 * 4, 4)])
    def test_decoding_goes_on_in_tiles(self, vae, monkeypatch, caplog, largest: int, tile: int) -> None:
        monkeypatch.setattr(consistency, "TILES", (8, 4))
        samples = latent(6, 12)
        expected = vae.decode_tiled(samples, tile, tile, tile // 4)
        tried = self.shrink(vae, monkeypatch, largest)
        with caplog.at_level(logging.WARNING):
            found = host_nodes.VAEDecode().decode(vae, {"samples": samples})[0]
        assert tried[0] == 6 * 12 and torch.equal(found, expected)
        assert [message for message in caplog.messages if "in tiles" in message] == [
            "PixArt consistency decoder: not enough memory for decoding the whole picture, continuing in tiles."]  # fmt: skip

    def test_encoding_too(self, vae, monkeypatch, caplog) -> None:
        monkeypatch.setattr(consistency, "TILES", (8, 4))
        pixels = picture(51, 96)
        expected = vae.encode_tiled(pixels, 64, 64, 16)
        self.shrink(vae, monkeypatch, 6 * 8)
        found = host_nodes.VAEEncode().encode(vae, pixels)[0]["samples"]
        assert found.shape == (1, 4, 6, 12) and torch.equal(found, expected)
        assert sum("encoding the whole picture" in message for message in caplog.messages) == 1

    def test_where_nothing_fits_the_host_is_told(self, vae, monkeypatch) -> None:
        self.shrink(vae, monkeypatch, 0)
        with pytest.raises(management.OOM_EXCEPTION):
            vae.decode(latent())

    def test_other_errors_are_not_tried_again(self, vae, caplog) -> None:
        with pytest.raises(errors.InputError, match="expected .batch, 4"):
            vae.decode(torch.zeros(1, 16, 4, 4))
        assert "tiles" not in caplog.text

    def test_all_of_the_decoder_is_brought_in(self, vae, monkeypatch) -> None:
        """The host can't cast diffusers' layers one by one: half a decoder on the card is a crash, or the CPU's speed."""
        asked, loaded = {}, []
        monkeypatch.setattr(management, "load_models_gpu", lambda models, **options: asked.update(options))
        monkeypatch.setattr(vae.patcher, "load", lambda device, **options: loaded.append((device, options)))
        vae.device = torch.device("cpu")
        vae.decode(latent())
        assert asked["force_full_load"] is True and loaded == []
        narrow = asked["memory_required"]
        vae.vae.module.half()
        vae._load(24)
        assert 0 < asked["memory_required"] == narrow // 2  # of activations in the decoder's dtype
        card = SimpleNamespace(type="cuda")
        vae.device = card  # where a host that loads in part, whatever it is asked, has left the weights behind
        vae._load(24)
        assert loaded == [(card, {"full_load": True})]


def test_names_outside_the_folder_are_refused(models) -> None:
    with pytest.raises(errors.CheckpointError, match="not in the folder vae"):
        host.pack_module("nodes.vae").PixArtConsistencyDecoder.execute("../x")


def test_the_demos_fp8_encoder_is_the_same_for_the_host_and_the_core(models) -> None:
    """The repacked file beside all of it in fp16: the plain VAELoader, and the core's diffusers module."""
    wide = {key: value.half() if key.startswith("taesd") else value for key, value in load_file(VAE_FILE).items()}
    save_file(wide, models / "vae" / "wide.safetensors")
    save_autoencoder(load_decoder(VAE_FILE), models / "vae" / "packed.safetensors")
    pixels = torch.from_numpy(render(sample_scene(np.random.default_rng(0)), 96, 64))[None]
    results = []
    for name in ("wide", "packed"):
        vae = host_nodes.VAELoader().load_vae(f"{name}.safetensors")[0]
        core = host.pack_module("pixart.vae").load_vae(models / "vae" / f"{name}.safetensors", 0.13025)
        latents = vae.encode(pixels)
        results.append((latents, vae.decode(latents), core.encode(pixels.movedim(-1, 1)), core.decode(latents * 0.13025)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    decoded = results[0][1]
    assert pixels.std() > 0.05 and (decoded - pixels).abs().mean() < 0.05
