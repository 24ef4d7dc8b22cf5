"""DreamBooth: class pictures come from the model itself, half of the rows are theirs, and their loss has its weight."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from demo import WEIGHTS
from pixart.errors import CheckpointError, ConfigError, DataError
from pixart.pipeline import Pipeline
from pixart.training.draws import Draws
from pixart.training.recipe import Recipe, make_recipe
from tests.support.data_sets import batches, folder, prepared

PROMPTS = {"instance_prompt": "A Photo of sks circle", "class_prompt": "a red circle"}


@pytest.fixture
def dreams(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of the demo model on tmp_path/data."""

    def made(initialize: bool = True, batch_size: int = 4, **source: Any) -> Recipe:
        places = {"data": str(tmp_path / "data"), "text_encoder": str(WEIGHTS["text_encoders"]), "vae": str(WEIGHTS["vae"]), "cache": str(tmp_path / "cache")}
        values = {
            "variant": "demo", "method": "full", "objective": "denoise", "precision": "fp32", "seed": 5,
            "source": {"name": "dreambooth", **places, **PROMPTS, "class_pictures": 3, "class_steps": 2, **source},
            "initialize": str(WEIGHTS["diffusion_models"]) if initialize else None,
            "output": str(tmp_path / "out.safetensors"), "run_dir": str(tmp_path / "run"),
            "stages": [{"base_size": 64, "steps": 10, "batch_size": batch_size, "learning_rate": 1e-3}],
        }  # fmt: skip
        return make_recipe(values, "test")

    return made


def test_missing_class_pictures_are_the_models_own(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64), (96, 64)])
    source = dreams().source.make(dreams())
    assert source.report()[-1] == f"class pictures to draw: 3, into {source.place}" and not source.place.exists()
    prepared(source)
    drawn = sorted(source.place.glob("*.png"))
    assert [path.name for path in drawn] == ["drawn-00000.png", "drawn-00001.png", "drawn-00002.png"]
    pipe = Pipeline.from_files(WEIGHTS["diffusion_models"], WEIGHTS["text_encoders"], WEIGHTS["vae"])
    shapes = set()
    for number, path in enumerate(drawn):
        with Image.open(path) as found:
            width, height = found.size
            expected = pipe("a red circle", width=width, height=height, use_bins=False, steps=2, seed=5 + number, progress=False)[0]
            shapes.add((height, width))
            apart = torch.tensor(list(found.convert("RGB").tobytes())).sub(torch.tensor(list(expected.tobytes()))).abs()
        assert apart.float().mean() < 2  # of 255; the cached states are in fp16
    assert shapes <= set(source.album.bins[source.album.shapes[0]][:2])  # of the instance pictures' bins
    times = {path: path.stat().st_mtime_ns for path in drawn}
    again = prepared(dreams().source.make(dreams()))
    assert not again.missing() and {path: path.stat().st_mtime_ns for path in drawn} == times
    assert again.report()[0] == "data: folder of pictures, 2 of the instance and 3 of the class, 5 pictures, 7 with repeats"


def test_half_of_the_rows_are_of_the_class_and_have_its_weight(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)] * 2)
    folder(tmp_path / "class", [(64, 64)] * 10, caption=None)
    recipe = dreams(class_data=str(tmp_path / "class"), class_pictures=10, prior_weight=0.25)
    source = prepared(recipe.source.make(recipe))
    seen = batches(source, recipe, 5)  # an epoch
    captions = Counter(caption for batch in seen for caption in batch.captions)
    assert captions == {"a photo of sks circle": 10, "a red circle": 10}
    for batch in seen:
        assert batch.prior.tolist() == [caption == "a red circle" for caption in batch.captions]
        assert batch.weight.tolist() == [0.25 if caption == "a red circle" else 1.0 for caption in batch.captions]
        assert batch.total == 4  # a mean over rows, whose weights the class pictures' own are beside
    alone = dreams(batch_size=1, class_data=str(tmp_path / "class"), class_pictures=10, prior_weight=0.25)
    source = prepared(alone.source.make(alone))
    weights = {(batch.captions[0], float(batch.weight), batch.total) for batch in batches(source, alone, 20)}
    assert weights == {("a photo of sks circle", 1.0, 1.0), ("a red circle", 0.25, 1.0)}


def test_a_folder_of_too_few_is_filled_up(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    folder(tmp_path / "class", [(64, 64)], caption=None)
    (tmp_path / "class/drawn-00001.png").write_bytes((tmp_path / "class/p0.png").read_bytes())
    (tmp_path / "class/drawn-00002.txt").write_text("somebody's own words")
    recipe = dreams(class_data=str(tmp_path / "class"), class_pictures=4)
    source = recipe.source.make(recipe)
    assert source.missing() == [0, 3]
    prepared(source)
    assert (tmp_path / "class/drawn-00002.txt").read_text() == "somebody's own words"
    assert sorted(path.name for path in (tmp_path / "class").glob("*.png")) == ["drawn-00000.png", "drawn-00001.png", "drawn-00003.png", "p0.png"]


def test_several_class_prompts_are_drawn_in_turn_and_kept_as_captions(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    prompts = ["a red circle", "a blue square over a green circle"]
    recipe = dreams(class_prompt=prompts, class_pictures=4)
    source = prepared(recipe.source.make(recipe))
    captions = [path.read_text().strip() for path in sorted(source.place.glob("*.txt"))]
    assert captions == [*prompts, *prompts]
    pipe = Pipeline.from_files(WEIGHTS["diffusion_models"], WEIGHTS["text_encoders"], WEIGHTS["vae"])
    # As many at once as the source draws: two steps at a size it never saw make much of what 16 bits round otherwise
    expected = pipe(captions, width=64, height=64, use_bins=False, steps=2, seed=[5, 6, 7, 8], progress=False)[1]
    with Image.open(source.place / "drawn-00001.png") as found:
        apart = torch.tensor(list(found.convert("RGB").tobytes())).sub(torch.tensor(list(expected.tobytes()))).abs()
    assert apart.float().mean() < 2  # of 255
    seen = Counter(caption for batch in batches(source, recipe, 2) for caption in batch.captions)
    assert seen == {"a photo of sks circle": 4, prompts[0]: 2, prompts[1]: 2}


def test_captions_of_the_subject_and_of_own_class_pictures(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)] * 2)
    (tmp_path / "data/p0.txt").write_text("a red sks circle")
    (tmp_path / "data/p1.txt").unlink()
    folder(tmp_path / "class", [(64, 64)] * 2, caption="a blue square")
    recipe = dreams(class_data=str(tmp_path / "class"), class_pictures=2, class_prompt=["a", "b"], instance_captions=True)
    single = dreams(class_data=str(tmp_path / "class"), class_pictures=2)
    assert {item.captions[0].text for item in single.source.make(single)._class_items()} == {"a red circle"}  # a single prompt is the caption of all
    source = prepared(recipe.source.make(recipe))
    seen = Counter(caption for batch in batches(source, recipe, 1) for caption in batch.captions)
    assert seen == {"a red sks circle": 1, "a photo of sks circle": 1, "a blue square 0": 1, "a blue square 1": 1}
    (tmp_path / "data/p0.txt").write_text("A")
    with pytest.raises(DataError, match="p0.png has the caption 'a', which is a class_prompt too; expected one that names the subject"):
        recipe.source.make(recipe)
    (tmp_path / "data/p0.txt").write_text("a red sks circle")
    (tmp_path / "class/p1.txt").unlink()
    (tmp_path / "class/p0.txt").write_text("a photo of SKS circle")
    with pytest.raises(DataError, match="p0.png in .*class has the caption 'A Photo of sks circle', which is the instance_prompt"):
        recipe.source.make(recipe)
    (tmp_path / "class/p0.txt").write_text("a blue square")
    with pytest.raises(DataError, match="p1.png in .*class has no caption, and class_prompt has 2 texts, so which one it shows is not known"):
        recipe.source.make(recipe)


def test_without_a_class_prompt_only_the_instance_is_trained(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)] * 2)
    recipe = dreams(class_prompt=None)
    source = prepared(recipe.source.make(recipe))
    batch = source.batch(recipe.source.settings, recipe.stages[0], Draws(0, 0, 0, range(4)))
    assert set(batch.captions) == {"a photo of sks circle"} and source.missing() == []


def test_other_weights_or_prompts_have_class_pictures_of_their_own(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    places = {str(recipe.source.make(recipe).place) for recipe in (dreams(), dreams(class_prompt="a circle"), dreams(class_steps=3), dreams(initialize=False))}
    assert len(places) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_prompt": None}, "source dreambooth: instance_prompt is empty; expected one that names the subject"),
        ({"class_prompt": "a photo of SKS circle"}, "instance_prompt and class_prompt are both 'a photo of sks circle'"),
        ({"class_prompt": ["a dog", "a photo of sks circle"]}, "instance_prompt and class_prompt are both 'a photo of sks circle'"),
        ({"class_prompt": "a  photo of sks\tcircle"}, "instance_prompt and class_prompt are both 'a photo of sks circle'"),
        ({"class_prompt": ["a dog", " "]}, "class_prompt is empty, or one of its texts is"),
        ({"class_prompt": list("abcd")}, "class_pictures is 3 and class_prompt has 4 texts; expected a picture of each, at least"),
        ({"class_prompt": ""}, "class_prompt is empty, or one of its texts is"),
        ({"class_prompt": []}, "class_prompt is empty, or one of its texts is"),
        ({"class_prompt": ["a dog", 3]}, "class_prompt is .*expected a text or a list, each a text or null"),
        ({"class_pictures": 0}, "class_pictures is 0 and class_steps 2; expected 1 or more of each"),
        ({"prior_weight": -1}, "prior_weight is -1; expected a number of 0 or more"),
        ({"prior": 1}, "unknown field.*prior"),
    ],
)
def test_bad_settings_are_sentences(dreams, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dreams(**changes)


def test_what_drawing_lacks_is_named_before_anything_is_computed(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    recipe = dreams(initialize=False)
    source = recipe.source.make(recipe)
    with pytest.raises(ConfigError, match="3 class pictures are missing in .*can't be drawn without initialize"):
        source.prepare([], Accelerator(cpu=True))
    assert not (tmp_path / "cache").exists()


def test_weights_that_can_not_draw_the_class_are_told_before_anything_is_computed(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    wrong = replace(dreams(), initialize=str(WEIGHTS["vae"]))  # as an alpha is for a Sigma, which it may begin
    source = wrong.source.make(wrong)
    for refused in (source.check, lambda: source.prepare([], Accelerator(cpu=True))):
        with pytest.raises(CheckpointError, match="this is a VAE; expected a PixArt transformer"):
            refused()
    assert not (tmp_path / "cache").exists()
    later = replace(dreams(), initialize=str(tmp_path / "not there yet.safetensors"))
    later.source.make(later).check()


def test_what_is_in_the_class_folder_and_can_not_be_used_is_told(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    folder(tmp_path / "class", [(64, 64)])
    (tmp_path / "class/a.bmp").touch()
    recipe = dreams(class_data=str(tmp_path / "class"))
    assert any(line.startswith("left out: 1 of other formats") and "class pictures" in line for line in recipe.source.make(recipe).report())
    recipe = dreams(class_data=str(tmp_path / "class/a.bmp"))
    with pytest.raises(ConfigError, match="a.bmp, which is a file; expected a folder of class pictures"):
        recipe.source.make(recipe)


@pytest.mark.parametrize("place", ["data", "data/class"])
def test_class_pictures_among_those_to_learn_are_refused(tmp_path: Path, dreams, place: str) -> None:
    folder(tmp_path / "data", [(64, 64)])
    with pytest.raises(ConfigError, match="one holds the other"):
        dreams(class_data=str(tmp_path / place)).source.make(dreams(class_data=str(tmp_path / place)))


def test_a_run_among_the_pictures_is_refused(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    for recipe, run_dir in ((dreams(class_prompt=None), "data/run"), (dreams(class_data=str(tmp_path / "class")), "class/run")):
        inside = replace(recipe, run_dir=str(tmp_path / run_dir))
        with pytest.raises(ConfigError, match="its own samples would be too"):
            inside.source.make(inside)


def test_more_that_another_run_drew_are_left_out(tmp_path: Path, dreams) -> None:
    folder(tmp_path / "data", [(64, 64)])
    few = dreams(class_pictures=2)
    before = prepared(few.source.make(few)).contents()
    prepared(dreams().source.make(dreams()))
    assert len(list(few.source.make(few).place.glob("*.png"))) == 3
    assert prepared(few.source.make(few)).contents() == before


def test_what_was_drawn_before_a_stop_is_not_drawn_again(tmp_path: Path, dreams, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "data", [(64, 64)])
    original, calls = Pipeline.__call__, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepared(dreams().source.make(dreams()))
    source = prepared(dreams().source.make(dreams()))
    assert calls == [5, 6, 7, 7] and sorted(path.name for path in source.place.iterdir()) == [f"drawn-{n:05}.png" for n in range(3)]


def test_a_stage_can_not_have_other_pictures(dreams) -> None:
    values = dreams().to_dict()
    values["stages"][0]["source"] = {"data": "elsewhere"}
    with pytest.raises(ConfigError, match="data can't differ from stage to stage"):
        make_recipe(values, "test")
