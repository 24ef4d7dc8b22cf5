"""The lesson of a new shape: its folder, its questions, and its graph."""
from __future__ import annotations

import json

import numpy as np
import pytest

from demo.data.layout import arrange
from demo.data.reader import check, read_picture
from demo.data.scenes import NEW_SHAPE, SHAPES, render
from demo.evaluation import new_shape
from demo.evaluation.prompts import KINDS, Run, make_questions
from launch import graph


def drawn(question) -> np.ndarray:
    return (render(arrange(question.scene, 256, 256), 256, 256) * 255).round().astype(np.uint8)


def test_the_demo_never_saw_it() -> None:
    assert NEW_SHAPE not in SHAPES


def test_no_colour_and_place_of_both_halves() -> None:
    kept, taught = (set(new_shape.combinations(heldout)) for heldout in (True, False))
    assert not kept & taught and len(kept) >= 15 and len(taught) >= 40


def test_folders_hold_pictures_and_captions_of_what_is_taught_and_kept(tmp_path) -> None:
    from PIL import Image

    new_shape.write_folders(tmp_path / "bars")
    pictures = [path for folder in ("new", "old") for path in sorted((tmp_path / "bars" / folder).glob("*.png"))]
    assert len(pictures) == new_shape.PICTURES + new_shape.OLD <= 100
    taught = new_shape.questions(new_shape.combinations(False), new_shape.PICTURES, 0)
    old = new_shape.old_scenes(new_shape.OLD, 0)
    assert not any(obj.shape == NEW_SHAPE for question in old for obj in question.scene.objects)
    for picture, question in zip(pictures, taught + old, strict=True):
        captions = picture.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        assert captions[0] == question.caption.text and len(set(captions)) == (1 if question in taught else 8)
        assert question in taught or not any(NEW_SHAPE in caption for caption in captions)
        assert check(question.scene, np.asarray(Image.open(picture)), question.caption.stated).correct
    with pytest.raises(SystemExit, match="isn't empty"):
        new_shape.write_folders(tmp_path / "bars")


def test_the_reader_tells_it_from_all_others() -> None:
    asked = new_shape.questions(new_shape.combinations(True), 36, 1)
    assert all(check(each.scene, drawn(each), each.caption.stated).correct for each in asked)
    width, height = np.meshgrid(np.linspace(-1, 1, 120), np.linspace(-1, 1, 50))
    ellipse = np.full((256, 256, 3), 255, np.uint8)
    ellipse[100:150, 60:180][width**2 + height**2 < 1] = (224, 26, 26)
    assert [each.shape for each in read_picture(ellipse).objects] == ["unknown"]
    tall = np.full((256, 256, 3), 255, np.uint8)
    tall[60:180, 100:150] = (224, 26, 26)
    assert [each.shape for each in read_picture(tall).objects] == ["unknown"]


def test_another_word_for_it() -> None:
    asked = new_shape.questions(new_shape.combinations(True), 4, 1, word="sks")
    assert all("sks" in each.caption.text and NEW_SHAPE not in each.caption.text for each in asked)


def test_the_lora_goes_behind_the_loader() -> None:
    nodes = new_shape.changed(graph.load(new_shape.ROOT / "workflows/api/demo.json"), "bars.safetensors", "other.safetensors")
    loader = nodes["lora"]["inputs"]["model"][0]
    assert nodes[loader]["class_type"] == "PixArtModelLoader" and "other.safetensors" in nodes[loader]["inputs"].values()
    users = [name for name, node in nodes.items() if [loader, 0] in node["inputs"].values()]
    assert users == ["lora"] and any(["lora", 0] in node["inputs"].values() for node in nodes.values())


def test_the_prompts_of_dreambooths_class_are_none_that_are_asked_afterwards() -> None:
    recipe = json.loads((new_shape.ROOT / "configs/train/demo-new-shape-dreambooth.json").read_text(encoding="utf-8"))
    prompts = set(recipe["source"]["class_prompt"])
    asked = {question.caption.text for objects in KINDS for question in make_questions(Run("new shape", 100), objects, 0)}
    assert len(prompts) == recipe["source"]["class_pictures"] and not prompts & asked
    assert not [prompt for prompt in prompts if "bar" in prompt.split()]
