"""Hints for a ControlNet: cached latents of HED's edges, Canny's lines or the user's own pictures, fitted as the pictures are."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from pixart.errors import DataError
from pixart.hed import load_hed
from pixart.training.data.picture import fitted, to_tensor
from pixart.vae import load_vae
from tests.support.data_sets import batches, encoded, folder, picture, prepared, tar
from tests.test_hed import random_weights


def hint_of(recipe) -> tuple[torch.Tensor, object]:
    source = prepared(recipe.source.make(recipe))
    batch = batches(source, recipe, 1)[0]
    assert batch.hint.shape == batch.latent.shape
    return batch.hint[0], load_vae(recipe.source.settings.vae, 0.13025)


def test_hed(tmp_path, recipe_of):
    folder(tmp_path / "data", [(128, 100)])
    torch.save(random_weights(), tmp_path / "hed.pth")
    found, vae = hint_of(recipe_of(hints="hed", hed=str(tmp_path / "hed.pth")))
    shown = to_tensor(fitted(picture(128, 100, 0), found.shape[1] * 8, found.shape[2] * 8, 64))[None]
    edges = load_hed(tmp_path / "hed.pth")(shown).expand(-1, 3, -1, -1)
    torch.testing.assert_close(found[None], vae.encode(edges), atol=3e-3, rtol=3e-3)


def test_canny(tmp_path, recipe_of):
    feature = pytest.importorskip("skimage.feature")
    folder(tmp_path / "data", [(64, 64)])
    found, vae = hint_of(recipe_of(hints="canny", canny=[1.5, 0.02, 0.05]))
    red, green, blue = np.moveaxis(np.asarray(picture(64, 64, 0)) / 255, -1, 0)
    lines = feature.canny(0.299 * red + 0.587 * green + 0.114 * blue, sigma=1.5, low_threshold=0.02, high_threshold=0.05)
    assert 80 < lines.sum() < 1000
    torch.testing.assert_close(found[None], vae.encode(torch.from_numpy(lines).float().expand(1, 3, -1, -1)), atol=3e-3, rtol=3e-3)


def test_a_folder_of_hints(tmp_path, recipe_of):
    """In any format, below the same folders; each is resized and cropped as its picture is."""
    folder(tmp_path / "data/red, blue", [(96, 64)])
    (tmp_path / "hints/red, blue").mkdir(parents=True)
    own = picture(192, 128, 5)
    own.save(tmp_path / "hints/red, blue/p0.webp", lossless=True)
    recipe = recipe_of(hints=str(tmp_path / "hints"))
    found, vae = hint_of(recipe)
    shown = to_tensor(fitted(own, found.shape[1] * 8, found.shape[2] * 8, 64))[None]
    torch.testing.assert_close(found[None], vae.encode(shown), atol=3e-3, rtol=3e-3)
    picture(192, 128, 6).save(tmp_path / "hints/red, blue/p0.webp", lossless=True)
    assert len(recipe.source.make(recipe).album.missing_pictures()) == 1


def test_hints_of_pictures_in_shards(tmp_path, source_of):
    """By the path within the shard, which must not lead out of the folder of hints."""
    members = {name: encoded(picture(64, 64, number)) for number, name in enumerate(("x/a.png", "../b.png"))}
    tar(tmp_path / "0.tar", {**members, "x/a.txt": b"a circle", "../b.txt": b"a circle"})
    folder(tmp_path / "hints/x", [(64, 64)], caption=None)
    (tmp_path / "hints/x/p0.png").rename(tmp_path / "hints/x/a.png")
    picture().save(tmp_path / "b.png")
    source = source_of(data=str(tmp_path / "0.tar"), hints=str(tmp_path / "hints"))
    assert [entry.item.inside for entry in source.album.entries] == ["x/a.png"]
    assert "names the file '../b.png'; expected a path inside" in source.album.broken["0.tar, ../b.png"]


def test_a_picture_without_its_hint_is_named(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64)] * 3)
    folder(tmp_path / "hints", [(64, 64)] * 2, caption=None)
    source = source_of(hints=str(tmp_path / "hints"))
    assert source.album.broken == {"p2.png": f"it has no hint in {tmp_path / 'hints'}; expected p2.png or another format"}
    with pytest.raises(DataError, match="p2.png: it has no hint"):
        prepared(source)


def test_a_hint_that_is_no_picture_is_named(tmp_path, source_of):
    folder(tmp_path / "data", [(64, 64)] * 2)
    folder(tmp_path / "hints", [(64, 64)] * 2, caption=None)
    (tmp_path / "hints/p1.png").write_bytes(b"no")
    assert list(source_of(hints=str(tmp_path / "hints")).album.broken) == ["p1.png"]
    assert "its hint can't be used: it is not a JPEG" in source_of(hints=str(tmp_path / "hints")).album.broken["p1.png"]


def test_hints_are_computed_beside_latents_that_are_there(tmp_path, source_of):
    pytest.importorskip("skimage")
    folder(tmp_path / "data", [(64, 64)])
    prepared(source_of())
    [work] = source_of(hints="canny").album.missing_pictures()
    assert not work.latent and work.hint
