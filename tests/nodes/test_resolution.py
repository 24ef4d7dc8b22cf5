"""Sizes: bins, empty latents, and the crop back."""
from __future__ import annotations

import json

import pytest
import torch

import nodes as host_nodes
from tests.support import host

errors = host.pack_module("pixart.errors")
resolution = host.pack_module("nodes.resolution")
TABLE = json.loads((host.PACK_ROOT / "configs" / "aspect_ratio_bins.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("base", ["256", "512", "1024", "2048", "2880", "4096"])
def test_latent_has_the_size_of_a_bin(base: str) -> None:
    latent, width, height = resolution.PixArtResolution.execute(base=base, width=1600, height=900, batch_size=3).result
    assert latent["samples"].shape == (3, 4, height // 8, width // 8) and not latent["samples"].any()
    factor = 2 if base == "4096" else 1
    published = {(h * factor, w * factor) for h, w in TABLE["2048" if base == "4096" else base].values()}
    assert (height, width) in published and width > height


def test_width_comes_before_height() -> None:
    """A known bin: 16:9 at 1024 is 1344 wide and 768 high."""
    assert resolution.PixArtResolution.execute(base="1024", width=1344, height=768, batch_size=1).result[1:] == (1344, 768)


def test_latent_is_the_hosts() -> None:
    theirs = host_nodes.EmptyLatentImage().generate(512, 768, 2)[0]["samples"]
    ours = resolution.PixArtResolution.execute(base="512", width=512, height=512, batch_size=2).result[0]["samples"]
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)


@pytest.mark.parametrize(("width", "height"), [(0, 512), (512, -3), (17, 20000)])
def test_impossible_sizes_are_refused(width: int, height: int) -> None:
    with pytest.raises(errors.InputError, match="expected"):
        resolution.PixArtResolution.execute(base="512", width=width, height=height, batch_size=1)


@pytest.mark.parametrize(("width", "height"), [(17, 33), (1, 1), (9000, 30)])
def test_unusual_sizes_work(width: int, height: int) -> None:
    latent = resolution.PixArtResolution.execute(base="256", width=width, height=height, batch_size=1).result[0]
    assert min(latent["samples"].shape) > 0


def test_crop_is_the_reference_pipelines() -> None:
    from diffusers.image_processor import PixArtImageProcessor

    image = torch.rand(2, 768, 1344, 3, generator=torch.Generator().manual_seed(0))
    out = resolution.PixArtCropToSize.execute(image=image, width=1600, height=900).result[0]
    expected = PixArtImageProcessor.resize_and_crop_tensor(image.movedim(-1, 1), 1600, 900).movedim(1, -1)
    assert out.shape == (2, 900, 1600, 3)
    torch.testing.assert_close(out, expected)


def test_crop_to_its_own_size_changes_nothing() -> None:
    image = torch.rand(1, 40, 24, 3)
    assert torch.equal(resolution.PixArtCropToSize.execute(image=image, width=24, height=40).result[0], image)


def test_size_condition_keeps_the_original() -> None:
    conditioning = [[torch.zeros(1, 2, 8), {"pooled_output": None}]]
    out = resolution.PixArtSizeCondition.execute(conditioning=conditioning, width=640, height=480).result[0]
    assert out[0][1] == {"pooled_output": None, "width": 640, "height": 480} and out[0][0] is conditioning[0][0]
    assert conditioning[0][1] == {"pooled_output": None}
