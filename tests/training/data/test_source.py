"""Batches of pictures: pure functions of their draws, shared by processes, with every picture, its captions and its size."""
from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pixart.errors import ConfigError
from pixart.text.encoder import load_text_encoder
from pixart.training.draws import Draws
from pixart.vae import load_vae
from tests.support.data_sets import batches, folder, picture, prepared
from tests.support.tiny_vae import tiny_kl

SIZES = [(64, 64), (128, 64), (64, 128), (96, 64), (64, 96)]  # five bins


def test_five_pictures_in_five_bins_train(tmp_path, recipe_of):
    folder(tmp_path / "data", SIZES)
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe))
    seen = batches(source, recipe, 5)
    assert sorted(caption for batch in seen for caption in set(batch.captions)) == [f"a red circle {number}" for number in range(5)]
    assert [batch.total for batch in seen] == [1] * 5 and all(batch.weight.tolist() == [0.25] * 4 for batch in seen)
    assert len({batch.latent.shape for batch in seen}) == 5


def test_latents_and_states_are_the_encoders(tmp_path, recipe_of):
    """A square picture of the bin's size goes through unchanged; the states have no padding but the batch's own."""
    folder(tmp_path / "data", [(64, 64)], caption="A Red  circle")
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe), "A blue circle")
    batch = batches(source, recipe, 1)[0]
    vae = load_vae(recipe.source.settings.vae, 0.13025)
    pixels = torch.tensor(list(picture(64, 64, 0).tobytes())).reshape(1, 64, 64, 3).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(batch.latent[:1], vae.encode(pixels), atol=2e-3, rtol=2e-3)  # kept in fp16
    encoder = load_text_encoder(recipe.source.settings.text_encoder)
    expected = encoder.encode(["a red  circle 0"]).states.float()
    torch.testing.assert_close(batch.context[:1], expected, atol=2e-3, rtol=2e-3)
    states, mask = source.encode(["A BLUE circle", ""])
    torch.testing.assert_close(states[:1], encoder.encode(["a blue circle"]).states.float(), atol=2e-3, rtol=2e-3)
    assert mask.sum(1).tolist() == [states.shape[1], 1]
    torch.testing.assert_close(source.null_context, encoder.encode([""]).states[0].float(), atol=2e-3, rtol=2e-3)
    with pytest.raises(ConfigError, match="'a green circle' has no T5 states"):
        source.encode(["a green circle"])


def test_pictures_of_the_prior_are_marked_and_weighed(tmp_path, recipe_of):
    """Also where their names are those of other pictures."""
    folder(tmp_path / "data", [(64, 64)] * 3)
    folder(tmp_path / "kept", [(64, 64)] * 5, caption="a blue square")
    (tmp_path / "kept/broken.png").write_bytes(b"no picture")
    recipe = recipe_of(prior_data=str(tmp_path / "kept"), prior_weight=0.5, allow_broken=True)
    source = prepared(recipe.source.make(recipe))
    assert source.report()[0] == "data: folder of pictures, and 6 of the prior: folder of pictures, 8 pictures"
    assert any("prior/broken.png" in line for line in source.report())
    seen = batches(source, recipe, 2)  # an epoch
    told = Counter(caption for batch in seen for caption in batch.captions)
    assert told == {**{f"a red circle {n}": 1 for n in range(3)}, **{f"a blue square {n}": 1 for n in range(5)}}
    for batch in seen:
        assert batch.prior.tolist() == ["blue" in caption for caption in batch.captions]
        assert batch.weight.tolist() == [0.5 if kept else 1.0 for kept in batch.prior] and batch.total == 4
    without = recipe_of()
    alone = prepared(without.source.make(without))
    assert batches(alone, without, 1)[0].prior is None and set(alone.contents()) < set(source.contents())


@pytest.mark.parametrize("inside", ["", "kept", ".."])
def test_pictures_that_are_both_learnt_and_kept_are_an_error(tmp_path, recipe_of, inside):
    folder(tmp_path / "data", [(64, 64)] * 3)
    folder(tmp_path / "data/kept", [(64, 64)] * 3)
    recipe = recipe_of(prior_data=str(tmp_path / "data" / inside))
    with pytest.raises(ConfigError, match="and one holds the other; expected two places"):
        recipe.source.make(recipe)


def test_processes_share_a_batch_and_its_size(tmp_path, recipe_of):
    folder(tmp_path / "data", SIZES * 3)
    recipe = recipe_of()
    source, other = (prepared(recipe.source.make(recipe)) for _ in range(2))
    stage, settings = recipe.stages[0], recipe.source.settings
    for number in (0, 3, 7, 20):
        whole = source.batch(settings, stage, Draws(3, 0, number, range(4)))
        parts = [other.batch(settings, stage, Draws(3, 0, number, rows)) for rows in (range(2), range(2, 3), range(3, 4))]
        for name in ("latent", "size", "weight"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert sum((part.captions for part in parts), ()) == whole.captions and {part.total for part in parts} == {whole.total}
        for row, (part, at) in enumerate([(parts[0], 0), (parts[0], 1), (parts[1], 0), (parts[2], 0)]):
            assert torch.equal(part.context[at][part.mask[at]], whole.context[row][whole.mask[row]])


def test_captions_are_drawn_as_often_as_they_weigh(tmp_path, recipe_of):
    folder(tmp_path / "data", [(64, 64)], caption=None)
    (tmp_path / "data/metadata.jsonl").write_text('{"file_name": "p0.png", "short": "circle", "long": ["red circle", "blue circle"]}')
    recipe = recipe_of(captions={"short": 3, "long": 1})
    source = prepared(recipe.source.make(recipe))
    seen = Counter(caption for batch in batches(source, recipe, 100) for caption in batch.captions)
    assert 260 < seen["circle"] < 340 and 25 < seen["red circle"] < 75 and 25 < seen["blue circle"] < 75


def test_repeats_come_more_often(tmp_path, recipe_of):
    folder(tmp_path / "data/3_x", [(64, 64)], caption="often")
    folder(tmp_path / "data/1_y", [(64, 64)], caption="once")
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe))
    assert source.report()[0] == "data: folder of pictures, 2 pictures, 4 with repeats"
    assert Counter(batches(source, recipe, 1)[0].captions) == {"often 0": 3, "once 0": 1}


def test_several_base_sizes_in_one_run(tmp_path, recipe_of):
    folder(tmp_path / "data", SIZES)
    stages = [{"base_size": base, "steps": 5, "batch_size": 2, "learning_rate": 1e-3} for base in (64, 128)]
    recipe = recipe_of(stages=stages)
    source = prepared(recipe.source.make(recipe))
    areas = [[batch.latent.shape[2] * batch.latent.shape[3] * 64 for batch in batches(source, recipe, 5, stage)] for stage in (0, 1)]
    assert all(0.6 * 64**2 < area < 1.4 * 64**2 for area in areas[0]) and all(0.8 * 128**2 < area < 1.2 * 128**2 for area in areas[1])


def test_squares_and_the_size_that_alpha_1024_is_told(tmp_path, recipe_of):
    """As in the reference, the picture's own size; or the bin's, where it is asked for."""
    folder(tmp_path / "data", SIZES)
    told = {}
    for own in (True, False):
        recipe = recipe_of(buckets=False, picture_size=own)
        seen = batches(prepared(recipe.source.make(recipe)), recipe, 2)
        assert {batch.latent.shape[2:] for batch in seen} == {(8, 8)}
        told[own] = {tuple(size) for batch in seen for size in batch.size.tolist()}
    assert told == {True: {(height, width) for width, height in SIZES}, False: {(64, 64)}}


def test_what_is_too_small_is_told_and_can_be_left_out(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64), (40, 40)])
    assert any(line.startswith("too small at 64 px: 1,") and line.endswith("p1.png") for line in source_of().report())
    left = source_of(skip_small=True)
    assert [entry.item.name for entry in left.album.entries] == ["p0.png"]
    assert "left out: 1 smaller than their bin" in left.report()


def test_held_out_pictures_are_never_trained_on(tmp_path, recipe_of):
    folder(tmp_path / "data", SIZES * 4)
    recipe = recipe_of(validation=0.25)
    source = prepared(recipe.source.make(recipe))
    held = source.validation(recipe.source.settings, recipe.stages[0], range(100))
    names = [caption for batch in held for caption in batch.captions]
    trained = {caption for batch in batches(source, recipe, 30) for caption in batch.captions}
    assert len(names) == len(set(names)) == 5 and len(trained) == 15 and not trained & set(names)
    one_by_one = [source.validation(recipe.source.settings, recipe.stages[0], range(row, row + 1)) for row in range(7)]
    assert [len(each) for each in one_by_one] == [1] * 5 + [0, 0]
    singles = {each[0].captions[0]: each[0].latent[0] for each in one_by_one[:5]}
    assert all(torch.equal(singles[caption], batch.latent[row]) for batch in held for row, caption in enumerate(batch.captions))
    again = recipe.source.make(recipe)
    assert again.held_out == source.held_out
    assert recipe_of().source.make(recipe_of()).validation(recipe.source.settings, recipe.stages[0], range(9)) == []


def test_contents_name_what_a_run_is_of(tmp_path, source_of):
    folder(tmp_path / "data", SIZES)
    before = source_of().contents()
    assert source_of().contents() == before and len(before) == 7 and all(len(line.split(" ")) == 3 for line in before)
    (tmp_path / "data/p1.txt").write_text("another text")
    picture(64, 64, 77).save(tmp_path / "data/p2.png")
    (tmp_path / "data/p3.png").unlink()
    after = source_of().contents()
    assert [line.split(" ")[0] for line in before if line not in after] == ["p1.png", "p2.png", "p3.png"]
    tiny_kl().save_pretrained(tmp_path / "vae")
    assert source_of(vae=str(tmp_path / "vae")).contents()[:1] == before[:1] and source_of(vae=str(tmp_path / "vae")).contents()[1] != before[1]


def test_a_report_tells_tokens_and_disk_and_writes_nothing(tmp_path, source_of):
    folder(tmp_path / "data", SIZES)
    (tmp_path / "data/p0.txt").write_text("circle " * 400)
    (tmp_path / "data/p1.txt").unlink()
    lines = source_of().report()
    assert lines[0] == "data: folder of pictures, 5 pictures"
    assert lines[1] == "64 px, 5 bins (width x height): 64x64 1, 96x48 1, 48x96 1, 80x48 1, 48x80 1"
    assert "without caption: 1, which are trained as the empty prompt: p1.png" in lines
    assert any("401 at most; the limit is 300" in line for line in lines)
    assert "too long: 1, whose last words are lost: p0.png" in lines
    assert lines[-1].startswith("to compute: 5 captions by T5, 5 pictures by the VAE; about 0.")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": None}, "source.data is not set: give --data"),
        ({"text_encoder": None}, "source.text_encoder is not set.*--text-encoder"),
        ({"vae": None}, "source.vae is not set.*--vae"),
        ({"vae": "nowhere"}, "source.vae is nowhere, which does not exist"),
        ({"validation": 1.5}, "source.validation is 1.5; expected a share"),
        ({"validation": 0.95}, "would hold 5 of 5 pictures out"),
        ({"captions": {"text": 0}}, "source.captions is {'text': 0}; expected fields with weights above 0"),
        ({"canny": [1.0, 0.5, 0.2]}, "source.canny is .*expected .blur, lower, upper"),
        ({"hints": "hed"}, "source.hed is None; give ControlNetHED.pth"),
        ({"hints": "nowhere"}, "source.hints is 'nowhere'; expected 'hed', 'canny', or a folder"),
    ],
)
def test_settings_that_can_not_be(tmp_path, source_of, change, message):
    folder(tmp_path / "data", SIZES)
    with pytest.raises(ConfigError, match=message):
        source_of(**change)


def test_a_batch_of_another_size_has_its_own_order(tmp_path, recipe_of):
    """KV compression measures a model on 16 pictures, whatever the stage's batch."""
    folder(tmp_path / "data", [(64, 64)] * 20)
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe))
    stage = replace(recipe.stages[0], batch_size=16)
    batch = source.batch(recipe.source.settings, stage, Draws(0, 1, 0, range(16)))
    assert len(set(batch.captions)) == 16
