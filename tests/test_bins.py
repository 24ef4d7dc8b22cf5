"""Bins against diffusers' tables and functions."""
import pytest
import torch

from pixart.bins import base_sizes, bin_table, nearest_bin, resize_and_crop
from pixart.errors import InputError

SIZES = [(1024, 1024), (1, 1), (17, 33), (1920, 1080), (1080, 1920), (4000, 300), (300, 4000), (512, 700), (640, 480)]


def test_every_base_has_forty_bins_and_4096_doubles_2048():
    assert base_sizes() == (256, 512, 1024, 2048, 2880, 4096)
    for base in base_sizes():
        assert len(bin_table(base)) == 40
        assert all(side % 16 == 0 for size in bin_table(base).values() for side in size)
    assert bin_table(4096) == {key: (2 * h, 2 * w) for key, (h, w) in bin_table(2048).items()}


@pytest.mark.parametrize("base", [256, 512, 1024, 2048])
def test_diffusers_tables_are_subsets_and_its_classifier_agrees(base, monkeypatch):
    pipelines = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
    alpha = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    processor = pytest.importorskip("diffusers.image_processor").PixArtImageProcessor
    theirs = getattr(pipelines, f"ASPECT_RATIO_{base}_BIN", None) or getattr(alpha, f"ASPECT_RATIO_{base}_BIN")
    ours = {float(key): size for key, size in bin_table(base).items()}
    for key, size in theirs.items():
        assert ours[float(key)] == tuple(map(int, size))

    for width, height in SIZES:
        expected = processor.classify_height_width_bin(height, width, ratios=bin_table(base))
        found = nearest_bin(base, width, height)
        assert (found.height, found.width) == expected
    monkeypatch.setattr("pixart.bins.bin_table", lambda base: theirs)
    for width in range(200, 2000, 37):
        expected = processor.classify_height_width_bin(1000, width, ratios=theirs)
        assert nearest_bin(base, width, 1000)[:2] == expected


@pytest.mark.parametrize("base", [256, 512, 1024, 2048, 2880, 4096])
def test_a_bin_is_nearest_to_itself(base):
    for height, width in bin_table(base).values():
        found = nearest_bin(base, width, height)
        # rounded labels: two neighbours may share a distance, but never by more than the rounding
        assert abs(found.ratio - height / width) < 0.011
        assert found.ratio == found.height / found.width


@pytest.mark.parametrize("size", [(0, 512), (512, 0), (-8, 512), (512, 10**6), (512.5, 512), ("512", 512), (None, 5)])
def test_impossible_sizes_are_refused_with_the_allowed_range(size):
    with pytest.raises(InputError, match="16384"):
        nearest_bin(512, *size)


def test_unknown_base_names_the_known_ones():
    with pytest.raises(InputError, match="256, 512, 1024, 2048, 2880, 4096"):
        nearest_bin(768, 512, 512)


@pytest.mark.parametrize("source", [(32, 48), (64, 40), (7, 9)])
@pytest.mark.parametrize("wanted", [(32, 48), (17, 33), (100, 3), (64, 64), (1, 1)])
def test_resize_and_crop_equals_diffusers(source, wanted):
    processor = pytest.importorskip("diffusers.image_processor").PixArtImageProcessor
    images = torch.rand(2, 3, *source, generator=torch.manual_seed(0))
    width, height = wanted
    found = resize_and_crop(images, width, height)
    assert found.shape == (2, 3, height, width)
    expected = processor.resize_and_crop_tensor(images, width, height)
    if expected.shape == found.shape:  # diffusers loses a pixel to rounding for some sizes
        torch.testing.assert_close(found, expected)


def test_resize_and_crop_always_reaches_the_wanted_size():
    for old in range(16, 400, 23):
        for new in range(1, 300, 31):
            assert resize_and_crop(torch.zeros(1, 1, old, 64), 64 + old % 3, new).shape[-2:] == (new, 64 + old % 3)
