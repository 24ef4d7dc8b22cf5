"""Every layout is recognised, and each picture gets its captions, repeats and stored features."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart.errors import ConfigError, DataError
from pixart.training.data.captions import captions_of_row
from pixart.training.data.item import Caption, Listing
from pixart.training.data.look import Memory
from pixart.training.data.places import read_place
from tests.support.data_sets import batches, data_info, encoded, folder, picture, prepared, stored_latent, stored_states, tar


def captions_of(listing: Listing) -> dict[str, list[str]]:
    return {item.name: [caption.text for caption in item.captions] for item in listing.items}


def sizes_of(listing: Listing, tmp_path: Path) -> list[tuple[int, int]]:
    seen = Memory(tmp_path / "none").look([item.content for item in listing.items])
    assert [each.problem for each in seen] == [""] * len(seen)
    return [(each.width, each.height) for each in seen]


# -- folders --------------------------------------------------------------------------------------


def test_a_folder_with_texts(tmp_path):
    folder(tmp_path, [(32, 16), (16, 32)])
    (tmp_path / "p1.txt").write_text("\ufeffone\n\n  two  \r\n", encoding="utf-8")
    (tmp_path / "sub/deep").mkdir(parents=True)
    picture().save(tmp_path / "sub/deep/ünïcode.JPG", "JPEG")
    for junk in (".hidden.png", "._p0.png", "__MACOSX/p0.png", "Thumbs.db", "notes.md"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_bytes(b"junk")
    listing = read_place(tmp_path, "sigma")
    assert captions_of(listing) == {"p0.png": ["a red circle 0"], "p1.png": ["one", "two"], "sub/deep/ünïcode.JPG": []}
    assert sizes_of(listing, tmp_path) == [(32, 16), (16, 32), (64, 64)] and not listing.broken


def test_linked_folders_are_read_and_circles_are_not(tmp_path):
    folder(tmp_path / "elsewhere", [(16, 16)])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "data")
    assert captions_of(read_place(tmp_path / "data", "sigma")) == {"linked/p0.png": ["a red circle 0"]}


def test_of_splits_train_is_read(tmp_path):
    for name in ("train", "test"):
        folder(tmp_path / "folders" / name, [(16, 16)])
        tar(tmp_path / f"tars/{name}-0000.tar", {"a.png": encoded(picture())})
    listing = read_place(tmp_path / "folders", "sigma")
    assert list(captions_of(listing)) == ["train/p0.png"] and listing.layout == "folder of pictures, of its splits train"
    assert list(captions_of(read_place(tmp_path / "tars", "sigma"))) == ["train-0000.tar, a.png"]
    folder(tmp_path / "alone/test", [(16, 16)])
    assert list(captions_of(read_place(tmp_path / "alone", "sigma"))) == ["test/p0.png"]


def test_folders_named_n_repeat_and_lend_their_name(tmp_path):
    folder(tmp_path / "10_sks dog", [(16, 16)], caption=None)
    folder(tmp_path / "2_cat", [(16, 16)], caption="a cat")
    folder(tmp_path / "0_off", [(16, 16)])
    listing = read_place(tmp_path, "sigma")
    assert captions_of(listing) == {"10_sks dog/p0.png": ["sks dog"], "2_cat/p0.png": ["a cat 0"]}
    assert [item.repeats for item in listing.items] == [10, 2]
    assert listing.left_out == {"in folders that count 0 times": 1}


def test_what_lies_beside_the_pictures_and_is_not_read_is_counted(tmp_path):
    folder(tmp_path / "data", [(16, 16)])
    for name, kind in (("a.bmp", "BMP"), ("b.TIF", "TIFF"), ("c.jfif", "JPEG")):
        picture().save(tmp_path / "data" / name, kind)
    tar(tmp_path / "data/0.tar", {"a.png": encoded(picture())})
    listing = read_place(tmp_path / "data", "sigma")
    assert list(captions_of(listing)) == ["c.jfif", "p0.png"]
    assert sorted(listing.left_out.values()) == [1, 2]
    assert any(why.startswith("of other formats than .jpg") for why in listing.left_out)
    assert ".tar files, since there are loose pictures beside them" in listing.left_out
    for name in ("c.jfif", "p0.png", "0.tar"):
        (tmp_path / "data" / name).unlink()
    with pytest.raises(DataError, match="holds no picture; left out: 2 of other formats"):
        read_place(tmp_path / "data", "sigma")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_an_imagefolder(tmp_path, kind):
    folder(tmp_path / "train", [(16, 16)] * 3, caption=None)
    (tmp_path / "train/p2.txt").write_text("beside")
    rows = [{"file_name": "p0.png", "text": "first, with comma"}, {"file_name": "p1.png", "text": 'second "quoted"\nin two lines'}]
    if kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        content = 'file_name,text\np0.png,"first, with comma"\np1.png,"second ""quoted""\nin two lines"\n'
    (tmp_path / "train" / f"metadata.{kind}").write_text(content, encoding="utf-8", newline="")
    assert captions_of(read_place(tmp_path, "sigma")) == {
        "train/p0.png": ["first, with comma"], "train/p1.png": ['second "quoted"\nin two lines'], "train/p2.png": ["beside"],
    }  # fmt: skip


def test_rows_of_one_picture_are_its_captions(tmp_path):
    folder(tmp_path, [(16, 16)], caption=None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "p0.png", "text": "one"}\n{"file_name": "p0.png", "text": "two"}\n')
    assert captions_of(read_place(tmp_path, "sigma")) == {"p0.png": ["one", "two"]}


def test_captions_with_commas_need_quotes(tmp_path):
    folder(tmp_path, [(16, 16)], caption=None)
    (tmp_path / "metadata.csv").write_text("file_name,text\np0.png,a bar, at the top\n")
    with pytest.raises(DataError, match="row 2, has more cells than the first line has columns: ' at the top' is left over"):
        read_place(tmp_path, "sigma")


def test_fields_have_weights_and_lists_share_theirs():
    row = {"text": "unused", "short": ["a", "b", " "], "long": "c", "none": None}
    assert captions_of_row(row, {"short": 1.0, "long": 3.0, "none": 5.0}) == (Caption("a", 0.5), Caption("b", 0.5), Caption("c", 3.0))
    assert captions_of_row(row, None) == (Caption("unused"),)
    assert captions_of_row({"caption": "x", "prompt": "y"}, None) == (Caption("x"),)


# -- the reference's ------------------------------------------------------------------------------

ROWS = [{"path": "a/1.png", "height": 64, "width": 64}, {"path": "b/c/2.jpg", "height": 48, "width": 80}]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("place", [".", "partition", "partition_filter"])
def test_data_info_and_its_pictures(tmp_path, place, inside):
    data = data_info(tmp_path, [*ROWS, {"path": "a/3.png", "height": 90, "width": 10}], place)
    listing = read_place(tmp_path if inside else data, "sigma")
    assert captions_of(listing) == {"a/1.png": ["a red circle"], "b/c/2.jpg": ["a red circle"]}
    assert sizes_of(listing, tmp_path) == [(64, 64), (80, 48)] and [item.size for item in listing.items] == [(64, 64), (48, 80)]
    assert listing.left_out == {"of height / width above 4.5": 1}
    assert read_place(data, "alpha").left_out == {"of height / width above 4.0": 1}


def test_pictures_may_lie_beside_the_list(tmp_path):
    folder(tmp_path / "mine", [(16, 16)], caption=None)
    (tmp_path / "mine/data_info.json").write_text(json.dumps([{"path": "p0.png", "height": 16, "width": 16, "ratio": 1.0, "prompt": "x"}]))
    for place in (tmp_path / "mine", tmp_path / "mine/data_info.json"):
        assert sizes_of(read_place(place, "alpha"), tmp_path) == [(16, 16)]


def test_both_captions_of_sigma_are_drawn_and_an_empty_one_is_not(tmp_path):
    """The reference stops with an assertion where its own tool wrote an empty sharegpt4v (PixArt-sigma#136)."""
    rows = [{**ROWS[0], "sharegpt4v": ""}, {**ROWS[1], "sharegpt4v": "a longer text"}]
    first, second = read_place(data_info(tmp_path, rows), "sigma").items
    assert [(caption.text, caption.weight) for caption in first.captions] == [("a red circle", 1.0)]
    assert [(caption.text, caption.weight) for caption in second.captions] == [("a red circle", 0.5), ("a longer text", 0.5)]
    only = read_place(tmp_path / "InternData", "sigma", {"sharegpt4v": 1.0}).items
    assert [len(item.captions) for item in only] == [0, 1]


NAMES = {  # family, squares -> folder and name of the latent of b/c/2.jpg, folder and name of its states
    ("alpha", True): ("img_vae_features_64resolution/noflip/b/c_2.npy", "caption_feature_wmask/b/c_2.npz"),
    ("alpha", False): ("img_vae_fatures_64_multiscale/ms/b/c_2.npy", "caption_features/b/c_2.npz"),
    ("sigma", True): ("img_sdxl_vae_features_64resolution_new/2.npy", "caption_features_new/2.npz"),
    ("sigma", False): ("img_sdxl_vae_features_64resolution_ms_new/b/c_2.npy", "caption_features_new/b/c_2.npz"),
}


@pytest.mark.parametrize("family, squares", NAMES)
def test_stored_features_are_read_as_they_are(tmp_path, recipe_of, monkeypatch, family, squares):
    """Latents hold mean and std unscaled, states only the tokens that the mask has; no encoder is needed, and no picture."""
    from dataclasses import replace

    from pixart.config import get_variant
    from pixart.training.sources import pictures

    variant = replace(get_variant("demo"), family=family, latent_shift=0.5)
    monkeypatch.setattr(pictures, "get_variant", lambda name: variant)
    data = data_info(tmp_path, [ROWS[1]], pictures=False)
    latent_name, states_name = NAMES[family, squares]
    size = (64, 64) if squares else (48, 80)
    latent = stored_latent(data / latent_name, *size)
    states = stored_states(data / states_name, 30, 7)
    recipe = recipe_of(data=str(data), text_encoder=None, vae=None, buckets=not squares, sample_latents=False)
    source = prepared(recipe.source.make(recipe))
    assert "0 captions by T5, 0 pictures by the VAE" in source.report()[-1] and source.null_context is None
    with pytest.raises(ConfigError, match="'a circle' can't be drawn without --text-encoder and --vae"):
        prepared(source, "a circle")
    batch = batches(source, recipe, 1)[0]
    expected = torch.from_numpy((latent[:4] - 0.5) * 0.13025)
    torch.testing.assert_close(batch.latent, expected.expand(4, -1, -1, -1))
    assert batch.mask.all() and batch.context.shape == (4, 7, 128)
    np.testing.assert_array_equal(batch.context[0].numpy(), states)
    assert batch.size[0].tolist() == [48, 80] and batch.weight.sum() == batch.total == 1
    drawn = recipe_of(data=str(data), text_encoder=None, vae=None, buckets=not squares)
    spread = batches(prepared(drawn.source.make(drawn)), drawn, 1)[0].latent - batch.latent
    noise = spread / (torch.from_numpy(latent[4:]) * 0.13025)
    assert 0.8 < noise.std() < 1.2 and not torch.equal(noise[0], noise[1])


def test_a_name_that_two_pictures_share_stands_for_neither(tmp_path):
    """Sigma's square features are named without the folder: either picture would get the other's."""
    data = data_info(tmp_path, [{"path": "a/1.png", "height": 64, "width": 64}, {"path": "b/1.png", "height": 64, "width": 64}])
    stored_states(data / "caption_features_new/1.npz", 9, 5)
    items = read_place(data, "sigma").items
    assert [caption.states for item in items for caption in item.captions] == [None, None]
    assert [item.square.path(512).name for item in items] == ["a_1.npy", "b_1.npy"]


def test_states_without_a_mask_are_all_real(tmp_path):
    from pixart.training.data.stored import read_states

    np.savez(tmp_path / "a.npz", caption_feature=np.ones((1, 5, 16), np.float32))
    assert read_states(tmp_path / "a.npz", 16).shape == (5, 16)


def test_sa_1b(tmp_path, recipe_of):
    for number, name in enumerate(("sa_1", "sa_2")):
        (tmp_path / "data/images").mkdir(parents=True, exist_ok=True)
        picture(64, 64, number).save(tmp_path / f"data/images/{name}.jpg")
    (tmp_path / "data/captions").mkdir()
    (tmp_path / "data/captions/sa_1.txt").write_text("a red circle\nabove a square")
    (tmp_path / "data/captions/sa_2.txt").write_text("a blue circle")
    (tmp_path / "data/partition").mkdir()
    (tmp_path / "data/partition/part0.txt").write_text("sa_1\n")
    (tmp_path / "data/partition/part1.txt").write_text("sa_2\n\n")
    states = stored_states(tmp_path / "data/caption_feature_wmask/sa_1.npz", 12, 6, dtype=np.float32)
    latent = stored_latent(tmp_path / "data/img_vae_feature/train_vae_64/noflip/sa_1.npy", 64, 64)
    recipe = recipe_of(buckets=False, sample_latents=False)
    source = recipe.source.make(recipe)
    assert source.report()[0] == "data: SA-1B, 2 pictures"
    prepared(source)
    found = {batch.captions[row]: (batch.latent[row], batch.context[row][batch.mask[row]]) for batch in batches(source, recipe, 2) for row in range(4)}
    assert sorted(found) == ["a blue circle", "a red circle above a square"]
    torch.testing.assert_close(found["a red circle above a square"][0], torch.from_numpy(latent[:4] * 0.13025))
    torch.testing.assert_close(found["a red circle above a square"][1], torch.from_numpy(states))


# -- tables ---------------------------------------------------------------------------------------


def table_rows() -> dict[str, list]:
    return {"image": [picture(32, 16, 0), picture(16, 32, 1), picture(16, 16, 2)], "text": ["one", ["two", "zwei"], None]}


def saved(tmp_path: Path, splits: tuple[str, ...] = ()) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = table_rows()
    rows["text"] = [[text] if isinstance(text, str) else text for text in rows["text"]]
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}))
    made = datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data
    made.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.mark.parametrize("splits", [(), ("train", "test"), ("only",)])
def test_a_data_set_saved_by_datasets(tmp_path, splits):
    listing = read_place(saved(tmp_path, splits), "sigma")
    assert captions_of(listing) == {"row 0": ["one"], "row 1": ["two", "zwei"], "row 2": []}
    assert sizes_of(listing, tmp_path) == [(32, 16), (16, 32), (16, 16)]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path, struct):
    """In groups of rows, with pictures as bytes or as datasets writes them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [encoded(image) for image in table_rows()["image"]]
    column = [{"bytes": each, "path": None} for each in images] if struct else images
    (tmp_path / "data").mkdir()
    table = pyarrow.table({"image": column, "text": ["one", "two", None]})
    parquet.write_table(table, tmp_path / "data/train-00000-of-00002.parquet", row_group_size=2)
    parquet.write_table(table.slice(0, 1), tmp_path / "data/train-00001-of-00002.parquet")
    listing = read_place(tmp_path, "sigma")
    assert [[caption.text for caption in item.captions] for item in listing.items] == [["one"], ["two"], [], ["one"]]
    assert sizes_of(listing, tmp_path) == [(32, 16), (16, 32), (16, 16), (32, 16)]
    assert len({item.name for item in listing.items}) == 4


def test_tar_shards(tmp_path):
    tar(tmp_path / "00000.tar", {
        "a/x.jpg": encoded(picture(32, 16), "JPEG"), "a/x.txt": b"one\ntwo", "a/y.seg.png": b"another part", "b/y.png": encoded(picture(16, 32)),
        "b/y.json": json.dumps({"prompt": "three", "n": 1}).encode(), "README": b"no picture", "._x.jpg": b"junk",
    })  # fmt: skip
    tar(tmp_path / "00001.tar", {"x.webp": encoded(picture(16, 16), "WEBP")})
    listing = read_place(tmp_path, "sigma")
    assert captions_of(listing) == {"00000.tar, a/x.jpg": ["one", "two"], "00000.tar, b/y.png": ["three"], "00001.tar, x.webp": []}
    assert sizes_of(listing, tmp_path) == [(32, 16), (16, 32), (16, 16)]
    assert captions_of(read_place(tmp_path / "00000.tar", "sigma", {"prompt": 1.0}))["00000.tar, b/y.png"] == ["three"]


def test_a_shard_trains_like_its_pictures(tmp_path, source_of, recipe_of):
    """The same three pictures in a folder and in a tar have the same latents: the cache even has them already."""
    members = {}
    (tmp_path / "data").mkdir()
    for number in range(3):
        content = encoded(picture(64, 64, number))
        (tmp_path / f"data/p{number}.png").write_bytes(content)
        (tmp_path / f"data/p{number}.txt").write_text(f"circle {number}")
        members |= {f"p{number}.png": content, f"p{number}.txt": f"circle {number}".encode()}
    shard = tar(tmp_path / "shards/0.tar", members)
    prepared(source_of())
    recipe = recipe_of(data=str(shard))
    source = recipe.source.make(recipe)
    assert "to compute: 0 captions by T5, 0 pictures" in source.report()[-1]
    assert sorted(set(batches(prepared(source), recipe, 1)[0].captions)) == ["circle 0", "circle 1", "circle 2"]


def test_pictures_are_read_from_tars_in_place(tmp_path):
    """Not more of a shard than one picture is ever read."""
    pictures = [encoded(picture(64, 64, number)) for number in range(20)]
    tar(tmp_path / "0.tar", {f"p{number}.png": content for number, content in enumerate(pictures)})
    assert [item.content.read() for item in read_place(tmp_path, "sigma").items] == pictures
