"""The size that alpha-1024 is told, and warnings about sizes that no model was trained at."""
from __future__ import annotations

import logging

import pytest
import torch

from tests.support import host, host_models
from tests.support.host_models import captions, sample


class TestSizeCondition:
    """alpha-1024 is told the size in pixels; the others are not."""

    def sizes(self, model, monkeypatch, positive, latent=None):
        seen = []
        network = model.model.diffusion_model
        original = network._denoise

        def look(x, timesteps, context, context_mask, size, *rest):
            seen.append(size)
            return original(x, timesteps, context, context_mask, size, *rest)

        monkeypatch.setattr(network, "_denoise", look)
        sample(model, positive, captions(1, seed=1), latent, steps=1)
        return seen[0]

    def test_default_is_the_latent(self, alpha_1024_file, monkeypatch) -> None:
        model = host_models.load_model(alpha_1024_file)
        size = self.sizes(model, monkeypatch, captions(4), torch.zeros(1, 4, 9, 16))
        assert size.tolist() == [[72, 128]] * 2

    def test_node_and_host_node_set_it(self, alpha_1024_file, monkeypatch) -> None:
        model = host_models.load_model(alpha_1024_file)
        node = host.pack_module("nodes.resolution").PixArtSizeCondition
        conditioning = captions(4)
        told = node.execute(conditioning, width=1368, height=1000).result[0]
        assert conditioning[0][1] == {}  # a copy was changed
        sizes = self.sizes(model, monkeypatch, told)
        assert sizes.tolist() in ([[1000, 1368], [64, 64]], [[64, 64], [1000, 1368]])
        assert not sizes.is_floating_point()  # the host casts floats to the model's dtype, and bf16 rounds 1368

    def test_it_changes_the_picture(self, alpha_1024_file) -> None:
        model = host_models.load_model(alpha_1024_file)
        node = host.pack_module("nodes.resolution").PixArtSizeCondition
        told = node.execute(captions(4), width=2048, height=512).result[0]
        assert (sample(model, told, captions(1)) - sample(model, captions(4), captions(1))).abs().max() > 1e-3

    def test_other_models_say_that_they_ignore_it(self, sigma, caplog) -> None:
        node = host.pack_module("nodes.resolution").PixArtSizeCondition
        told = node.execute(captions(4), width=2048, height=512).result[0]
        with caplog.at_level(logging.WARNING):
            out = sample(sigma, told, captions(1), steps=1)
            sample(sigma, told, captions(1), steps=1)
        assert sum("no size conditioning" in message for message in caplog.messages) == 1
        torch.testing.assert_close(out, sample(sigma, captions(4), captions(1), steps=1))


def test_sizes_far_from_the_bins_warn_once(alpha_1024_file, caplog) -> None:
    model = host_models.load_model(alpha_1024_file)
    with caplog.at_level(logging.WARNING):
        sample(model, captions(4), captions(1), steps=1)
        sample(model, captions(4), captions(1), steps=1)
        near = [message for message in caplog.messages if "far from the sizes" in message]
    assert len(near) == 1 and "1024x1024" in near[0] and "PixArtResolution" in near[0]


@pytest.mark.parametrize(
    ("width", "height", "nearest"),
    [(64, 64, "256x256"), (4096, 4096, "2048x2048"), (4096, 256, "2048x512"), (256, 256, None), (640, 384, None), (2048, 2048, None)],
)
def test_sizes_of_a_model_of_unknown_base(sigma, caplog, width: int, height: int, nearest: str | None) -> None:
    """Far from the bins of every Sigma there is; near one of them it may be right."""
    assert sigma.model.detection.base_size is None
    with caplog.at_level(logging.WARNING):
        sigma.model._check_size(width, height)
    found = [message for message in caplog.messages if "far from the sizes" in message]
    assert len(found) == (nearest is not None)
    if nearest:
        assert "any PixArt of family sigma" in found[0] and "bases 256, 512, 1024, 2048" in found[0]
        assert nearest in found[0] and "this model was trained at" not in found[0]


def test_host_node_for_alpha_conditioning_is_understood(alpha_1024_file, monkeypatch) -> None:
    """CLIPTextEncodePixArtAlpha sets the same two values."""
    model = host_models.load_model(alpha_1024_file)
    conditioning = [[captions(4)[0][0], {"width": 768, "height": 1344, "pooled_output": None}]]
    assert TestSizeCondition().sizes(model, monkeypatch, conditioning).tolist()[0] in ([1344, 768], [64, 64])
