"""Training batches of scenes: latents as the autoencoder makes them, captions through the demo's T5."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from demo import WEIGHTS
from demo.autoencoder import encode
from demo.dataset import SceneSource, latent_grid
from demo.layout import FEATURE_COUNT, arrange
from demo.scenes import render, sample_scene


@pytest.mark.parametrize("width, height", [(256, 256), (208, 304)])
def test_latents_are_the_encoders_but_for_soft_edges(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        scene = arrange(sample_scene(rng), width, height)
        picture = torch.from_numpy(render(scene, width, height)).permute(2, 0, 1)[None]
        exact, drawn = encode(picture)[0].permute(1, 2, 0).numpy(), latent_grid(scene, height, width)
        assert drawn.shape == (height // 8, width // 8, 4)
        assert np.linalg.norm(drawn - exact) < 0.02 * np.linalg.norm(exact)


def test_batch_has_the_shapes_that_training_expects() -> None:
    source = SceneSource(SimpleNamespace(text_encoder=str(WEIGHTS["text_encoders"]), caption_dropout=0.0, control_blocks=0))
    batch = source.batch((304, 208), 3, np.random.default_rng(0))
    assert batch.latent.shape == (3, 4, 38, 26) and batch.features.shape == (3, 19 * 13, FEATURE_COUNT)
    assert source.feature_count == FEATURE_COUNT
    assert batch.context.shape[:2] == batch.mask.shape and batch.mask.any(1).all()
    assert batch.size.tolist() == [[304, 208]] * 3
    again = source.batch((304, 208), 3, np.random.default_rng(0))
    assert torch.equal(again.latent, batch.latent) and torch.equal(again.context, batch.context)


def test_dropped_captions_are_the_empty_prompt() -> None:
    source = SceneSource(SimpleNamespace(text_encoder=str(WEIGHTS["text_encoders"]), caption_dropout=1.0, control_blocks=0))
    batch = source.batch((128, 128), 2, np.random.default_rng(1))
    empty = source.encoder.encode([""])
    assert torch.equal(batch.mask, empty.mask.expand(2, -1))
    torch.testing.assert_close(batch.context, empty.states.float().expand(2, -1, -1))


def test_hints_are_the_outlines_of_the_pictures() -> None:
    source = SceneSource(SimpleNamespace(text_encoder=str(WEIGHTS["text_encoders"]), caption_dropout=0.0, control_blocks=3))
    batch = source.batch((256, 256), 4, np.random.default_rng(2))
    assert batch.hint.shape == batch.latent.shape
    for latent, hint in zip(batch.latent, batch.hint):
        dark = hint[:, 0, 0]  # no outline in the corner
        outline = (hint - dark[:, None, None]).abs().amax(0) > 0.05
        change = torch.zeros_like(outline)
        change[:, 1:] |= (latent[:, :, 1:] - latent[:, :, :-1]).abs().amax(0) > 0.5
        change[1:] |= (latent[:, 1:] - latent[:, :-1]).abs().amax(0) > 0.5
        assert 0 < outline.sum() < outline.numel() / 2
        near = torch.nn.functional.max_pool2d(outline[None].float(), 3, 1, 1)[0].bool()
        assert (change & ~near).sum() == 0  # colours change nowhere but along the outline
