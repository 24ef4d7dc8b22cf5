"""Broken data sets: each is told in a sentence that names the file and what to do, or the picture is named and skipped."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pixart.errors import DataError
from tests.support.data_sets import batches, data_info, encoded, folder, picture, prepared, stored_latent, stored_states, tar

Make = Callable[[Path], object]


def parquet(root: Path, **columns: list) -> Path:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    writer.write_table(pyarrow.table(columns), root / "a.parquet")
    return root / "a.parquet"


def metadata(root: Path, text: str, name: str = "metadata.jsonl") -> None:
    folder(root, [(32, 32)], caption=None)
    (root / name).write_text(text, encoding="utf-8")


def info(root: Path, content: str) -> None:
    root.mkdir()
    (root / "data_info.json").write_text(content)


def splits(root: Path) -> None:
    for name in ("dev", "test"):
        (root / name).mkdir(parents=True)
        (root / name / "dataset_info.json").write_text("{}")
    (root / "dataset_dict.json").write_text("{}")


def damaged_arrow(root: Path) -> None:
    root.mkdir()
    (root / "state.json").write_text('{"_data_files": [{"filename": "no.arrow"}], "_split": null}')
    (root / "dataset_info.json").write_text("{}")


ROW = {"path": "a.png", "height": 64, "width": 64, "ratio": 1.0, "prompt": "x"}
WHOLE: dict[str, tuple[Make, str]] = {  # a data set that can't be used at all -> what the error says
    "nothing": (lambda root: None, "data does not exist; expected a folder of pictures"),
    "empty": (lambda root: root.mkdir(), "holds no picture; expected a folder of pictures"),
    "a file of another kind": (lambda root: root.write_text("x"), "data is a file; expected a folder"),
    "no captions": (lambda root: folder(root, [(32, 32)] * 3, caption=None), "No picture has a caption; expected name.txt.*source.default_caption"),
    "metadata that is no JSON": (lambda root: metadata(root, '{"file_name": "p0.png", "text": "x"}\n{oops'), r"metadata.jsonl, line 2, is not JSON"),
    "metadata that is no object": (lambda root: metadata(root, "[1]"), r"metadata.jsonl, line 1, is \[1\]; expected an object"),
    "metadata without names": (lambda root: metadata(root, '{"text": "x"}'), r"metadata.jsonl, line 1, has no file_name"),
    "metadata with numbers": (lambda root: metadata(root, '{"file_name": "p0.png", "text": 3}'), "field text holds 3, which is not text"),
    "metadata that leaves the folder": (lambda root: metadata(root, '{"file_name": "../x.png", "text": "x"}'), "names the file '../x.png'; expected a path inside"),
    "metadata with an absolute path": (lambda root: metadata(root, '{"file_name": "/etc/x.png", "text": "x"}'), "'/etc/x.png'; expected a path inside"),
    "two kinds of metadata": (lambda root: (metadata(root, "x", "metadata.csv"), metadata(root, "{}")), "both metadata.jsonl and metadata.csv"),
    "metadata in another encoding": (lambda root: (metadata(root, ""), (root / "metadata.csv").write_bytes("file_name,text\np0.png,\xe9".encode("latin-1")), (root / "metadata.jsonl").unlink()), "metadata.csv can't be read as UTF-8"),
    "a CSV with a loose quote": (lambda root: metadata(root, 'file_name,text\np0.png,"x', "metadata.csv"), "metadata.csv is not CSV"),
    "data_info that is no JSON": (lambda root: info(root, "{"), "data_info.json can't be read as JSON"),
    "data_info that is no list": (lambda root: info(root, "{}"), "holds dict; expected a list of objects with path, width"),
    "data_info without sizes": (lambda root: info(root, json.dumps([{**ROW, "height": "64"}])), "picture 0, has height '64' and width 64"),
    "data_info that leaves its folder": (lambda root: info(root, json.dumps([{**ROW, "path": "../../a.png"}])), "picture 0, names the file '../../a.png'"),
    "data_info without a path": (lambda root: info(root, json.dumps([{**ROW, "path": None}])), "picture 0, names the file None"),
    "data_info with captions of numbers": (lambda root: info(root, json.dumps([{**ROW, "prompt": [1]}])), "picture 0, its field prompt holds 1"),
    "parquet that is none": (lambda root: (root.mkdir(), (root / "a.parquet").write_bytes(b"PAR1 no")), "a.parquet can't be read as parquet.*download it again"),
    "parquet without pictures": (lambda root: parquet(root, text=["x"], url=["y"]), "columns text, url; expected pictures in one called image"),
    "a damaged data set of datasets": (damaged_arrow, "can't be read as a data set of `datasets`.*save it again"),
    "splits and none called train": (splits, "holds the splits dev, test; give the folder of one"),
    "a tar that is none": (lambda root: (root.mkdir(), (root / "a.tar").write_bytes(b"x" * 3000)), "a.tar can't be read as an uncompressed tar"),
    "a compressed tar": (lambda root: (root.mkdir(), tar(root / "a.tar", {"a.png": b"x"}, "w:gz")), "a.tar can't be read as an uncompressed tar.*gunzip"),
    "a tar that is cut off": (lambda root: (tar(root / "a.tar", {"a.png": b"x" * 9000}), (root / "a.tar").write_bytes((root / "a.tar").read_bytes()[:5000])), "a.tar (is cut off|can't be read)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_data_set_that_can_not_be_used(tmp_path, source_of, case):
    make, message = WHOLE[case]
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        source_of()


def test_caption_fields_that_a_table_lacks(tmp_path, source_of):
    metadata(tmp_path / "data", '{"file_name": "p0.png", "text": "x"}')
    with pytest.raises(DataError, match="metadata.jsonl has no field long for captions; it has file_name, text"):
        source_of(captions={"long": 1.0})


def good(root: Path, count: int = 4) -> None:
    folder(root, [(64, 64)] * count)


def write(root: Path, name: str, content: bytes, caption: str = "x") -> None:
    good(root)
    (root / name).write_bytes(content)
    (root / name).with_suffix(".txt").write_text(caption)


def latin(root: Path) -> None:
    good(root)
    picture().save(root / "bad.png")
    (root / "bad.txt").write_bytes("caf\xe9".encode("latin-1"))


def one_gone(root: Path) -> None:
    good(root)
    rows = [{"file_name": f"p{number}.png", "text": "x"} for number in range(4)] + [{"file_name": "bad.png", "text": "x"}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def shard(root: Path) -> None:
    members = {f"p{number}.png": encoded(picture(64, 64, number)) for number in range(4)} | {f"p{number}.txt": b"x" for number in range(4)}
    tar(root / "0.tar", {**members, "bad.png": encoded(picture())[:60], "bad.txt": b"x"})


def no_bytes(root: Path) -> None:
    images = [{"bytes": encoded(picture(64, 64, number)), "path": None} for number in range(4)]
    parquet(root, image=[*images, {"bytes": None, "path": "/etc/passwd"}], text=["x"] * 5)


def reference(root: Path, name: str, change: Callable[[Path], object]) -> None:
    """Four good pictures of data_info.json and one with a stored feature."""
    data = data_info(root, [{"path": f"x/{stem}.png", "height": 64, "width": 64} for stem in ("p0", "p1", "p2", "p3", "bad")])
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    change(data / name)


LATENTS = "img_sdxl_vae_features_64resolution_ms_new/x_bad.npy"
SINGLE: dict[str, tuple[Make, str]] = {  # a data set of which one picture can't be used -> what is said of it
    "no picture": (lambda root: write(root, "bad.jpg", b"<html>404</html>"), "bad.jpg: it is not a JPEG, PNG, WebP or AVIF"),
    "an empty file": (lambda root: write(root, "bad.png", b""), "bad.png: it is not a JPEG"),
    "a picture cut off": (lambda root: write(root, "bad.jpg", encoded(picture(256, 256), "JPEG")[:1500]), "bad.jpg: it is damaged"),
    "a caption in another encoding": (latin, "bad.png: its captions in bad.txt can't be read as UTF-8"),
    "a picture that metadata names and is gone": (one_gone, "bad.png: .*metadata.jsonl, line 5, names it, but it is not there"),
    "a dangling link": (lambda root: (good(root), (root / "bad.png").symlink_to(root / "nowhere.png"), (root / "metadata.csv").write_text("file_name,text\nbad.png,x")), "bad.png: .*not there"),
    "a picture cut off in a tar": (shard, r"0.tar, bad.png: it is damaged"),
    "a row without bytes": (no_bytes, "a.parquet, group 0, row 4: its row holds no picture"),
    "a latent of another size": (lambda root: reference(root, LATENTS, lambda path: stored_latent(path, 32, 64)), r"x/bad.png: .*x_bad.npy is \(8, 4, 8\) of float32; expected mean and std, \(8, 8, 8\)"),
    "a latent without spread": (lambda root: reference(root, LATENTS, lambda path: stored_latent(path, 64, 64, channels=4)), r"x_bad.npy is \(4, 8, 8\) of float32; expected"),
    "a latent that runs code": (lambda root: reference(root, LATENTS, lambda path: np.save(path, np.array([{"a": 1}], dtype=object))), r"x_bad.npy is \(1,\) of object; expected mean and std"),
    "a latent that is no npy": (lambda root: reference(root, LATENTS, lambda path: path.write_bytes(b"PK no")), "x_bad.npy can't be read .*extract it again"),
    "a latent that is cut off": (lambda root: reference(root, LATENTS, lambda path: (stored_latent(path, 64, 64), path.write_bytes(path.read_bytes()[:900]))), "x_bad.npy is cut off; extract it again"),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLE)
def test_a_picture_that_can_not_be_used(tmp_path, recipe_of, caplog, case):
    """It is named; more than one in a hundred is an error; if that is allowed, the others train."""
    make, message = SINGLE[case]
    make(tmp_path / "data")
    recipe = recipe_of()
    source = recipe.source.make(recipe)
    assert len(source.album.broken) == 1
    assert any(line.startswith("broken: 1 of 5 pictures are broken") and "an error" in line for line in source.report())
    with pytest.raises(DataError, match=f"(?s){message}.*source.allow_broken"):
        prepared(source)
    allowed = recipe_of(allow_broken=True)
    source = prepared(allowed.source.make(allowed))
    assert "1 of 5 pictures are broken" in caplog.text
    assert len(source.album.entries) == 4 and batches(source, allowed, 1)[0].total == 4


def test_one_in_a_hundred_is_skipped_without_asking(tmp_path, source_of):
    folder(tmp_path / "data", [(16, 16)] * 99)
    (tmp_path / "data/bad.png").write_bytes(b"no")
    source = source_of()
    assert not source.album.too_broken and not any("an error" in line for line in source.report())
    (tmp_path / "data/worse.png").write_bytes(b"no")
    assert source_of().album.too_broken


STORED: dict[str, tuple[Callable[[Path], object], str]] = {  # states that the reference's tools would not have written -> the error
    "other arrays": (lambda path: np.savez(path, states=np.zeros(3)), "holds states; expected caption_feature and attention_mask"),
    "another width": (lambda path: stored_states(path, 9, 5, width=64), "has states 64 wide; this model's captions are 128 wide"),
    "a mask of another length": (lambda path: np.savez(path, caption_feature=np.ones((1, 5, 128)), attention_mask=np.ones((1, 7))), "has 5 states, but a mask of 7"),
    "no real token": (lambda path: np.savez(path, caption_feature=np.ones((1, 5, 128)), attention_mask=np.zeros((1, 5))), "holds no real token"),
    "NaN": (lambda path: np.savez(path, caption_feature=np.full((1, 5, 128), np.nan)), "holds NaN or infinite values; extract it again"),
    "code": (lambda path: np.savez(path, caption_feature=np.array([{}], dtype=object)), "can't be read .*allow_pickle"),
    "no npz": (lambda path: path.write_bytes(b"PK no"), "can't be read .*extract it again"),
}  # fmt: skip


@pytest.mark.parametrize("case", STORED)
def test_states_that_can_not_be_used(tmp_path, recipe_of, case):
    change, message = STORED[case]
    reference(tmp_path / "data", "caption_features_new/x_bad.npz", change)
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe))
    with pytest.raises(DataError, match=f"x_bad.npz.*{message}"):
        batches(source, recipe, 3)


def test_latents_with_nan_are_refused(tmp_path, recipe_of):
    found = np.full((8, 8, 8), np.nan, dtype=np.float32)
    reference(tmp_path / "data", LATENTS, lambda path: np.save(path, found))
    recipe = recipe_of()
    source = prepared(recipe.source.make(recipe))
    with pytest.raises(DataError, match="x_bad.npy holds NaN or infinite values"):
        batches(source, recipe, 3)
