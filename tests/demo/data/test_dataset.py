"""Training batches of scenes: latents as the autoencoder makes them, captions through the demo's T5."""

from pathlib import Path

import numpy as np
import pytest
import torch

from demo import WEIGHTS
from demo.data.dataset import SceneSource, latent_grid
from demo.data.layout import FEATURE_COUNT, arrange
from demo.data.scenes import render, sample_scene
from demo.training.autoencoder import encode
from pixart.errors import ConfigError
from pixart.training.batch import drop_captions
from pixart.training.draws import Draws
from pixart.training.recipe import Stage, load_recipe
from pixart.training.sources.scenes import Settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("width, height", [(256, 256), (208, 304)])
def test_latents_are_the_encoders_but_for_soft_edges(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        scene = arrange(sample_scene(rng), width, height)
        picture = torch.from_numpy(render(scene, width, height)).permute(2, 0, 1)[None]
        exact, drawn = encode(picture)[0].permute(1, 2, 0).numpy(), latent_grid(scene, height, width)
        assert drawn.shape == (height // 8, width // 8, 4)
        assert np.linalg.norm(drawn - exact) < 0.02 * np.linalg.norm(exact)


RECIPE = load_recipe(ROOT / "configs/train/demo-continued.json")


def source_of(**changes: object) -> tuple[SceneSource, Settings]:
    settings = Settings(str(WEIGHTS["text_encoders"]), **changes)
    return SceneSource(settings, RECIPE), settings


def stage(pixels: int, count: int) -> Stage:
    return Stage(pixels, steps=1, batch_size=count, learning_rate=1e-3)


def test_batch_has_the_shapes_that_training_expects() -> None:
    source, settings = source_of()
    for number in range(4):
        batch = source.batch(settings, stage(256, 3), Draws(0, 0, number, range(3)))
        height, width = (int(side) for side in batch.size[0])
        assert batch.latent.shape == (3, 4, height // 8, width // 8)
        assert batch.features.shape == (3, height * width // 256, FEATURE_COUNT) and source.feature_count == FEATURE_COUNT
        assert batch.context.shape[:2] == batch.mask.shape and batch.mask.any(1).all()
        assert batch.weight.tolist() == [1, 1, 1] and batch.total == 3


def test_a_batch_depends_on_its_draws_alone_and_can_be_shared() -> None:
    """Two processes draw the halves of what one would draw."""
    source, settings = source_of(hints=True)
    whole = source.batch(settings, stage(128, 4), Draws(5, 1, 7, range(4)))
    again = source.batch(settings, stage(128, 4), Draws(5, 1, 7, range(4)))
    assert torch.equal(again.latent, whole.latent) and torch.equal(again.context, whole.context) and torch.equal(again.hint, whole.hint)
    halves = [source.batch(settings, stage(128, 4), Draws(5, 1, 7, rows)) for rows in (range(2), range(2, 4))]
    assert torch.equal(torch.cat([half.latent for half in halves]), whole.latent)
    assert torch.equal(torch.cat([half.hint for half in halves]), whole.hint)
    other = source.batch(settings, stage(128, 4), Draws(5, 1, 8, range(4)))
    assert other.latent.shape != whole.latent.shape or not torch.equal(other.latent, whole.latent)


@pytest.mark.parametrize("keep_mask", [False, True])
def test_dropped_captions_are_the_empty_prompt(keep_mask: bool) -> None:
    source, settings = source_of()
    batch = source.batch(settings, stage(128, 3), Draws(1, 0, 0, range(3)))
    null = torch.randn(300, 128) if keep_mask else source.null_context
    dropped = drop_captions(batch, null, 1.0, keep_mask, Draws(1, 0, 0, range(3)))
    if keep_mask:  # as the reference's trainers: its own rows under the caption's mask
        assert torch.equal(dropped.mask, batch.mask)
        torch.testing.assert_close(dropped.context, null[: batch.mask.shape[1]].expand(3, -1, -1))
    else:
        empty = source.encoder.encode([""])
        assert dropped.mask.sum() == 3 and dropped.mask[:, 0].all()
        torch.testing.assert_close(dropped.context[:, :1], empty.states.float().expand(3, -1, -1))
    kept = drop_captions(batch, null, 0.0, keep_mask, Draws(1, 0, 0, range(3)))
    assert torch.equal(kept.context, batch.context)


def test_too_few_rows_for_a_captions_mask_are_refused() -> None:
    source, settings = source_of()
    batch = source.batch(settings, stage(128, 3), Draws(1, 0, 0, range(3)))
    with pytest.raises(ConfigError, match="null caption has 1 rows"):
        drop_captions(batch, source.null_context, 1.0, True, Draws(1, 0, 0, range(3)))


def test_hints_are_the_outlines_of_the_pictures() -> None:
    source, settings = source_of(hints=True)
    batch = source.batch(settings, stage(256, 4), Draws(2, 0, 0, range(4)))
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


def test_what_else_a_source_is_asked_for() -> None:
    source, settings = source_of(validation=3)
    source.prepare(["a red circle"], None)
    states, mask = source.encode(["a red circle", ""])
    assert mask.sum(1).tolist()[1] == 1
    torch.testing.assert_close(states[1, :1], source.null_context, atol=1e-3, rtol=0)  # fp16 rounds otherwise beside a longer caption
    batches = source.validation(settings, stage(128, 4), range(8))
    assert len(batches) == 3 and len({batch.captions for batch in batches}) == 3
    assert [batch.total for batch in batches] == [1, 1, 1]
    [second] = source.validation(settings, stage(128, 4), range(1, 2))
    assert torch.equal(second.latent, batches[1].latent) and second.captions == batches[1].captions
    assert source.validation(settings, stage(128, 4), range(3, 9)) == []
    picture = source.decode(batches[0].latent[:1])[0]
    assert picture.size == (batches[0].latent.shape[3] * 8, batches[0].latent.shape[2] * 8)
    assert len(source.report()) == 1 and source.contents() == []


def test_a_dropped_caption_is_an_empty_text() -> None:
    source, settings = source_of()
    batch = source.batch(settings, stage(128, 8), Draws(1, 0, 0, range(8)))
    draws = Draws(1, 0, 0, range(8))
    dropped = drop_captions(batch, source.null_context, 0.5, False, draws)
    gone = draws.uniform("caption dropout") < 0.5
    assert 0 < gone.sum() < 8 and all(batch.captions)
    assert [text == "" for text in dropped.captions] == gone.tolist() == (dropped.mask.sum(1) == 1).tolist()
