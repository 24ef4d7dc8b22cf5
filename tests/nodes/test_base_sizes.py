"""Image to image and inpainting at every base size, with the host's KSampler and a model of one block."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import host
from tests.support.host_models import captions, difference, load_model, noise, sample, write_model

Resolution = host.pack_module("nodes.resolution").PixArtResolution
compress = host.pack_module("nodes.kv_compress").PixArtKVCompress.execute
BASES = host.pack_module("pixart.bins").base_sizes()
SCALE = 0.13025


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Sigma with one block of one head."""
    return write_model(tmp_path_factory.mktemp("model"), hidden=72, depth=1)


@pytest.fixture
def model(file: Path, base: int):
    """Above 1024 with KV compression: 1/64 of the keys is what a CPU attends to in seconds."""
    exact = load_model(file)
    return exact if base <= 1024 else compress(exact, 8, "mean", 0, -1, 0.0, 1.0, 0).result[0]


def encoded(base: int) -> torch.Tensor:
    """A picture's latent as a VAE gives it, in the bin of that base nearest to 3:2."""
    empty = Resolution.execute(str(base), 3 * base // 2, base, 1).result[0]["samples"]
    return noise(*empty.shape[-2:], seed=5) / SCALE


@pytest.mark.parametrize("base", BASES)
def test_inpainting_draws_the_mask_and_nothing_else(model, base: int) -> None:
    latent = encoded(base)
    height, width = latent.shape[-2:]
    inside = torch.zeros(latent.shape, dtype=torch.bool)
    inside[..., height // 4 : height // 2, width // 3 :] = True
    mask = inside[:, 0].float().repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = sample(model, captions(5), captions(2, seed=1), latent, steps=1, cfg=1.0, mask=mask)
    assert found.shape == latent.shape
    torch.testing.assert_close(found[~inside], latent[~inside], rtol=1e-3, atol=2e-3)
    assert difference(found[inside], latent[inside]) > 0.5


@pytest.mark.parametrize("base", BASES)
def test_image_to_image_keeps_size_and_a_part_of_the_picture(model, base: int) -> None:
    latent = encoded(base)
    found = sample(model, captions(5), captions(2, seed=1), latent, steps=2, cfg=1.0, denoise=0.5)
    assert found.shape == latent.shape and torch.isfinite(found).all()
    alike = torch.corrcoef(torch.stack([found.flatten(), latent.flatten()]))[0, 1]
    assert 0.2 < alike < 0.9
