"""Lists of timesteps, and the start of one-step models."""
import pytest
import torch

from pixart.errors import InputError
from pixart.timesteps import parse_timesteps, seems_few_step, unit_variance_start


@pytest.mark.parametrize("text", ["999, 759, 499, 259", "999 759\n499;259", " 999,759,499,259, "])
def test_lists_as_people_write_them(text):
    assert parse_timesteps(text) == [999, 759, 499, 259]


@pytest.mark.parametrize(
    "text, message",
    [("", "found none"), ("999, x", "'x'"), ("1000", "'1000'"), ("-1", "'-1'"), ("4.5", "'4.5'"), ("500, 500", "500 after 500"),
     ("10, 999", "999 after 10")],
)  # fmt: skip
def test_lists_that_can_not_be(text, message):
    with pytest.raises(InputError, match=message):
        parse_timesteps(text)


def test_the_model_sees_unit_variance():
    noise, sigma = torch.randn(4, 4, 32, 32), 2.041
    seen = unit_variance_start(noise, sigma) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(seen, noise)


@pytest.mark.parametrize(
    "name, few",
    [("PixArt-Alpha-DMD-XL-2-512x512", True), ("PixArt-LCM-XL-2-1024-MS", True), ("flash-pixart.safetensors", True),
     ("pixart_4-step.safetensors", True), ("one_step.pth", True), ("PixArt-XL-2-512x512.pth", False),
     ("PixArt-Sigma-XL-2-1024-MS.pth", False), ("900M-step2000000.safetensors", False)],
)  # fmt: skip
def test_names_that_say_few_steps(name, few):
    assert seems_few_step(name) is few
