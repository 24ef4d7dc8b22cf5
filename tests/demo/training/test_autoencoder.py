"""The demo's autoencoder: an exact encoder, a decoder that reconstructs, and its file."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.data.scenes import render, sample_scene
from demo.training import autoencoder
from demo.training.autoencoder import (
    LATENT_BIAS,
    LATENT_MATRIX,
    VAE_FILE,
    VAE_SCALE,
    build_decoder,
    build_encoder,
    encode,
    latents_from_rgb,
    load_decoder,
    main,
    measure_psnr,
    sample_crops,
    save_autoencoder,
    train,
)


def _grids(count: int, seed: int) -> list[np.ndarray]:
    """Mean colours of 8x8 blocks, (rows, columns, 3), of scenes."""
    rng = np.random.default_rng(seed)
    sizes = ((256, 256), (304, 208), (176, 352))
    pictures = [render(sample_scene(rng), *sizes[i % 3]) for i in range(count)]
    return [picture.reshape(len(picture) // 8, 8, -1, 8, 3).mean((1, 3)) for picture in pictures]


def test_encoder_is_the_affine_map_of_exact_block_means() -> None:
    pictures = torch.rand(2, 3, 48, 80)
    means = pictures.reshape(2, 3, 6, 8, 10, 8).mean((3, 5)).double()
    matrix, bias = torch.tensor(LATENT_MATRIX, dtype=torch.float64), torch.tensor(LATENT_BIAS, dtype=torch.float64)
    expected = torch.einsum("ij,bjhw->bihw", matrix, means) + bias[:, None, None]
    with torch.no_grad():
        assert (build_encoder()(pictures) - expected).abs().max() < 1e-5
    assert (encode(pictures) - expected).abs().max() < 1e-5


def test_latents_have_unit_statistics_on_scenes() -> None:
    values = np.concatenate([latents_from_rgb(grid).reshape(-1, 4) for grid in _grids(1500, 0)])
    assert np.abs(values.mean(0)).max() < 0.1
    assert values.std(0) == pytest.approx(np.ones(4), abs=0.07)
    assert np.abs(values).max() < 2.7


def test_numpy_and_torch_agree_and_invert() -> None:
    grid = _grids(1, 1)[0]
    latents = latents_from_rgb(grid)
    assert latents.dtype == np.float32
    assert np.abs(latents_from_rgb(torch.from_numpy(grid)).numpy() - latents).max() < 1e-6
    back = (latents - np.array(LATENT_BIAS)) @ np.linalg.pinv(np.array(LATENT_MATRIX)).T
    assert np.abs(back - grid).max() < 1e-5


def test_saved_file_has_the_taesd_layout(tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    decoder = build_decoder()
    save_autoencoder(decoder, file)
    tensors = load_file(file)
    assert tensors["vae_scale"].dtype == torch.float32
    assert float(tensors["vae_scale"]) == pytest.approx(VAE_SCALE) and float(tensors["vae_shift"]) == 0
    assert tensors["taesd_encoder.0.weight"].shape == (64, 3, 3, 3)
    assert tensors["taesd_encoder.14.weight"].shape == (4, 64, 3, 3)
    assert tensors["taesd_decoder.1.weight"].shape == (64, 4, 3, 3)
    assert tensors["taesd_decoder.19.weight"].shape == (3, 64, 3, 3)
    assert {v.dtype for k, v in tensors.items() if k.startswith(("taesd_decoder", "taesd_encoder.14"))} == {torch.float16}
    assert tensors["taesd_encoder.3.conv.0.weight"].dtype == torch.float8_e4m3fn
    latents = torch.randn(1, 4, 4, 6)
    with torch.no_grad():
        assert (load_decoder(file)(latents) - decoder(latents)).abs().max() < 0.01


def test_the_encoders_fp8_is_exact(tmp_path: Path) -> None:
    save_autoencoder(build_decoder(), tmp_path / "vae.safetensors")
    stored = load_file(tmp_path / "vae.safetensors")
    for key, value in build_encoder().state_dict().items():
        assert torch.equal(stored[f"taesd_encoder.{key}"].half(), value.half()), key


def test_repacking_keeps_every_number_and_saves_a_quarter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A file as it was written before, all of it fp16."""
    monkeypatch.setattr(autoencoder, "measure_psnr", partial(measure_psnr, count=2))
    file, before = tmp_path / "vae.safetensors", {key: v.half() for key, v in load_file(VAE_FILE).items() if key.startswith("taesd")}
    save_file(before | {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(0.0)}, file)
    size = file.stat().st_size
    main(["--repack", "--out", str(file)])
    after = load_file(file)
    assert file.stat().st_size < 0.76 * size
    assert set(after) == {*before, "vae_scale", "vae_shift"}
    assert all(torch.equal(after[key].half(), value) for key, value in before.items())
    assert "dB" in "".join(capsys.readouterr())


def test_crops_are_pictures_and_reproducible() -> None:
    first, second = (sample_crops(np.random.default_rng(2), 12, 64) for _ in range(2))
    assert first.shape == (12, 3, 64, 64) and torch.equal(first, second)
    assert first.min() >= 0 and first.max() <= 1
    assert (first.flatten(1).std(1) > 0.01).float().mean() > 0.7  # most show an edge


def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.training.autoencoder.RESULTS", tmp_path)
    out, state = tmp_path / "vae.safetensors", tmp_path / "state.pt"
    train(2, out, state, batch=1)
    assert torch.load(state, weights_only=True)["step"] == 2
    train(3, out, state, batch=1)
    assert [step for step, _ in torch.load(state, weights_only=True)["curve"]] == [2, 3]


def test_committed_decoder_reconstructs_heldout_scenes() -> None:
    assert VAE_FILE.stat().st_size < 5e6
    assert measure_psnr(load_decoder(), count=3) > 30


@pytest.mark.parametrize("size", [(80, 48), (32, 128)])
def test_committed_file_agrees_with_diffusers_layers(size: tuple[int, int]) -> None:
    tiny = pytest.importorskip("diffusers").AutoencoderTiny()
    tensors = load_file(VAE_FILE)
    state = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part == "taesd_encoder":
            state[f"encoder.layers.{rest}"] = value.float()
        elif part == "taesd_decoder":  # diffusers clamps outside of its layers, so they count from one less
            number, _, name = rest.partition(".")
            state[f"decoder.layers.{int(number) - 1}.{name}"] = value.float()
    tiny.load_state_dict(state)
    picture = torch.rand(1, 3, size[1], size[0])
    with torch.no_grad():
        latents = tiny.encode(picture * 2 - 1).latents
        assert (latents - encode(picture)).abs().max() < 2e-3  # the matrix is stored in fp16
        decoded = tiny.decode(latents).sample / 2 + 0.5
        assert (decoded - load_decoder()(latents)).abs().max() < 1e-5
