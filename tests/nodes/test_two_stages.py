"""Two models in a row: 900M's stages, and second passes, through the host's own samplers."""
from __future__ import annotations

import pytest
import torch

import nodes as host_nodes
from tests.support import host_models
from tests.support.host_models import captions, difference, noise, sample

STEPS, SPLIT = 20, 12  # as in the workflow 900m-two-stage


@pytest.fixture(scope="module")
def second_file(tmp_path_factory):
    """Another tiny Sigma."""
    from safetensors.torch import load_file, save_file

    path = host_models.write_model(tmp_path_factory.mktemp("second"), depth=3)
    save_file({key: value * 0.9 for key, value in load_file(path).items()}, path)
    return path


def part(model, latent, start, end, *, first, sampler="euler"):
    """The host's KSamplerAdvanced."""
    return host_nodes.common_ksampler(
        model, 1, STEPS, 4.5, sampler, "sgm_uniform", captions(5), captions(2, seed=1), {"samples": latent},
        disable_noise=not first, start_step=start, last_step=end, force_full_denoise=not first,
    )[0]["samples"]  # fmt: skip


def timesteps_of(model, monkeypatch):
    """Timestep of each forward."""
    seen = []
    network = model.model.diffusion_model
    original = network._denoise

    def look(x, timesteps, *rest):
        seen.append(int(timesteps[0]))
        return original(x, timesteps, *rest)

    monkeypatch.setattr(network, "_denoise", look)
    return seen


def test_stage_1_runs_down_to_400_and_stage_2_from_there(sigma, second_file, monkeypatch) -> None:
    second = host_models.load_model(second_file)
    early, late = timesteps_of(sigma, monkeypatch), timesteps_of(second, monkeypatch)
    noisy = part(sigma, torch.zeros(1, 4, 8, 8), 0, SPLIT, first=True)
    part(second, noisy, SPLIT, 10000, first=False)
    assert len(early) == SPLIT and len(late) == STEPS - SPLIT
    assert early[0] == 999 and min(early) > 400 >= max(late) == 400


def test_one_model_in_two_parts_is_the_same_as_in_one(sigma) -> None:
    """Euler has no memory, so the hand-over must lose nothing."""
    noisy = part(sigma, torch.zeros(1, 4, 8, 8), 0, SPLIT, first=True)
    whole = part(sigma, torch.zeros(1, 4, 8, 8), 0, 10000, first=True)
    assert difference(part(sigma, noisy, SPLIT, 10000, first=False), whole) < 1e-4


def test_depth_42_loads_and_samples(tmp_path) -> None:
    """The depth of 900M is the file's own in each part of the host that counts blocks."""
    model = host_models.load_model(host_models.write_model(tmp_path, depth=42, hidden=72))
    assert model.model.detection.variant == "sigma-900m" and model.model.model_config.unet_config["depth"] == 42
    assert torch.isfinite(sample(model, captions(3), captions(1), steps=1)).all()


def test_a_latent_passes_to_an_sdxl_model_unscaled(sigma) -> None:
    """Sigma hands out its latents in the scale of the SDXL VAE, which is what the refiner takes in."""
    import comfy.latent_formats

    latent = noise()
    assert torch.equal(sigma.model.process_latent_out(latent), comfy.latent_formats.SDXL().process_out(latent))


def test_a_second_pass_at_a_larger_size(sigma) -> None:
    """Upscaled latents drawn anew from a part of the noise, as tiled upscale workflows do it."""
    first = sample(sigma, captions(4), captions(1, seed=1), steps=4)
    larger = torch.nn.functional.interpolate(first, scale_factor=1.5, mode="nearest-exact")
    second = sample(sigma, captions(4), captions(1, seed=1), larger, steps=4, denoise=0.4)
    assert second.shape == (1, 4, 12, 12) and torch.isfinite(second).all()
    assert 0 < difference(second, larger)
